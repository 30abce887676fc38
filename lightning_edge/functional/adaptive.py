"""Lane-parallel range coding with frequencies that adapt: one set of counts per context, shared by all lanes.

All rows of a column find their contexts in earlier columns, so they can be decoded at once, with one table per context;
then its counts take in all their symbols at once. The states of the coder are fewer than the rows and take turns. What
a state starts from carries two bytes of other data, which come out when all is decoded: states then cost next to
nothing.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_edge.functional.bytestream import BitReader, BitWriter, ByteReader

Integers = NDArray[np.int64]
PRECISION = 15
_LOW = 1 << 16
FIRST_COUNT, INCREMENT = 2, 5  # 0.4 of an occurrence each to begin with
_MAX_TOTAL = 1 << 16
_STALE = 16  # a table is made anew when its counts have grown by a sixteenth


class AdaptiveTables:
    """Counts of symbols per context, and the table of cumulative frequencies that was last made of them.

    Args:
        contexts: Number of contexts.
        alphabet: Number of symbols.

    >>> AdaptiveTables(1, 2).refreshed()
    array([[    0, 16384, 32768]])
    """

    def __init__(self, contexts: int, alphabet: int) -> None:
        self._alphabet = alphabet
        self._counts = np.full((contexts, alphabet), FIRST_COUNT, dtype=np.int64)
        self._totals = self._counts.sum(1)
        self._made_of = np.zeros(contexts, dtype=np.int64)
        self._table = np.zeros((contexts, alphabet + 1), dtype=np.int64)

    def refreshed(self) -> Integers:
        """Return the cumulative frequencies, shape (contexts, symbols + 1), with those made anew that are stale."""
        stale = (_STALE * self._totals >= (_STALE + 1) * self._made_of).nonzero()[0]
        if len(stale):
            spread = (1 << PRECISION) - self._alphabet  # every symbol keeps a frequency of 1
            sums = np.cumsum(self._counts[stale], axis=1)
            self._table[stale, 1:] = sums * spread // self._totals[stale, None] + np.arange(1, self._alphabet + 1)
            self._made_of[stale] = self._totals[stale]
        return self._table

    def count(self, contexts: Integers, symbols: Integers) -> None:
        """Take in the symbols of a column, each under its context."""
        # In place: a column of few rows must not cost as much as all the counts there are.
        np.add.at(self._counts.reshape(-1), contexts * self._alphabet + symbols, INCREMENT)
        np.add.at(self._totals, contexts, INCREMENT)
        if int(self._totals.max()) > _MAX_TOTAL:
            for context in np.flatnonzero(self._totals > _MAX_TOTAL):
                self._counts[context] = (self._counts[context] + 1) >> 1
                self._totals[context] = self._made_of[context] = self._counts[context].sum()


@dataclass
class Encoder:
    """Collects symbols with their frequencies in the order of decoding, and codes them in the opposite order."""

    lanes: int
    _steps: list[tuple[Integers, Integers]] = field(default_factory=list)

    def put(self, table: Integers, contexts: Integers, symbols: Integers) -> Integers:
        """Add the symbols of a column, one per row that has any, and return them."""
        start = table[contexts, symbols]
        frequency = table[contexts, symbols + 1] - start
        for first in range(0, len(symbols), self.lanes):
            chunk = slice(first, first + self.lanes)
            self._steps.append((start[chunk], frequency[chunk]))
        return symbols

    def bytes(self, riders: bytes = b"") -> bytes:
        """Return the states and the stream; ``riders``, up to two bytes a lane, come out of the decoder at its end."""
        state = np.frombuffer(riders.ljust(2 * self.lanes, b"\0"), dtype="<u2").astype(np.int64) + _LOW
        words: list[NDArray[np.uint16]] = []
        for start, frequency in reversed(self._steps):
            now = state[: len(start)]
            full = now >= frequency << 32 - PRECISION
            words.append((now[full] & 0xFFFF).astype("<u2"))
            now[full] >>= 16
            quotient, rest = np.divmod(now, frequency)
            now[:] = (quotient << PRECISION) + rest + start
        return _write_states(state) + b"".join(part.tobytes() for part in reversed(words))


class Decoder:
    """Decodes columns of symbols from all that is left of a reader.

    Raises:
        EdgeFormatError: If the bytes are no such stream.
    """

    def __init__(self, reader: ByteReader, lanes: int) -> None:
        self._reader, self._lanes, self._position = reader, lanes, 0
        self._places = np.arange(lanes)
        self._state = _read_states(reader, lanes)
        self._words = np.frombuffer(reader.take(reader.left // 2 * 2), dtype="<u2").astype(np.int64)
        reader.end()

    def take(self, table: Integers, contexts: Integers) -> Integers:
        """Return the symbols of a column, one per context."""
        if len(contexts) <= self._lanes:
            return self._chunk(table[contexts])
        parts = range(0, len(contexts), self._lanes)
        return np.concatenate([self._chunk(table[contexts[first : first + self._lanes]]) for first in parts])

    def end(self) -> bytes:
        """Return the riders, two bytes per lane, after checking that everything has been used."""
        carried = self._state - _LOW
        if self._position != len(self._words) or bool(((carried < 0) | (carried > 0xFFFF)).any()):
            raise self._reader.error("the states must end where the encoder began, got others: the stream is damaged")
        return carried.astype("<u2").tobytes()

    def _chunk(self, rows: Integers) -> Integers:
        count = len(rows)
        now, places = self._state[:count], self._places[:count]
        slot = now & (1 << PRECISION) - 1
        symbols: Integers = (rows[:, 1:-1] <= slot[:, None]).sum(1)
        start = rows[places, symbols]
        now[:] = (rows[places, symbols + 1] - start) * (now >> PRECISION) + slot - start
        low = (now < _LOW).nonzero()[0]
        if not len(low):
            return symbols
        end = self._position + len(low)
        if end > len(self._words):
            raise self._reader.error(f"{end} words are needed, {len(self._words)} are there")
        now[low] = now[low] << 16 | self._words[self._position : end]
        self._position = end
        return symbols


def _write_states(state: Integers) -> bytes:
    """Return each state as four bits for its length and the bits below its first: half a byte is lost, not a whole."""
    writer = BitWriter()
    for value in state.tolist():
        length = value.bit_length()
        writer.write(length - _LOW.bit_length(), 4)
        writer.write(value - (1 << length - 1), length - 1)
    return writer.bytes()


def _read_states(reader: ByteReader, lanes: int) -> Integers:
    bits = BitReader(reader)
    state = np.zeros(lanes, dtype=np.int64)
    for lane in range(lanes):
        below = bits.read(4) + _LOW.bit_length() - 1
        state[lane] = 1 << below | bits.read(below)
    return state
