"""A stream of symbols as bytes: whichever entropy coder is smaller."""

import numpy as np
from numpy.typing import NDArray

from lightning_edge.functional.bytestream import ByteReader
from lightning_edge.functional.huffman import huffman_bytes, huffman_decode, huffman_encode
from lightning_edge.functional.rans import MAX_ALPHABET, rans_bytes, rans_decode, rans_encode

Symbols = NDArray[np.int64]
_LONG = 1 << 16  # from here on rANS, which numpy decodes faster, is taken unless Huffman's is a percent smaller
CODERS = ("constant", "huffman", "rans", "bytes")


def encode_symbols(symbols: Symbols, alphabet: int) -> bytes:
    """Return the symbols as one byte for the coder and its stream.

    Args:
        symbols: Numbers in [0, alphabet), flat.
        alphabet: Number of symbols, >= 1, known to the decoder; at most 8,192 where more than one is used.

    Raises:
        ValueError: If the alphabet is too large.

    >>> len(encode_symbols(np.zeros(1000, dtype=np.int64), 2))
    2
    """
    counts = np.bincount(symbols, minlength=alphabet)
    if np.count_nonzero(counts) <= 1:
        only = int(counts.argmax())
        return bytes([0]) + bytes([only & 0xFF, only >> 8] if alphabet > 256 else [only])
    if alphabet > MAX_ALPHABET:
        raise ValueError(f"alphabet must have at most {MAX_ALPHABET} symbols, got {alphabet}")
    huffman, rans = huffman_bytes(counts), rans_bytes(counts)
    if alphabet <= 256 and min(huffman, rans) >= len(symbols):
        return bytes([3]) + symbols.astype(np.uint8).tobytes()
    if huffman <= rans * (1.0 if len(symbols) < _LONG else 0.99):
        return bytes([1]) + huffman_encode(symbols, alphabet)
    return bytes([2]) + rans_encode(symbols, alphabet)


def decode_symbols(reader: ByteReader, count: int, alphabet: int) -> Symbols:
    """Return ``count`` symbols from all that is left of ``reader``.

    Raises:
        EdgeFormatError: If the bytes are no such stream.

    >>> decode_symbols(ByteReader(encode_symbols(np.array([3, 3, 1]), 4)), 3, 4)
    array([3, 3, 1])
    """
    coder = reader.byte()
    if coder == 0:
        only = reader.byte() | (reader.byte() << 8 if alphabet > 256 else 0)
        if only >= alphabet:
            raise reader.error(f"a symbol must lie below {alphabet}, got {only}")
        reader.end()
        return np.full(count, only, dtype=np.int64)
    if coder >= len(CODERS) or count == 0 or not 1 < alphabet <= MAX_ALPHABET:
        raise reader.error(f"coder {coder} of {alphabet} symbols is unknown: the file may be of a later version")
    if coder == 3:
        plain = np.frombuffer(reader.take(count), dtype=np.uint8).astype(np.int64)
        reader.end()
        if int(plain.max()) >= alphabet:
            raise reader.error(f"a symbol must lie below {alphabet}, got {int(plain.max())}")
        return plain
    return huffman_decode(reader, count, alphabet) if coder == 1 else rans_decode(reader, count, alphabet)


def estimate(counts: NDArray[np.int64]) -> int:
    """Return about how many bytes symbols of these counts take, at most a few bytes off.

    >>> estimate(np.array([8, 0]))
    2
    """
    if np.count_nonzero(counts) <= 1:
        return 2 if len(counts) <= 256 else 3
    return min(huffman_bytes(counts), rans_bytes(counts))


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Return the order-0 entropy in bits per symbol.

    >>> entropy_bits(np.array([2, 2]))
    1.0
    """
    share = counts[counts > 0] / max(1, counts.sum())
    return float(-(share * np.log2(share)).sum()) + 0.0
