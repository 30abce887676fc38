"""Which contexts code a weight tensor best: every choice is priced by the code length that its counts come to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_edge.functional.adaptive import FIRST_COUNT, INCREMENT
from lightning_edge.functional.context_coding import (
    MAX_LANES,
    MAX_SYMBOLS,
    Pass,
    Plan,
    encode_with,
    steps,
    steps_allowed,
)
from lightning_edge.functional.contexts import (
    ENERGY_WEIGHTS,
    Contexts,
    Geometry,
    Neighbourhood,
    direction_class,
    geometries,
    mean_level,
    weigh,
)

Integers = NDArray[np.int64]
MAX_CONTEXT_ALPHABET = 1 << 12
_BYTES_PER_LANE = 400  # a state costs two bytes more than it carries: half a percent
_MAX_COLUMNS = 1 << 16
_VALUE_CLASSES = ((1, 1), (2, 1), (3, 1), (1, 3), (2, 3), (3, 3), (3, 5), (5, 5), (5, 7), (8, 7))
_MASK_CLASSES = (1, 2, 3, 5, 8, 12, 20)
_ALPHA = FIRST_COUNT / INCREMENT  # of an occurrence, before any
_HEAD_BYTES = 16


@dataclass(frozen=True)
class _Seen:
    """What every column's neighbourhood says, shapes (columns, rows), and (columns,) for the last energy."""

    mean: int
    energies: tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int16]]
    directions: NDArray[np.int32]
    touching: NDArray[np.int8]

    def contexts(self, weighting: int, energies: int, directions: int) -> tuple[Contexts, Integers]:
        """Return contexts whose classes of energy are spread over what there is, and those of all elements."""
        row, kernel, column = (part.astype(np.int64) for part in self.energies)
        weighted = weigh((row, kernel, column[:, None]), weighting)
        low, high = np.quantile(weighted, (0.02, 0.98))
        made = Contexts(weighting, int(low), max(1, round((high - low) / energies)), energies, directions)
        if directions == 0:
            return made, made.combine(weighted, self.touching.astype(np.int64))
        return made, made.combine(
            weighted, direction_class(self.directions.astype(np.int64), directions, mean=self.mean)
        )


def context_encode(codes: Integers, shape: tuple[int, ...], alphabet: int, *, zero: int, riders: bytes) -> bytes | None:
    """Return the codes of a tensor as bytes, each coded under the best contexts found; None where that is not for them.

    Args:
        codes: Numbers in [0, alphabet), in ascending order of what they stand for, flat.
        shape: Of the tensor, output channels first.
        alphabet: Number of codes; known to the decoder.
        zero: The code of zero, or of what is nearest to it.
        riders: Other bytes, which the decoder gives back; two per state cost nothing.

    >>> from lightning_edge.functional.bytestream import ByteReader
    >>> from lightning_edge.functional.context_coding import context_decode
    >>> coded = context_encode(np.arange(64) % 3, (8, 8), 3, zero=1, riders=b"ab")
    >>> context_decode(ByteReader(coded), (8, 8), 3, riders=2)[1]
    b'ab'
    """
    if len(shape) < 2 or not codes.size or not 1 < alphabet <= MAX_CONTEXT_ALPHABET or prod(shape[1:]) > _MAX_COLUMNS:
        return None
    rows = codes.reshape(shape[0], -1)
    size, plan = min(_plans(rows, shape, alphabet, zero), key=lambda pair: pair[0])
    lanes = _lanes(shape[0], size, len(riders))
    while steps(rows.T.shape, lanes, plan) > steps_allowed(int(size)) and 2 * lanes <= min(shape[0], MAX_LANES):
        lanes *= 2
    coded = encode_with(plan, rows, alphabet, riders=riders, lanes=lanes)
    return coded if steps(rows.T.shape, lanes, plan) <= steps_allowed(len(coded)) else None


def _lanes(rows: int, size: float, riders: int) -> int:
    """Return as many states as rows can use and riders or the size of the stream pay for."""
    lanes = 1
    while 2 * lanes <= min(rows, MAX_LANES) and (4 * lanes <= riders or 2 * lanes * _BYTES_PER_LANE <= size):
        lanes *= 2
    return lanes


def _plans(rows: Integers, shape: tuple[int, ...], alphabet: int, zero: int) -> Iterator[tuple[float, Plan]]:
    """Yield the best plan of every geometry, with zeros first and without, and its bytes."""
    live = rows != zero
    zeros = rows.size - int(live.sum())
    for geometry in geometries(shape):
        if 20 * zeros < 19 * rows.size or not live.any():  # nearly all zeros are always coded first
            yield _plan(rows, live, geometry, alphabet, zero, masked=False)
        if 20 * zeros > rows.size and alphabet > 1 and live.any():
            yield _plan(rows, live, geometry, alphabet, zero, masked=True)


def _plan(
    rows: Integers, live: NDArray[np.bool_], geometry: Geometry, alphabet: int, zero: int, *, masked: bool
) -> tuple[float, Plan]:
    size, mask = float(_HEAD_BYTES), None
    if masked:
        bits = live.astype(np.int64)
        cost, mask = _best(bits, bits, None, 2, geometry, ((classes, 0) for classes in _MASK_CLASSES))
        size += cost
    whole = rows - (rows > zero) if masked else rows
    best: tuple[float, Plan] | None = None
    for shift in _shifts(alphabet - masked):
        draft = Plan(geometry, zero, shift, mask, Pass(1, Contexts(0, 0, 1, 1, 1)))
        upper = np.where(live, whole, 0) >> shift if masked else whole >> shift
        levels = np.where(live, draft.levels(alphabet)[upper], 0) if masked else draft.levels(alphabet)[upper]
        symbols = draft.symbols(alphabet)
        cost, values = _best(upper, levels, live if masked else None, symbols, geometry, _VALUE_CLASSES)
        cost += shift * (int(live.sum()) if masked else rows.size) / 8
        if best is None or size + cost < best[0]:
            best = size + cost, Plan(geometry, zero, shift, mask, values)
    assert best is not None
    return best


def _shifts(alphabet: int) -> Iterable[int]:
    """Return how many lower bits are worth trying: none of a small alphabet, some of a large one."""
    least = max(0, (alphabet - 1).bit_length() - (MAX_SYMBOLS.bit_length() - 1))
    return [least] if alphabet <= 40 else range(least, max(least, (alphabet - 1).bit_length() - 3))


def _best(
    symbols: Integers,
    levels: Integers,
    live: NDArray[np.bool_] | None,
    alphabet: int,
    geometry: Geometry,
    classes: Iterable[tuple[int, int]],
) -> tuple[float, Pass]:
    """Return the bytes of the cheapest contexts of a pass, and the pass."""
    seen = _look(levels, geometry)
    where = None if live is None else live.T
    coded = symbols.T if where is None else symbols.T[where]
    best: tuple[float, Pass] | None = None
    for energies, directions in classes:
        for weighting in range(len(ENERGY_WEIGHTS)) if directions == 0 and energies > 1 else (0,):
            made, contexts = seen.contexts(weighting, energies, directions)
            chosen = contexts if where is None else contexts[where]
            cost = _adaptive_bytes(chosen.reshape(-1), coded.reshape(-1), made.count, alphabet)
            if best is None or cost < best[0]:
                best = cost, Pass(seen.mean, made)
    assert best is not None
    return best


def _look(levels: Integers, geometry: Geometry) -> _Seen:
    """Walk over the columns as a decoder does, and note what each sees."""
    rows, columns = levels.shape
    mean = mean_level(levels)
    seen = Neighbourhood(rows, geometry, mean=mean)
    row, kernel = np.zeros((2, columns, rows), dtype=np.int16)
    everywhere = np.zeros(columns, dtype=np.int16)
    directions = np.zeros((columns, rows), dtype=np.int32)
    touching = np.zeros((columns, rows), dtype=np.int8)
    for column in range(columns):
        row[column], kernel[column], everywhere[column] = seen.energies()
        directions[column], touching[column] = seen.directions(), seen.touching()
        seen.put(levels[:, column])
    return _Seen(mean, (row, kernel, everywhere), directions, touching)


def _adaptive_bytes(contexts: Integers, symbols: Integers, count: int, alphabet: int) -> float:
    """Return the bytes of symbols coded one after the other by the counts of their context (Krichevsky-Trofimov)."""
    seen = np.bincount(contexts * alphabet + symbols, minlength=count * alphabet).reshape(count, alphabet)
    occurrences = _log2_gamma(seen + _ALPHA).sum() - seen.size * _log2_gamma(np.array([_ALPHA]))[0]
    totals = _log2_gamma(seen.sum(1) + alphabet * _ALPHA) - _log2_gamma(np.array([alphabet * _ALPHA]))[0]
    return float(totals.sum() - occurrences) / 8


def _log2_gamma(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return log2 of the gamma function of positive numbers, by Stirling's series from 8 up."""
    above = values + 8
    series = (above - 0.5) * np.log(above) - above + 0.5 * np.log(2 * np.pi) + 1 / (12 * above) - 1 / (360 * above**3)
    below = sum(np.log(values + offset) for offset in range(8))
    shifted: NDArray[np.float64] = (series - below) / np.log(2)
    return shifted
