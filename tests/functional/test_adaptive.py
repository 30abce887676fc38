import time

import numpy as np
import pytest

from lightning_edge.functional.adaptive import PRECISION, AdaptiveTables, Decoder, Encoder
from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError


def coded(columns, contexts, alphabet, *, lanes, riders=b""):
    tables, encoder = AdaptiveTables(2, alphabet), Encoder(lanes)
    for symbols, context in zip(columns, contexts, strict=True):
        encoder.put(tables.refreshed(), context, symbols)
        tables.count(context, symbols)
    return encoder.bytes(riders)


def decoded(data, contexts, alphabet, *, lanes):
    tables, decoder = AdaptiveTables(2, alphabet), Decoder(ByteReader(data), lanes)
    columns = []
    for context in contexts:
        columns.append(decoder.take(tables.refreshed(), context))
        tables.count(context, columns[-1])
    return columns, decoder.end()


def columns_of(count, rows, alphabet, *, seed=0):
    generator = np.random.default_rng(seed)
    contexts = generator.integers(0, 2, (count, rows))
    skewed = generator.geometric(0.5, (count, rows)) - 1
    return np.minimum(np.where(contexts == 0, skewed, alphabet - 1 - skewed).clip(0), alphabet - 1), contexts


@pytest.mark.parametrize(("rows", "lanes"), [(1, 1), (7, 4), (16, 16), (40, 8)])
@pytest.mark.parametrize("alphabet", [2, 5, 256])
def test_columns_come_back_with_the_riders(rows, lanes, alphabet):
    columns, contexts = columns_of(60, rows, alphabet)
    riders = bytes(range(2 * lanes))
    data = coded(columns, contexts, alphabet, lanes=lanes, riders=riders)
    found, carried = decoded(data, contexts, alphabet, lanes=lanes)
    assert np.array_equal(found, columns)
    assert carried == riders


def test_adaptive_counts_come_close_to_the_entropy_of_each_context():
    columns, contexts = columns_of(400, 64, 8)
    data = coded(columns, contexts, 8, lanes=16)
    ideal = 0.0
    for context in (0, 1):
        share = np.bincount(columns[contexts == context]) / (contexts == context).sum()
        ideal -= (contexts == context).sum() * (share[share > 0] * np.log2(share[share > 0])).sum() / 8
    assert ideal < len(data) < 1.02 * ideal + 2 * 16


def test_riders_cost_hardly_anything():
    columns, contexts = columns_of(100, 32, 4)
    without = coded(columns, contexts, 4, lanes=32)
    riders = np.random.default_rng(1).bytes(64)
    assert len(coded(columns, contexts, 4, lanes=32, riders=riders)) <= len(without) + 8


def test_every_symbol_keeps_a_frequency_and_all_add_up():
    tables = AdaptiveTables(1, 200)
    for _ in range(400):  # far beyond the count at which all are halved
        tables.count(np.zeros(100, dtype=np.int64), np.zeros(100, dtype=np.int64))
        table = tables.refreshed()
    assert (np.diff(table[0]) >= 1).all()
    assert table[0, -1] == 1 << PRECISION
    assert np.diff(table[0])[0] > 0.95 * (1 << PRECISION)


def test_a_table_stays_until_its_counts_have_grown_by_a_sixteenth():
    tables = AdaptiveTables(1, 2)
    before = tables.refreshed().copy()
    tables.count(np.zeros(100, dtype=np.int64), np.zeros(100, dtype=np.int64))
    grown = tables.refreshed().copy()
    tables.count(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
    assert grown[0, 1] > before[0, 1]
    assert np.array_equal(tables.refreshed(), grown)


@pytest.mark.parametrize("cut", [1, 3, 9])
def test_a_stream_that_is_cut_short_or_too_long_is_found_out(cut):
    columns, contexts = columns_of(60, 8, 4)
    data = coded(columns, contexts, 4, lanes=4)
    with pytest.raises(EdgeFormatError):
        decoded(data[:-cut], contexts, 4, lanes=4)
    with pytest.raises(EdgeFormatError):
        decoded(data + bytes(2 * cut), contexts, 4, lanes=4)


def test_a_column_of_few_rows_costs_little_however_many_counts_there_are():
    small, large = (AdaptiveTables(64 * 7, alphabet) for alphabet in (2, 256))
    seconds = []
    for tables in (small, large):
        tables.refreshed()
        start = time.process_time()
        for _ in range(3000):
            tables.count(np.array([5]), np.array([1]))
        seconds.append(time.process_time() - start)
    assert seconds[1] < 3 * seconds[0]
