"""Canonical Huffman codes of limited length, decoded chunk by chunk in parallel by one table."""

import heapq

import numpy as np
from numpy.typing import NDArray

from lightning_edge.functional.bytestream import BitReader, BitWriter, ByteReader, varint

MAX_LENGTH = 15
_CHUNK_BITS = 1 << 14  # about 16,000 bits to a chunk: the position of its end costs about 0.1 %
_FEW_CHUNKS = 32
_BLOCK = 1 << 16  # symbols whose codes are joined at a time: they stay in the cache
Counts = NDArray[np.int64]
Symbols = NDArray[np.int64]


def code_lengths(counts: Counts, *, max_length: int = MAX_LENGTH) -> NDArray[np.int64]:
    """Return the best code lengths of at most ``max_length`` bits (package-merge, Larmore and Hirschberg 1990).

    Args:
        counts: How often each symbol occurs, shape (symbols,); one that does not occur gets length 0.
        max_length: Largest length in bits; 2**max_length symbols can have a code.

    Raises:
        ValueError: If there are more symbols than codes.

    >>> code_lengths(np.array([5, 1, 0, 1]))
    array([1, 2, 0, 2])
    """
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), dtype=np.int64)
    if len(used) > 1 << max_length:
        raise ValueError(f"counts must have at most {1 << max_length} symbols in use, got {len(used)}")
    if len(used) == 1:
        lengths[used] = 1
        return lengths
    leaves: list[tuple[int, tuple[int, ...]]] = sorted((int(counts[symbol]), (int(symbol),)) for symbol in used)
    packages = leaves
    for _ in range(max_length - 1):
        merged = [
            (left[0] + right[0], left[1] + right[1]) for left, right in zip(packages[::2], packages[1::2], strict=False)
        ]
        packages = list(heapq.merge(leaves, merged))
    for _, symbols in packages[: 2 * len(used) - 2]:
        np.add.at(lengths, list(symbols), 1)
    return lengths


def huffman_bytes(counts: Counts) -> int:
    """Return about how many bytes :func:`huffman_encode` takes for symbols of these counts.

    >>> huffman_bytes(np.array([4, 4]))
    4
    """
    lengths = code_lengths(counts)
    bits = int((counts * lengths).sum())
    return 2 + (bits + 7) // 8 + (4 * len(counts) + 7) // 8 + 2 * (bits // _CHUNK_BITS)


def huffman_encode(symbols: Symbols, alphabet: int) -> bytes:
    """Return the symbols as a table of code lengths (4 bits each), chunk sizes and code bits.

    Args:
        symbols: Numbers in [0, alphabet), flat, not empty.
        alphabet: Number of symbols; known to the decoder.

    >>> huffman_decode(ByteReader(huffman_encode(np.array([2, 0, 2]), 3)), 3, 3)
    array([2, 0, 2])
    """
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    table = BitWriter()
    for length in lengths:
        table.write(int(length), 4)
    widths = lengths.astype(np.uint8)[symbols]
    ends = np.cumsum(widths, dtype=np.int64)
    chunks = max(1, int(ends[-1]) // _CHUNK_BITS)
    size = -(-len(symbols) // chunks)
    starts = np.concatenate([[0], ends[size - 1 : -1 : size]])
    sizes = b"".join(varint(int(step)) for step in np.diff(starts))
    return table.bytes() + varint(chunks) + sizes + _joined(_codes(lengths).astype(np.uint16)[symbols], widths, ends)


def huffman_decode(reader: ByteReader, count: int, alphabet: int) -> Symbols:
    """Return ``count`` symbols from the rest of ``reader``.

    Raises:
        EdgeFormatError: If the bytes are no such stream.

    >>> huffman_decode(ByteReader(huffman_encode(np.array([1, 1, 0]), 2)), 3, 2)
    array([1, 1, 0])
    """
    table = BitReader(reader)
    lengths = np.array([table.read(4) for _ in range(alphabet)], dtype=np.int64)
    longest = int(lengths.max())
    if longest == 0 or int((1 << longest - lengths[lengths > 0]).sum()) > 1 << longest:
        raise reader.error("code lengths must leave room for every code (Kraft's inequality), got some that do not")
    chunks = reader.varint(limit=count)
    size = -(-count // max(chunks, 1))
    if chunks == 0 or size * (chunks - 1) >= count or size > 2 * _CHUNK_BITS:  # every symbol takes a bit
        raise reader.error(f"{count} symbols must fill every chunk, got {chunks} chunks")
    starts = np.cumsum([0, *(reader.varint(limit=size * MAX_LENGTH) for _ in range(chunks - 1))])
    data = np.frombuffer(reader.take(reader.left), dtype=np.uint8)
    total = 8 * len(data)
    if max(count, starts[-1]) > total:
        raise reader.error(f"{total} bits must hold {count} symbols, the last chunk from bit {starts[-1]} on")
    padded = np.concatenate([data, np.zeros(4, dtype=np.uint8)]).astype(np.int64)
    symbol_of, length_of = _decoding_table(lengths, longest)
    decode = _decode_few if chunks < _FEW_CHUNKS else _decode_chunks
    out, position = decode(padded, starts.astype(np.int64), size, symbol_of, length_of)
    full = count - size * (chunks - 1)  # the last chunk can be shorter: what it decoded beyond is no data
    if chunks > 1 and bool((position[:-1] != starts[1:]).any()):
        raise reader.error("every chunk must end where the next one starts, got one that does not")
    symbols = out.T.reshape(-1)[: size * (chunks - 1) + full]
    end = int(starts[-1] + lengths[symbols[size * (chunks - 1) :]].sum())
    if bool((symbols < 0).any()) or not total - 8 < end <= total:
        raise reader.error(f"codes must end in the last of {total} bits, got an end at {end}")
    return symbols


def _decode_chunks(
    padded: Symbols, starts: Symbols, size: int, symbol_of: Symbols, length_of: Symbols
) -> tuple[Symbols, Symbols]:
    """Return ``size`` symbols of every chunk, shape (size, chunks), and where each ended; a symbol of all at a time."""
    position, longest, last = starts.copy(), len(symbol_of).bit_length() - 1, len(padded) - 4
    out = np.zeros((size, len(starts)), dtype=np.int64)
    for step in range(size):
        byte = np.minimum(position >> 3, last)
        window = padded[byte] << 16 | padded[byte + 1] << 8 | padded[byte + 2]
        code = window >> 24 - longest - (position & 7) & (1 << longest) - 1
        out[step] = symbol_of[code]
        position += length_of[code]
    return out, position


def _decode_few(
    padded: Symbols, starts: Symbols, size: int, symbol_of: Symbols, length_of: Symbols
) -> tuple[Symbols, Symbols]:
    """Return the same; of few chunks a loop is faster than numpy."""
    data, symbols, lengths = padded.tolist(), symbol_of.tolist(), length_of.tolist()
    longest, last, mask = len(symbols).bit_length() - 1, len(data) - 4, len(symbols) - 1
    out = np.zeros((size, len(starts)), dtype=np.int64)
    ends = []
    for chunk, start in enumerate(starts.tolist()):
        position, found = start, []
        for _ in range(size):
            byte = position >> 3 if position >> 3 < last else last
            code = (data[byte] << 16 | data[byte + 1] << 8 | data[byte + 2]) >> 24 - longest - (position & 7) & mask
            found.append(symbols[code])
            position += lengths[code]
        out[:, chunk] = found
        ends.append(position)
    return out, np.array(ends, dtype=np.int64)


def _joined(codes: NDArray[np.uint16], widths: NDArray[np.uint8], ends: NDArray[np.int64]) -> bytes:
    """Return codes of at most 15 bits behind each other: each adds to the word that it begins in, and to the next."""
    words = np.zeros(int(ends[-1]) // 32 + 2, dtype=np.uint64)
    for part in (slice(start, start + _BLOCK) for start in range(0, len(codes), _BLOCK)):
        starts = ends[part] - widths[part]
        values = codes[part].astype(np.uint64) << (64 - (starts & 31) - widths[part]).astype(np.uint64)
        word = starts >> 5  # none is left out: a code begins in every 32 bits
        sums = np.add.reduceat(values, np.flatnonzero(np.diff(word, prepend=-1)))
        words[word[0] : word[0] + len(sums)] += sums >> np.uint64(32)
        words[word[0] + 1 : word[0] + 1 + len(sums)] += sums & np.uint64(0xFFFFFFFF)
    return words.astype(">u4").tobytes()[: (int(ends[-1]) + 7) // 8]


def _codes(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the canonical code of each symbol: ordered by length, then by symbol."""
    codes = np.zeros(len(lengths), dtype=np.int64)
    code = previous = 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda symbol: (lengths[symbol], symbol)):
        code <<= int(lengths[symbol]) - previous
        previous = int(lengths[symbol])
        codes[symbol] = code
        code += 1
    return codes


def _decoding_table(lengths: NDArray[np.int64], longest: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for every window of ``longest`` bits, its first symbol (-1: none) and that code's length."""
    symbols = np.full(1 << longest, -1, dtype=np.int64)
    widths = np.ones(1 << longest, dtype=np.int64)
    for symbol, code in zip(np.flatnonzero(lengths), _codes(lengths)[lengths > 0], strict=True):
        rest = longest - int(lengths[symbol])
        symbols[int(code) << rest : int(code) + 1 << rest] = symbol
        widths[int(code) << rest : int(code) + 1 << rest] = lengths[symbol]
    return symbols, widths
