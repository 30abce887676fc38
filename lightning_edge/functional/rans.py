"""Range asymmetric numeral systems (Duda 2013, arXiv:1311.2540) with many lanes: one numpy operation steps them all.

Symbol i belongs to lane i mod lanes. Each lane is a state of 32 bits; where a state leaves its interval, 16 bits move
between it and one stream that all lanes share, in the order of the lanes.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_edge.functional.bytestream import BitReader, BitWriter, ByteReader, varint

_LOW = 1 << 16
_PRECISIONS = (6, 8, 10, 12, 14)
_MAX_LANES = 1 << 13
_BYTES_PER_LANE = 400  # a lane's state costs about 3 bytes more than it carries: not a percent
_MAX_STEPS = 1 << 14  # of symbols that take hardly any bytes; one step is one numpy operation on all lanes
_FEW_LANES = 32
_UNFIT = "the states must end where the encoder began, got others: the stream is damaged"
MAX_ALPHABET = 1 << 13
Counts = NDArray[np.int64]
Symbols = NDArray[np.int64]


def rans_bytes(counts: Counts) -> int:
    """Return about how many bytes :func:`rans_encode` takes for symbols of these counts.

    >>> rans_bytes(np.array([1000, 1000])) - 250 < 16
    True
    """
    size = _best_model(counts)[0]
    return size + 2 * _lanes(size, int(counts.sum()))


def rans_encode(symbols: Symbols, alphabet: int) -> bytes:
    """Return the symbols as a table of frequencies, the lanes' states and the shared stream.

    Args:
        symbols: Numbers in [0, alphabet), flat, not empty.
        alphabet: Number of symbols, at most :data:`MAX_ALPHABET`; known to the decoder.

    >>> rans_decode(ByteReader(rans_encode(np.array([2, 0, 2]), 3)), 3, 3)
    array([2, 0, 2])
    """
    size, precision, frequencies = _best_model(np.bincount(symbols, minlength=alphabet))
    lanes = _lanes(size, len(symbols))
    start = np.concatenate([[0], np.cumsum(frequencies)[:-1]]).astype(np.uint64)
    frequency = frequencies.astype(np.uint64)
    state = np.full(lanes, _LOW, dtype=np.uint64)
    words: list[NDArray[np.uint16]] = []
    shift = np.uint64(precision)
    for first in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        row = symbols[first : first + lanes]
        now = state[: len(row)]  # the last row can be short: its missing lanes just wait
        f = frequency[row]
        full = now >= f << np.uint64(32 - precision)
        words.append((now[full] & np.uint64(0xFFFF)).astype("<u2"))
        now[full] >>= np.uint64(16)
        quotient, rest = np.divmod(now, f)
        now[:] = (quotient << shift) + rest + start[row]
    header = bytes([precision]) + _write_frequencies(frequencies) + varint(lanes)
    return header + state.astype("<u4").tobytes() + b"".join(part.tobytes() for part in reversed(words))


def rans_decode(reader: ByteReader, count: int, alphabet: int) -> Symbols:
    """Return ``count`` symbols from the rest of ``reader``.

    Raises:
        EdgeFormatError: If the bytes are no such stream; every state must come back to where the encoder began.

    >>> rans_decode(ByteReader(rans_encode(np.array([1, 1, 0]), 2)), 3, 2)
    array([1, 1, 0])
    """
    precision, frequencies, state = read_head(reader, count, alphabet)
    lanes = len(state)
    words = np.frombuffer(reader.take(reader.left // 2 * 2), dtype="<u2")
    symbol_of = np.repeat(np.arange(alphabet, dtype=np.uint16), frequencies)
    frequency_of = np.repeat(frequencies, frequencies).astype(np.uint32)
    start = np.concatenate([[0], np.cumsum(frequencies)[:-1]])
    offset_of = (np.arange(1 << precision) - np.repeat(start, frequencies)).astype(np.uint32)
    if lanes < _FEW_LANES:
        tables = symbol_of.tolist(), frequency_of.tolist(), offset_of.tolist()
        few, position = _decode_few(state.tolist(), words.tolist(), count, tables, precision)
        if position != len(words):
            raise reader.error(_UNFIT)
        reader.end()
        return np.array(few, dtype=np.int64)
    out = np.empty(count, dtype=np.uint16)
    mask, shift, position = np.uint32((1 << precision) - 1), np.uint32(precision), 0
    for first in range(0, count, lanes):
        now = state[: min(lanes, count - first)]
        slot = now & mask
        out[first : first + len(now)] = symbol_of[slot]
        now[:] = frequency_of[slot] * (now >> shift) + offset_of[slot]
        low = np.flatnonzero(now < _LOW)
        if position + len(low) > len(words):
            raise reader.error(f"{position + len(low)} words are needed, {len(words)} are there")
        now[low] = now[low] << np.uint32(16) | words[position : position + len(low)]
        position += len(low)
    if position != len(words) or bool((state != _LOW).any()):
        raise reader.error(_UNFIT)
    reader.end()
    return out.astype(np.int64)


def read_head(reader: ByteReader, count: int, alphabet: int) -> tuple[int, NDArray[np.int64], NDArray[np.uint32]]:
    """Return the precision in bits, the frequency of every symbol, and the state of every lane.

    Raises:
        EdgeFormatError: If the bytes say none of a stream of ``count`` symbols.
    """
    precision = reader.byte()
    if precision not in _PRECISIONS:
        raise reader.error(f"precision must be one of {_PRECISIONS} bits, got {precision}")
    frequencies = _read_frequencies(reader, alphabet, 1 << precision)
    lanes = reader.varint(limit=min(_MAX_LANES, count))
    if lanes == 0 or (lanes < _MAX_LANES and lanes * _MAX_STEPS < count):
        raise reader.error(f"{count} symbols must have a lane each {_MAX_STEPS}, got {lanes} lanes")
    return precision, frequencies, np.frombuffer(reader.take(4 * lanes), dtype="<u4").astype(np.uint32)


def _decode_few(
    state: list[int], words: list[int], count: int, tables: tuple[list[int], list[int], list[int]], precision: int
) -> tuple[list[int], int]:
    """Return the symbols of few lanes, for which a loop is faster than numpy, and how many words they took.

    -1 where words are missing or the states do not end where the encoder began.
    """
    symbol_of, frequency_of, offset_of = tables
    lanes, mask, position, end = len(state), (1 << precision) - 1, 0, len(words)
    found = []
    for index in range(count):
        lane = index % lanes
        now = state[lane]
        slot = now & mask
        found.append(symbol_of[slot])
        now = frequency_of[slot] * (now >> precision) + offset_of[slot]
        if now < _LOW:
            if position == end:
                return found, -1
            now = now << 16 | words[position]
            position += 1
        state[lane] = now
    return found, position if state == [_LOW] * lanes else -1


def _lanes(size: int, count: int) -> int:
    """Return as many lanes as cost little, and enough that no stream takes many steps."""
    lanes = 1
    while lanes < _MAX_LANES and (
        lanes * _MAX_STEPS < count or (2 * lanes * _BYTES_PER_LANE <= size and 2 * lanes <= count)
    ):
        lanes *= 2
    return lanes


def _best_model(counts: Counts) -> tuple[int, int, NDArray[np.int64]]:
    """Return the bytes, the precision and the frequencies for which table and symbols together are smallest."""
    best: tuple[int, int, NDArray[np.int64]] | None = None
    used = counts > 0
    for precision in _PRECISIONS:
        if int(used.sum()) > 1 << precision:
            continue
        frequencies = _normalize(counts, 1 << precision)
        bits = float((counts[used] * (precision - np.log2(frequencies[used]))).sum())
        size = int(bits / 8) + len(_write_frequencies(frequencies)) + 6
        if best is None or size < best[0]:
            best = (size, precision, frequencies)
    if best is None:
        raise ValueError(f"counts must have at most {1 << _PRECISIONS[-1]} symbols in use, got {int(used.sum())}")
    return best


def _normalize(counts: Counts, total: int) -> NDArray[np.int64]:
    """Return whole frequencies that add up to ``total``, at least 1 where a symbol occurs."""
    share = counts / counts.sum() * total
    frequencies = np.where(counts > 0, np.maximum(1, np.floor(share + 0.5)), 0).astype(np.int64)
    while (excess := int(frequencies.sum()) - total) != 0:
        # Give to, or take from, where it changes the code length least or gains most: the largest relative error.
        error = np.where(frequencies > (1 if excess > 0 else 0), (frequencies - share) / np.maximum(share, 1e-9), 0.0)
        if excess > 0:
            candidates = np.flatnonzero(frequencies > 1)
            chosen = candidates[np.argsort(-error[candidates], kind="stable")[:excess]]
            frequencies[chosen] -= 1
        else:
            candidates = np.flatnonzero(counts)
            chosen = candidates[np.argsort(error[candidates], kind="stable")[:-excess]]
            frequencies[chosen] += 1
    return frequencies


def _write_frequencies(frequencies: NDArray[np.int64]) -> bytes:
    """Return the order of the Exp-Golomb code, a byte, and all frequencies but the last, which is what is left."""
    values = [int(value) for value in frequencies[:-1]]
    tables = []
    for order in range(13):
        bits = sum(2 * ((value >> order) + 1).bit_length() - 1 + order for value in values)
        tables.append((bits, order))
    _, order = min(tables)
    writer = BitWriter()
    writer.write_exp_golomb(values, order)
    return bytes([order]) + writer.bytes()


def _read_frequencies(reader: ByteReader, alphabet: int, total: int) -> NDArray[np.int64]:
    order = reader.byte()
    if order > 12:
        raise reader.error(f"the order of an Exp-Golomb code must be at most 12, got {order}")
    bits = BitReader(reader)
    values, left = [], total
    for _ in range(alphabet - 1):
        values.append(bits.read_exp_golomb(order, limit=left))
        left -= values[-1]
    return np.array([*values, left], dtype=np.int64)
