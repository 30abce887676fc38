"""Codes of a weight tensor as bytes, each coded under the context that its neighbours give it.

Two passes where zeros are many: first which codes are zero, then the others, whose contexts know both. Large alphabets
are split: the upper bits of a code are coded, the lower ones, which no context foretells, follow as they are.

The bytes: what is expected and how contexts are made, the number of states, other bytes that did not fit into the
states, the lower bits, the states, and the stream; `artifact/FORMAT.md` has the details.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from lightning_edge.functional.adaptive import AdaptiveTables, Decoder, Encoder
from lightning_edge.functional.bytestream import ByteReader, varint
from lightning_edge.functional.contexts import (
    DIRECTIONS,
    ENERGY_WEIGHTS,
    MAX_LEVEL,
    MEAN_UNIT,
    Contexts,
    Geometry,
    Neighbourhood,
)

Integers = NDArray[np.int64]
MAX_SYMBOLS = 256  # of a pass: a larger alphabet is split
MAX_LANES = 1 << 10
_MAX_COLUMNS = 1 << 20
_MAX_CLASSES = 64
_STEPS_PER_BYTE = 6  # a step is some operations of numpy: all tensors of a file may ask for so many of them


@dataclass(frozen=True)
class Pass:
    """One pass over the columns: the mean magnitude that is expected, and how contexts are made."""

    mean: int
    contexts: Contexts


@dataclass(frozen=True)
class Plan:
    """How a tensor is coded.

    Args:
        geometry: What its columns are.
        zero: The code that stands for zero, or for what is nearest to it.
        shift: Lower bits of a code that are left as they are.
        mask: The pass over what is zero and what not; None: zero is a code as any other.
        values: The pass over the codes, or those that are not zero.
    """

    geometry: Geometry
    zero: int
    shift: int
    mask: Pass | None
    values: Pass

    def symbols(self, alphabet: int) -> int:
        """Return the number of symbols of the pass over the values."""
        return (alphabet - (self.mask is not None) - 1 >> self.shift) + 1

    def levels(self, alphabet: int) -> Integers:
        """Return the signed level of every symbol of the pass over the values."""
        symbols, middle = np.arange(self.symbols(alphabet)), self.zero >> self.shift
        return symbols - middle + (0 if self.mask is None else symbols >= middle)


def encode_with(plan: Plan, codes: Integers, alphabet: int, *, riders: bytes, lanes: int) -> bytes:
    """Return codes, shape (rows, columns), as bytes; ``riders`` are other bytes that :func:`context_decode` gives back.

    Args:
        plan: How to code them; see :mod:`lightning_edge.functional.context_planning`.
        codes: Numbers in [0, alphabet), in ascending order of what they stand for.
        alphabet: Number of codes, at least 2.
        riders: Other bytes; two per lane cost nothing.
        lanes: Number of states, a power of two.
    """
    columns = np.ascontiguousarray(codes.T)
    encoder = Encoder(lanes)
    live = np.ones(columns.shape, dtype=bool)
    if plan.mask is not None:
        live = columns != plan.zero
        mask = live.astype(np.int64)
        _walk(
            plan.mask,
            plan.geometry,
            columns.shape,
            np.arange(2),
            None,
            lambda table, contexts, column: encoder.put(table, contexts, mask[column]),
        )
    whole = columns - (columns > plan.zero) if plan.mask is not None else columns
    upper = whole >> plan.shift
    _walk(
        plan.values,
        plan.geometry,
        columns.shape,
        plan.levels(alphabet),
        _unless_all(plan, live),
        lambda table, contexts, column: encoder.put(table, contexts, upper[column][live[column]]),
    )
    low = whole[live] & (1 << plan.shift) - 1
    head = _write_plan(plan) + bytes([lanes.bit_length() - 1]) + riders[2 * lanes :]
    return head + _pack_bits(low, plan.shift) + encoder.bytes(riders[: 2 * lanes])


def context_decode(reader: ByteReader, shape: tuple[int, ...], alphabet: int, *, riders: int) -> tuple[Integers, bytes]:
    """Return the codes, flat, and the ``riders`` other bytes, from all that is left of ``reader``.

    Args:
        reader: Where the bytes come from.
        shape: Of the tensor, output channels first, not empty.
        alphabet: Number of codes.
        riders: How many other bytes were given to the encoder.

    Raises:
        EdgeFormatError: If the bytes are no such stream, or ask for more work than their number allows.
    """
    rows, count, size = shape[0], prod(shape[1:]), reader.left
    plan, lanes = read_head(reader, count, alphabet)
    if steps((count, rows), lanes, plan) > steps_allowed(size):
        raise reader.error(f"{size} bytes must not take more than {steps_allowed(size)} steps, got {rows} x {count}")
    plain = bytes(reader.take(max(0, riders - 2 * lanes)))
    lower = ByteReader(reader.take(reader.varint(limit=rows * count)), offset=reader.offset) if plan.shift else None
    decoder = Decoder(reader, lanes)

    def take(table: Integers, contexts: Integers, _: int) -> Integers:
        return decoder.take(table, contexts)

    live = np.ones((count, rows), dtype=bool)
    if plan.mask is not None:
        live = _walk(plan.mask, plan.geometry, live.shape, np.arange(2), None, take).astype(bool)
    upper = _walk(plan.values, plan.geometry, live.shape, plan.levels(alphabet), _unless_all(plan, live), take)
    carried = decoder.end()
    codes = upper << plan.shift
    if lower is not None:
        codes[live] |= _unpack_bits(lower, int(live.sum()), plan.shift)
    if plan.mask is not None:
        codes += codes >= plan.zero
        codes[~live] = plan.zero
    if int(codes.max()) >= alphabet:
        raise reader.error(f"a code must lie below {alphabet}, got {int(codes.max())}")
    return np.ascontiguousarray(codes.T).reshape(-1), carried[:riders] + plain


def read_head(reader: ByteReader, columns: int, alphabet: int) -> tuple[Plan, int]:
    """Return the plan that coded bytes begin with, and the number of states.

    Raises:
        EdgeFormatError: If the bytes say none.
    """
    plan = _read_plan(reader, columns, alphabet)
    exponent = reader.byte()
    if 1 << exponent > MAX_LANES:
        raise reader.error(f"there must be at most {MAX_LANES} states, got 2**{exponent}")
    return plan, 1 << exponent


def steps(columns: tuple[int, int], lanes: int, plan: Plan) -> int:
    """Return how many times the states are stepped, for a tensor of (columns, rows).

    >>> some = Pass(64, Contexts(0, 0, 1, 1, 1))
    >>> steps((10, 64), 32, Plan((10, 1, 1), 0, 0, some, some))
    40
    """
    count, rows = columns
    return count * -(-rows // lanes) * (1 if plan.mask is None else 2)


def steps_allowed(size: int) -> int:
    """Return how many steps bytes of this number may ask for, so that a small file cannot keep a reader busy for long.

    >>> steps_allowed(100)
    600
    """
    return _STEPS_PER_BYTE * size


def _walk(
    walked: Pass,
    geometry: Geometry,
    size: tuple[int, int],
    levels: Integers,
    live: NDArray[np.bool_] | None,
    code: Callable[[Integers, Integers, int], Integers],
) -> Integers:
    """Go over the columns with a model that adapts; ``code`` gives the symbols of a column for tables and contexts.

    Args:
        walked: How contexts are made.
        geometry: What the columns are.
        size: Columns and rows.
        levels: The level of every symbol.
        live: Which elements have a symbol, shape (columns, rows); None: all. The others have level 0.
        code: Encodes or decodes the symbols of a column.

    Returns:
        The symbols, shape (columns, rows); 0 where there is none.
    """
    columns, rows = size
    seen = Neighbourhood(rows, geometry, mean=walked.mean)
    tables = AdaptiveTables(walked.contexts.count, len(levels))
    found = np.zeros(size, dtype=np.int64)
    for column in range(columns):
        contexts = walked.contexts.of(seen, mean=walked.mean)
        if live is None:
            found[column] = symbols = code(tables.refreshed(), contexts, column)
            tables.count(contexts, symbols)
            seen.put(levels[symbols])
            continue
        places = np.flatnonzero(live[column])
        level = np.zeros(rows, dtype=np.int64)
        if places.size:
            contexts = contexts[places]
            found[column, places] = symbols = code(tables.refreshed(), contexts, column)
            tables.count(contexts, symbols)
            level[places] = levels[symbols]
        seen.put(level)
    return found


def _unless_all(plan: Plan, live: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    return live if plan.mask is not None else None


def _write_plan(plan: Plan) -> bytes:
    flags = (plan.mask is not None) | plan.shift << 1
    head = bytes([flags]) + varint(plan.geometry[1]) + varint(plan.geometry[2]) + varint(plan.zero)
    return head + b"".join(_write_pass(part) for part in (plan.mask, plan.values) if part is not None)


def _write_pass(part: Pass) -> bytes:
    made = part.contexts
    head = bytes([made.weighting << 4 | made.directions, made.energies])
    return head + varint(part.mean) + varint(made.base) + varint(made.step)


def _read_plan(reader: ByteReader, columns: int, alphabet: int) -> Plan:
    flags, height, width = reader.byte(), reader.varint(limit=columns), reader.varint(limit=columns)
    zero = reader.varint(limit=alphabet - 1)
    if flags > 15 or height * width == 0 or columns % (height * width) or columns > _MAX_COLUMNS:
        raise reader.error(f"planes of {height} x {width} must fill {columns} columns, flags be below 16, got {flags}")
    mask = _read_pass(reader, directions=(0,)) if flags & 1 else None
    values = _read_pass(reader, directions=tuple(DIRECTIONS))
    plan = Plan((columns // (height * width), height, width), zero, flags >> 1, mask, values)
    if not 1 <= plan.symbols(alphabet) <= MAX_SYMBOLS:
        raise reader.error(f"a pass must have 1 to {MAX_SYMBOLS} symbols, got {plan.symbols(alphabet)}")
    return plan


def _read_pass(reader: ByteReader, *, directions: tuple[int, ...]) -> Pass:
    kind, energies = reader.byte(), reader.byte()
    mean = reader.varint(limit=MEAN_UNIT * MAX_LEVEL)
    base, step = reader.varint(limit=1 << 16), reader.varint(limit=1 << 16)
    known = kind >> 4 < len(ENERGY_WEIGHTS) and kind & 15 in directions
    if not known or not 1 <= energies <= _MAX_CLASSES or mean == 0 or step == 0:
        raise reader.error("contexts must be of a known kind with a mean and a step, got others")
    return Pass(mean, Contexts(kind >> 4, base, step, energies, kind & 15))


def _pack_bits(low: Integers, width: int) -> bytes:
    """Return the size of the lower bits and their bytes; nothing where there are none."""
    if not width:
        return b""
    bits = low[:, None] >> np.arange(width - 1, -1, -1) & 1
    data = np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()
    return varint(len(data)) + data


def _unpack_bits(reader: ByteReader, count: int, width: int) -> Integers:
    data = np.frombuffer(reader.take((count * width + 7) // 8), dtype=np.uint8)
    reader.end()
    bits = np.unpackbits(data)[: count * width].reshape(count, width).astype(np.int64)
    return bits @ (1 << np.arange(width - 1, -1, -1))
