import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError, varint
from lightning_edge.functional.coding import entropy_bits
from lightning_edge.functional.huffman import (
    MAX_LENGTH,
    _codes,
    code_lengths,
    huffman_bytes,
    huffman_decode,
    huffman_encode,
)

properties = settings(max_examples=60, deadline=None)
FIBONACCI = np.array([1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765, 10946])


def textbook_bits(counts):
    """Huffman 1952: merge the two rarest; every merge costs its count once."""
    heap = [int(count) for count in counts if count]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits


def least_bits(counts, max_length):
    """Try every assignment of lengths that satisfies Kraft's inequality."""
    best = np.inf
    for lengths in itertools.product(range(1, max_length + 1), repeat=len(counts)):
        if sum(2 ** (max_length - length) for length in lengths) <= 2**max_length:
            best = min(best, int(np.dot(counts, lengths)))
    return best


def scalar_encode(symbols, lengths):
    """The bits one code behind the other, as text."""
    codes = _codes(lengths)
    return "".join(f"{codes[symbol]:0{lengths[symbol]}b}" for symbol in symbols)


def kraft(lengths):
    return sum(2.0 ** -int(length) for length in lengths if length)


@properties
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=60).filter(lambda counts: sum(map(bool, counts)) > 1))
def test_lengths_are_those_of_a_textbook_huffman_where_no_limit_binds(counts):
    counts = np.array(counts)
    lengths = code_lengths(counts, max_length=40)
    assert int((counts * lengths).sum()) == textbook_bits(counts)
    assert kraft(lengths) == 1.0
    assert ((lengths > 0) == (counts > 0)).all()


@properties
@given(st.lists(st.integers(1, 500), min_size=2, max_size=6), st.integers(3, 4))
def test_lengths_are_the_best_of_all_that_keep_a_limit(counts, max_length):
    lengths = code_lengths(np.array(counts), max_length=max_length)
    assert lengths.max() <= max_length
    assert kraft(lengths) <= 1.0
    assert int(np.dot(counts, lengths)) == least_bits(counts, max_length)


def test_a_limit_that_binds_is_kept_and_costs_little():
    lengths = code_lengths(FIBONACCI)
    assert len(FIBONACCI) - 1 > MAX_LENGTH == lengths.max()
    assert kraft(lengths) == 1.0
    assert textbook_bits(FIBONACCI) < int((FIBONACCI * lengths).sum()) < 1.001 * textbook_bits(FIBONACCI)


def test_one_symbol_takes_one_bit_and_no_symbol_none():
    assert code_lengths(np.array([0, 7, 0])).tolist() == [0, 1, 0]
    assert code_lengths(np.array([0, 0])).tolist() == [0, 0]


def test_more_symbols_than_codes_are_refused():
    with pytest.raises(ValueError, match="counts must have at most 4 symbols in use, got 5"):
        code_lengths(np.ones(5, dtype=np.int64), max_length=2)


def test_no_code_begins_with_another():
    lengths = code_lengths(FIBONACCI)
    codes = [f"{code:0{length}b}" for code, length in zip(_codes(lengths), lengths, strict=True)]
    assert not any(other.startswith(code) for code, other in itertools.permutations(codes, 2))


@properties
@given(st.integers(2, 300).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), min_size=1))))
def test_symbols_come_back(case):
    alphabet, symbols = case
    data = huffman_encode(np.array(symbols), alphabet)
    assert huffman_decode(ByteReader(data), len(symbols), alphabet).tolist() == symbols


@pytest.mark.parametrize("count", [1, 2, 9_000, 16_384, 30_001, 100_000])
@pytest.mark.parametrize("skew", [0.3, 0.99])
def test_symbols_in_several_chunks_come_back(count, skew):
    symbols = np.minimum(np.random.default_rng(count).geometric(skew, count) - 1, 40)
    data = huffman_encode(symbols, 41)
    assert np.array_equal(huffman_decode(ByteReader(data), count, 41), symbols)


def test_codes_at_the_limit_of_their_length_come_back():
    symbols = np.random.default_rng(0).permutation(np.repeat(np.arange(len(FIBONACCI)), FIBONACCI))
    data = huffman_encode(symbols, len(FIBONACCI))
    assert np.array_equal(huffman_decode(ByteReader(data), len(symbols), len(FIBONACCI)), symbols)


def test_the_bits_are_those_of_a_scalar_encoder():
    symbols = np.random.default_rng(0).integers(0, 7, 500) ** 2 % 11
    bits = scalar_encode(symbols, code_lengths(np.bincount(symbols, minlength=11)))
    size = -(-len(bits) // 8)
    expected = int(bits + "0" * (8 * size - len(bits)), 2).to_bytes(size, "big")
    assert huffman_encode(symbols, 11)[-size:] == expected


@pytest.mark.parametrize("scale", [0.8, 3.0, 20.0])
def test_bytes_are_near_the_entropy_and_the_estimate_near_the_bytes(scale):
    symbols = np.abs(np.random.default_rng(1).laplace(0, scale, 100_000)).astype(np.int64)
    counts = np.bincount(symbols)
    size = len(huffman_encode(symbols, len(counts)))
    best = textbook_bits(counts) / 8
    assert best <= size <= 1.005 * best + 100
    assert abs(size - huffman_bytes(counts)) <= 0.002 * size + 8


def test_bytes_are_within_two_percent_of_the_entropy():
    symbols = np.abs(np.random.default_rng(1).laplace(0, 8.0, 100_000)).astype(np.int64)
    counts = np.bincount(symbols)
    assert len(huffman_encode(symbols, len(counts))) <= 1.02 * entropy_bits(counts) * len(symbols) / 8


@pytest.fixture(scope="module")
def stream():
    symbols = np.random.default_rng(2).integers(0, 5, 20_000)
    return huffman_encode(symbols, 5), len(symbols)


@pytest.mark.parametrize("extra", [1, 2, 7])
def test_bytes_left_over_are_refused(stream, extra):
    data, count = stream
    with pytest.raises(EdgeFormatError, match="codes must end in the last of"):
        huffman_decode(ByteReader(data + bytes(extra)), count, 5)


@pytest.mark.parametrize("difference", [-10_000, -100, -9, 9, 100, 50_000])
def test_a_wrong_count_is_refused(stream, difference):
    data, count = stream
    with pytest.raises(EdgeFormatError):
        huffman_decode(ByteReader(data), count + difference, 5)


def test_a_stream_that_is_cut_short_is_refused(stream):
    data, count = stream
    for size in [*range(40), *range(40, len(data), 397)]:
        with pytest.raises(EdgeFormatError):
            huffman_decode(ByteReader(data[:size]), count, 5)


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (b"\x00\x01\x00", 3, "code lengths must leave room"),
        (b"\x11\x10" + varint(1) + b"\0", 3, "code lengths must leave room"),
        (b"\x11\x00" + varint(0) + b"\0", 3, "3 symbols must fill every chunk, got 0 chunks"),
        (b"\x11\x00" + varint(3) + b"\1\1\0", 4, "4 symbols must fill every chunk, got 3 chunks"),
        (b"\x11\x00" + varint(2) + varint(20) + b"\0", 4, "8 bits must hold 4 symbols, the last chunk from bit 20 on"),
        (b"\x11\x00" + varint(1) + b"\0", 9, "8 bits must hold 9 symbols"),
        (b"\x11\x00" + varint(2) + varint(3) + b"\0", 4, "every chunk must end where the next one starts"),
        (b"\x10\x00" + varint(1) + b"\x80", 1, "codes must end in the last"),
        (b"\x11\x00" + varint(1) + b"\0" * (1 << 28 - 3), (1 << 28) - 1, "must fill every chunk, got 1 chunks"),
    ],
)
def test_a_hostile_stream_of_three_symbols_is_refused(data, count, message):
    with pytest.raises(EdgeFormatError, match=message):
        huffman_decode(ByteReader(data), count, 3)


def test_one_code_alone_is_read():
    assert huffman_decode(ByteReader(b"\x01\x00" + varint(1) + b"\0"), 8, 3).tolist() == [1] * 8
