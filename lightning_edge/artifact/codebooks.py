"""The values that a tensor's codes stand for, as bytes and back: consecutive numbers, float16, or as they are."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_edge.functional.bytestream import ByteReader, varint
from lightning_edge.functional.rans import MAX_ALPHABET

AS_THEY_ARE, AS_HALF, CONSECUTIVE = range(3)
BFLOAT16 = 16
Codes = NDArray[np.int64]


def find_codebook(flat: NDArray[Any], dtype: int) -> tuple[NDArray[Any], Codes, int] | None:
    """Return the values in ascending order, the code of every element, and the code nearest to zero.

    None where nearly every element has a value of its own. Whole numbers that nearly follow each other get the missing
    ones too: a first value and a number then say it all.

    >>> find_codebook(np.array([4.0, 0.0, 4.0, -4.0, 0.0, 4.0], np.float32), 1)
    (array([-4.,  0.,  4.], dtype=float32), array([2, 1, 2, 0, 1, 2]), 1)
    """
    values, codes = np.unique(bits_of(flat), return_inverse=True)
    if not 1 < len(values) <= min(MAX_ALPHABET, len(flat) // 2):
        return None
    order = np.lexsort([values, _numbers(values.view(flat.dtype), dtype)])
    codebook, codes = values[order].view(flat.dtype), np.argsort(order)[codes.reshape(-1)]
    first, last = (int(value) for value in codebook[[0, -1]]) if codebook.dtype.kind in "iu" else (0, 0)
    ascending = bool((codebook[1:] > codebook[:-1]).all())  # as bits, which those of bfloat16 need not be
    if ascending and len(codebook) < last - first + 1 <= min(3 * len(codebook) // 2, MAX_ALPHABET):
        codes = np.array([int(value) - first for value in codebook])[codes]
        codebook = codebook[:1] + np.arange(last - first + 1).astype(codebook.dtype)
    distance = np.abs(_numbers(codebook, dtype))
    return codebook, codes, int(np.where(np.isnan(distance), np.inf, distance).argmin())


def _numbers(values: NDArray[Any], dtype: int) -> NDArray[np.float64]:
    """Return what the elements stand for."""
    if dtype == BFLOAT16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # NaNs that signal
        return values.astype(np.float64)


def split_codebook(values: NDArray[Any]) -> tuple[bytes, bytes]:
    """Return what says how many values there are and how they are stored, and the values themselves."""
    if values.dtype.kind in "iu" and _are_consecutive(values):
        return varint(len(values)) + bytes([CONSECUTIVE]) + values[:1].tobytes(), b""
    if values.dtype == np.float32 and is_half(values):
        return varint(len(values)) + bytes([AS_HALF]), values.astype("<f2").tobytes()
    return varint(len(values)) + bytes([AS_THEY_ARE]), values.tobytes()


def _are_consecutive(values: NDArray[Any]) -> bool:
    ascending = bool((values[1:] > values[:-1]).all())  # those of blocks are in no order
    return ascending and int(values[-1]) - int(values[0]) == len(values) - 1


def read_codebook(reader: ByteReader, dtype: np.dtype[Any], *, values: int = MAX_ALPHABET) -> NDArray[Any]:
    """Return a codebook of at most so many ``values``.

    Raises:
        EdgeFormatError: If the bytes are none.

    >>> read_codebook(ByteReader(b"".join(split_codebook(np.array([3, 4, 5], np.int8)))), np.dtype("i1"))
    array([3, 4, 5], dtype=int8)
    """
    return codebook_values(reader, *codebook_head(reader, dtype, values=values), dtype)


def codebook_head(reader: ByteReader, dtype: np.dtype[Any], *, values: int = MAX_ALPHABET) -> tuple[int, int]:
    """Return how many values follow, and how they are stored."""
    size, width = reader.varint(limit=values), reader.byte()
    known = width == AS_THEY_ARE or (width == AS_HALF and dtype == np.float32)
    if size == 0 or not (known or (width == CONSECUTIVE and dtype.kind in "iu")):
        raise reader.error(f"a codebook must have values of {dtype}, got {size} of width {width}")
    return size, width


def codebook_values(reader: ByteReader, size: int, width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the values that follow."""
    if width == AS_HALF:
        return from_half(reader, size, dtype)
    if width == AS_THEY_ARE:
        return np.frombuffer(reader.take(size * dtype.itemsize), dtype)
    values: NDArray[Any] = np.frombuffer(reader.take(dtype.itemsize), dtype) + np.arange(size).astype(dtype)
    return values  # which wrap around where the file is damaged


def from_half(reader: ByteReader, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return float32 elements that are stored as float16."""
    if dtype != np.float32:
        raise reader.error(f"only float32 elements can be stored as float16, got {dtype}")
    halves = np.frombuffer(reader.take(2 * count), "<f2")
    if bool(np.isnan(halves).any()):  # whose bits as a float32 depend on the processor
        raise reader.error("float16 must be numbers to stand for float32, got one that is not")
    return halves.astype(dtype)


def is_half(values: NDArray[Any]) -> bool:
    """Whether float16 holds every value exactly; not numbers keep their bits only in full."""
    with np.errstate(over="ignore"):
        back = values.astype("<f2").astype("<f4")
    return bool((bits_of(back) == bits_of(values)).all()) and not bool(np.isnan(values).any())


def bits_of(flat: NDArray[Any]) -> NDArray[Any]:
    """The elements as unsigned integers: -0.0 is not 0.0, and every NaN is equal to itself."""
    return np.ascontiguousarray(flat).view(f"u{flat.itemsize}")
