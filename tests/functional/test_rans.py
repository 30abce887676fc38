import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError, varint
from lightning_edge.functional.coding import entropy_bits
from lightning_edge.functional.rans import (
    _MAX_LANES,
    _MAX_STEPS,
    _PRECISIONS,
    MAX_ALPHABET,
    _best_model,
    _lanes,
    _normalize,
    _read_frequencies,
    _write_frequencies,
    rans_bytes,
    rans_decode,
    rans_encode,
)

properties = settings(max_examples=60, deadline=None)


def scalar_rans(symbols, frequencies, precision, lanes):
    """Duda 2013, one symbol at a time with Python's whole numbers: the states and the 16-bit words in reading order."""
    starts = [0, *np.cumsum(frequencies)[:-1].tolist()]
    states, words = [1 << 16] * lanes, []
    rows = [symbols[first : first + lanes] for first in range(0, len(symbols), lanes)]
    for row in reversed(rows):
        moved = []
        for lane, symbol in enumerate(row):
            frequency = int(frequencies[symbol])
            if states[lane] >= frequency << (32 - precision):
                moved.append(states[lane] & 0xFFFF)
                states[lane] >>= 16
            quotient, rest = divmod(states[lane], frequency)
            states[lane] = (quotient << precision) + rest + starts[symbol]
        words = moved + words
    return states, words


def skewed(count, scale, seed=0):
    return np.abs(np.random.default_rng(seed).laplace(0, scale, count)).astype(np.int64)


@properties
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), min_size=1))))
def test_symbols_come_back(case):
    alphabet, symbols = case
    data = rans_encode(np.array(symbols), alphabet)
    assert rans_decode(ByteReader(data), len(symbols), alphabet).tolist() == symbols


@pytest.mark.parametrize("count", [1, 799, 8_191, 100_003, 500_000])
@pytest.mark.parametrize("scale", [0.1, 2.0, 60.0])
def test_symbols_in_several_lanes_come_back(count, scale):
    symbols = skewed(count, scale)
    alphabet = int(symbols.max()) + 1
    data = rans_encode(symbols, alphabet)
    assert np.array_equal(rans_decode(ByteReader(data), count, alphabet), symbols)


def test_as_many_symbols_as_the_largest_alphabet_come_back():
    symbols = np.random.default_rng(0).permutation(np.repeat(np.arange(MAX_ALPHABET), 3))
    assert np.array_equal(
        rans_decode(ByteReader(rans_encode(symbols, MAX_ALPHABET)), len(symbols), MAX_ALPHABET), symbols
    )


def test_states_and_words_are_those_of_a_scalar_coder():
    symbols = skewed(3_000, 2.0)
    alphabet = int(symbols.max()) + 1
    size, precision, frequencies = _best_model(np.bincount(symbols, minlength=alphabet))
    lanes = _lanes(size, len(symbols))
    states, words = scalar_rans(symbols, frequencies, precision, lanes)
    stream = np.array(states, "<u4").tobytes() + np.array(words, "<u2").tobytes()
    assert lanes > 1
    assert (
        rans_encode(symbols, alphabet) == bytes([precision]) + _write_frequencies(frequencies) + varint(lanes) + stream
    )


@pytest.mark.parametrize("scale", [0.15, 0.8, 3.0, 20.0])
def test_bytes_are_within_two_percent_of_the_entropy_and_the_estimate_near_them(scale):
    symbols = skewed(100_000, scale)
    counts = np.bincount(symbols)
    size = len(rans_encode(symbols, len(counts)))
    entropy = entropy_bits(counts) * len(symbols) / 8
    assert 0.999 * entropy < size <= 1.02 * entropy + len(counts) + 40
    assert abs(size - rans_bytes(counts)) <= 0.005 * size + 8


@properties
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=64).filter(any), st.sampled_from(_PRECISIONS))
def test_frequencies_fill_the_table_and_keep_every_symbol_that_occurs(counts, precision):
    counts = np.array(counts)
    frequencies = _normalize(counts, 1 << precision)
    assert frequencies.sum() == 1 << precision
    assert ((frequencies > 0) == (counts > 0)).all()


@properties
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=64).filter(any), st.sampled_from(_PRECISIONS))
def test_a_table_of_frequencies_comes_back(counts, precision):
    frequencies = _normalize(np.array(counts), 1 << precision)
    reader = ByteReader(_write_frequencies(frequencies))
    assert _read_frequencies(reader, len(frequencies), 1 << precision).tolist() == frequencies.tolist()
    reader.end()


def test_more_symbols_than_the_largest_table_are_refused():
    with pytest.raises(ValueError, match="counts must have at most 16384 symbols in use, got 16385"):
        rans_bytes(np.ones(16_385, dtype=np.int64))


def test_symbols_that_take_hardly_any_bytes_still_have_enough_lanes_to_be_fast():
    counts = np.array([2_000_000, 3])
    assert rans_bytes(counts) < 400
    assert _lanes(rans_bytes(counts), int(counts.sum())) * _MAX_STEPS >= counts.sum()
    assert _lanes(1 << 30, 1 << 40) == _MAX_LANES


@pytest.fixture(scope="module")
def stream():
    symbols = skewed(20_000, 2.0)
    alphabet = int(symbols.max()) + 1
    return rans_encode(symbols, alphabet), len(symbols), alphabet


@pytest.mark.parametrize(("extra", "message"), [(1, "1 bytes are left over"), (2, "must end where the encoder began")])
def test_bytes_left_over_are_refused(stream, extra, message):
    data, count, alphabet = stream
    with pytest.raises(EdgeFormatError, match=message):
        rans_decode(ByteReader(data + bytes(extra)), count, alphabet)


@pytest.mark.parametrize("difference", [-10_000, -1, 1, 2, 10_000])
def test_a_wrong_count_is_refused(stream, difference):
    data, count, alphabet = stream
    with pytest.raises(EdgeFormatError):
        rans_decode(ByteReader(data), count + difference, alphabet)


def test_a_stream_that_is_cut_short_is_refused(stream):
    data, count, alphabet = stream
    for size in [*range(60), *range(60, len(data), 397)]:
        with pytest.raises(EdgeFormatError):
            rans_decode(ByteReader(data[:size]), count, alphabet)


def test_a_flipped_bit_is_refused(stream):
    data, count, alphabet = stream
    for position in range(0, len(data), 411):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(EdgeFormatError):
            rans_decode(ByteReader(bytes(damaged)), count, alphabet)


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (b"\x07", 1, "precision must be one of"),
        (b"\x06\x0d", 1, "the order of an Exp-Golomb code must be at most 12, got 13"),
        (b"\x06\x06\x00\x00\x00\x00\x00\x00", 1, "at most 32 leading zeros"),
        (b"\x06\x06\x60\x40" + b"\0" * 8, 1, "a number must be at most"),
        (b"\x06\x00\xc0" + varint(0), 1, "1 symbols must have a lane each 16384, got 0 lanes"),
        (b"\x06\x00\xc0" + varint(1), 1 << 31, "must have a lane each 16384, got 1 lanes"),
        (b"\x06\x00\xc0" + varint(2), 1, "a number must be at most 1, got more"),
        (b"\x06\x00\xc0" + varint(1) + b"\0\0\1", 1, "4 bytes are announced, 3 are left"),
        (b"\x06\x00\xc0" + varint(1) + b"\0\0\0\0", 1, "the states must end where the encoder began"),
        (b"\x06\x00\xc0" + varint(1) + b"\1\0\1\0", 5, "the states must end where the encoder began"),
    ],
)
def test_a_hostile_stream_of_three_symbols_is_refused(data, count, message):
    with pytest.raises(EdgeFormatError, match=message):
        rans_decode(ByteReader(data), count, 3)
