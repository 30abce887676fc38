import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError
from lightning_edge.functional.coding import CODERS, decode_symbols, encode_symbols, entropy_bits, estimate
from lightning_edge.functional.rans import MAX_ALPHABET


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1)))))
def test_symbols_come_back(case):
    alphabet, symbols = case
    data = encode_symbols(np.array(symbols, dtype=np.int64), alphabet)
    assert decode_symbols(ByteReader(data), len(symbols), alphabet).tolist() == symbols


@pytest.mark.parametrize(
    ("coder", "symbols", "alphabet"),
    [
        ("constant", np.full(1000, 300), 301),
        ("constant", np.zeros(0, dtype=np.int64), 4),
        ("huffman", np.arange(1000) % 4, 4),
        ("rans", np.arange(1000) % 4, 301),  # 4 bits of a code's length are more than the 1 of a frequency of zero
        ("rans", (np.arange(10_000) % 50 == 0).astype(np.int64), 2),
    ],
)
def test_the_smallest_coder_is_taken(coder, symbols, alphabet):
    data = encode_symbols(symbols, alphabet)
    assert CODERS[data[0]] == coder
    assert np.array_equal(decode_symbols(ByteReader(data), len(symbols), alphabet), symbols)


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("count", [10, 300, 30_000])
def test_the_estimate_is_near_the_bytes(scale, count):
    symbols = np.abs(np.random.default_rng(0).laplace(0, scale, count)).astype(np.int64)
    counts = np.bincount(symbols)
    assert abs(estimate(counts) - len(encode_symbols(symbols, len(counts)))) <= 0.01 * estimate(counts) + 12


def test_a_constant_takes_two_or_three_bytes():
    assert estimate(np.array([9, 0])) == len(encode_symbols(np.zeros(9, dtype=np.int64), 2)) == 2
    assert estimate(np.bincount([256], minlength=257)) == len(encode_symbols(np.full(9, 256), 257)) == 3


def test_too_large_an_alphabet_is_refused():
    with pytest.raises(ValueError, match="alphabet must have at most 8192 symbols, got 8193"):
        encode_symbols(np.arange(3), MAX_ALPHABET + 1)


def test_entropy_is_that_of_the_shares():
    assert entropy_bits(np.array([1, 1, 1, 1])) == 2.0
    assert entropy_bits(np.array([7, 0])) == 0.0
    assert entropy_bits(np.zeros(0, dtype=np.int64)) == 0.0
    assert entropy_bits(np.array([3, 1])) == pytest.approx(0.811278)


@pytest.mark.parametrize(
    ("data", "count", "alphabet", "message"),
    [
        (b"", 1, 2, "1 bytes are announced, 0 are left"),
        (b"\x00\x02", 1, 2, "a symbol must lie below 2, got 2"),
        (b"\x00\x01\x00", 1, 2, "1 bytes are left over"),
        (b"\x00\x01", 1, 300, "1 bytes are announced, 0 are left"),
        (b"\x04\x01", 1, 2, "coder 4 of 2 symbols is unknown"),
        (b"\x01\x01", 0, 2, "coder 1 of 2 symbols is unknown"),
        (b"\x02\x06\x00\x01", 1, 1, "coder 2 of 1 symbols is unknown"),
        (b"\x01" + b"\0" * 9000, 1, 8193, "coder 1 of 8193 symbols is unknown"),
        (b"\x00\x00", 1, 0, "a symbol must lie below 0, got 0"),
    ],
)
def test_a_hostile_stream_is_refused(data, count, alphabet, message):
    with pytest.raises(EdgeFormatError, match=message):
        decode_symbols(ByteReader(data), count, alphabet)
