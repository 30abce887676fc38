"""One tensor as bytes and back, bit by bit: the smallest of several codecs. `FORMAT.md` says what the bytes mean."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_edge.artifact.codebooks import (
    AS_HALF,
    BFLOAT16,
    CONSECUTIVE,
    bits_of,
    codebook_head,
    codebook_values,
    find_codebook,
    from_half,
    is_half,
    read_codebook,
    split_codebook,
)
from lightning_edge.artifact.format import MAX_BYTES
from lightning_edge.functional.bytestream import ByteReader, varint
from lightning_edge.functional.coding import decode_symbols, encode_symbols, entropy_bits, estimate
from lightning_edge.functional.context_coding import context_decode
from lightning_edge.functional.context_planning import MAX_CONTEXT_ALPHABET, context_encode
from lightning_edge.functional.rans import MAX_ALPHABET

DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    3: np.dtype("i1"),
    4: np.dtype("<u2"),
    5: np.dtype("<i2"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
    9: np.dtype("?"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
    12: np.dtype("<u4"),
    13: np.dtype("<u8"),
    BFLOAT16: np.dtype("<u2"),  # numpy has no bfloat16: its bits
}
CODECS = ("constant", "raw", "half", "planes", "dense", "sparse", "blocks", "context")
_BLOCKS = (2, 4)
_ESCAPES = (14, 30, 62, 126, 254)
_MAX_DIMENSIONS = 64  # numpy has no more


@dataclass(frozen=True)
class PackedTensor:
    """What a record says of its tensor, without expanding it; ``size`` is that of the whole record, in bytes."""

    dtype: int
    shape: tuple[int, ...]
    codec: str
    size: int
    payload: ByteReader

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def encode_tensor(array: NDArray[Any], dtype: int, *, adaptive: bool = True) -> tuple[bytes, str]:
    """Return the record of a tensor and the codec that was smallest.

    Args:
        array: Of the type that ``DTYPES`` has for ``dtype``.
        dtype: Element type of ONNX's TensorProto.
        adaptive: Also try codes under adaptive contexts, which are smaller and slower to read.

    >>> encode_tensor(np.zeros((3, 4), np.float32), 1)[1]
    'constant'
    """
    flat = np.ascontiguousarray(array, dtype=DTYPES[dtype]).reshape(-1)
    codec, payload = min(_candidates(flat, array.shape, dtype, adaptive), key=lambda pair: len(pair[1]))
    shape = varint(array.ndim) + b"".join(varint(size) for size in array.shape)
    return bytes([dtype]) + shape + bytes([CODECS.index(codec)]) + varint(len(payload)) + payload, codec


def read_record(reader: ByteReader, *, limit: int = MAX_BYTES) -> PackedTensor:
    """Return the next record of a section, its sizes checked against ``limit``, its payload not yet expanded.

    Raises:
        EdgeFormatError: If type or codec are unknown, or a size is too large.

    >>> read_record(ByteReader(encode_tensor(np.ones(5, np.int8), 3)[0])).shape
    (5,)
    """
    start = reader.offset
    dtype = reader.byte()
    if dtype not in DTYPES:
        raise reader.error(f"element type {dtype} is unknown: the file may be of a later version")
    itemsize = DTYPES[dtype].itemsize
    shape = tuple(reader.varint(limit=limit) for _ in range(reader.varint(limit=_MAX_DIMENSIONS)))
    if prod(max(size, 1) for size in shape) * itemsize > limit:  # numpy refuses large sizes beside a zero too
        raise reader.error(f"tensors must expand to at most {limit:,} bytes, got shape {shape}")
    codec = reader.byte()
    if codec >= len(CODECS):
        raise reader.error(f"codec {codec} is unknown: the file may be of a later version")
    payload = reader.sub(reader.varint(limit=limit))
    return PackedTensor(dtype, shape, CODECS[codec], reader.offset - start, payload)


def decode_tensor(record: PackedTensor) -> NDArray[Any]:
    """Return the tensor of a record, bit by bit what was encoded.

    Raises:
        EdgeFormatError: If the payload is damaged.

    >>> decode_tensor(read_record(ByteReader(encode_tensor(np.arange(6).reshape(2, 3), 7)[0])))
    array([[0, 1, 2],
           [3, 4, 5]])
    """
    dtype, count, reader = DTYPES[record.dtype], record.elements, record.payload
    if record.codec == "constant":
        flat = np.repeat(np.frombuffer(reader.take(dtype.itemsize), dtype), count)
    elif record.codec == "raw":
        flat = np.frombuffer(reader.take(count * dtype.itemsize), dtype)
    elif record.codec == "half":
        flat = from_half(reader, count, dtype)
    elif record.codec == "planes":
        flat = _decode_planes(reader, count, dtype)
    elif record.codec == "dense":
        codebook = read_codebook(reader, dtype)
        flat = codebook[decode_symbols(reader, count, len(codebook))]
    elif record.codec == "sparse":
        flat = _decode_sparse(reader, count, dtype)
    elif record.codec == "blocks":
        flat = _decode_blocks(reader, record.shape, dtype)
    else:
        flat = _decode_contexts(reader, record.shape, dtype)
    reader.end()
    return np.require(flat.reshape(record.shape), requirements="W")  # a view of the file cannot be written to


def order0_bits(array: NDArray[Any]) -> float:
    """Return the order-0 entropy of the elements, in bits per element.

    >>> order0_bits(np.array([0.0, 1.0, 0.0, 1.0]))
    1.0
    """
    return entropy_bits(np.unique(bits_of(array.reshape(-1)), return_counts=True)[1])


def _candidates(flat: NDArray[Any], shape: tuple[int, ...], dtype: int, adaptive: bool) -> Iterator[tuple[str, bytes]]:
    bits = bits_of(flat)
    if len(bits) and bool((bits == bits[0]).all()):
        yield "constant", flat[:1].tobytes()
        return
    yield "raw", flat.tobytes()
    if flat.dtype == np.float32 and is_half(flat):
        yield "half", flat.astype("<f2").tobytes()
    if len(bits) > 64:
        yield "planes", _encode_planes(flat)
    found = find_codebook(flat, dtype)
    if found is None:
        return
    codebook, codes, zero = found
    yield "dense", b"".join(split_codebook(codebook)) + encode_symbols(codes, len(codebook))
    if codebook[zero : zero + 1].view(bits.dtype)[0] == 0 and 4 * np.count_nonzero(codes == zero) > len(bits):
        yield "sparse", _encode_sparse(codes, codebook, zero)
    for block in _BLOCKS:
        if (coded := _encode_blocks(flat, codes, shape, block)) is not None:
            yield "blocks", coded
    if adaptive and len(codebook) <= MAX_CONTEXT_ALPHABET:
        head, riders = split_codebook(codebook)
        if (coded := context_encode(codes, shape, len(codebook), zero=zero, riders=riders)) is not None:
            yield "context", head + coded


def _encode_blocks(flat: NDArray[Any], codes: NDArray[np.int64], shape: tuple[int, ...], block: int) -> bytes | None:
    """Return the tensor as codes of vectors of neighbours, if there are few different ones."""
    if shape[-1] % block:
        return None
    vectors = codes[0::block]
    for place in range(1, block):  # numbers of what has been seen so far stay small
        _, vectors = np.unique(vectors * len(codes) + codes[place::block], return_inverse=True)
    _, first, numbers = np.unique(vectors, return_index=True, return_inverse=True)
    if not 1 < len(first) <= min(MAX_ALPHABET, len(vectors) // 4):
        return None
    head, values = split_codebook(flat.reshape(-1, block)[first].reshape(-1))
    return bytes([block]) + head + values + encode_symbols(numbers, len(first))


def _decode_blocks(reader: ByteReader, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    block = reader.byte()
    if block not in _BLOCKS or not shape or shape[-1] % block:
        raise reader.error(f"blocks must have one of the sizes {_BLOCKS} and fill rows, got {block} in shape {shape}")
    codebook = read_codebook(reader, dtype, values=block * MAX_ALPHABET)
    if len(codebook) % block:
        raise reader.error(f"a codebook must hold whole blocks of {block}, got {len(codebook)} values")
    numbers = decode_symbols(reader, prod(shape) // block, len(codebook) // block)
    return codebook.reshape(-1, block)[numbers].reshape(-1)


def _encode_planes(flat: NDArray[Any]) -> bytes:
    planes = flat.view(np.uint8).reshape(len(flat), -1).T
    coded = (encode_symbols(plane.astype(np.int64), 256) for plane in planes)
    return b"".join(varint(len(part)) + part for part in coded)


def _decode_planes(reader: ByteReader, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    planes = np.empty((count, dtype.itemsize), dtype=np.uint8)
    for index in range(dtype.itemsize):
        planes[:, index] = decode_symbols(reader.sub(reader.varint(limit=MAX_BYTES)), count, 256)
    return planes.view(dtype).reshape(-1)


def _decode_contexts(reader: ByteReader, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    size, width = codebook_head(reader, dtype)
    limit = min(MAX_CONTEXT_ALPHABET, 1 << 8 * dtype.itemsize)
    if len(shape) < 2 or 0 in shape or size > limit:
        raise reader.error(f"only rows of up to {limit} values can have contexts, got {shape}, {size}")
    if width == CONSECUTIVE:
        codebook = codebook_values(reader, size, width, dtype)
        codes, _ = context_decode(reader, shape, size, riders=0)
        return codebook[codes]
    riders = size * (2 if width == AS_HALF else dtype.itemsize)
    codes, values = context_decode(reader, shape, size, riders=riders)
    return codebook_values(ByteReader(values, offset=reader.offset), size, width, dtype)[codes]


def _encode_sparse(codes: NDArray[np.int64], codebook: NDArray[Any], zero: int) -> bytes:
    places = np.flatnonzero(codes != zero)
    gaps = np.diff(places, prepend=-1) - 1
    fillers = {escape: gaps // escape for escape in _ESCAPES}
    costs = {}
    for escape, full in fillers.items():
        counts = np.bincount(gaps % escape, minlength=escape + 1)
        counts[escape] = full.sum()
        costs[escape] = estimate(counts)
    escape = min(costs, key=lambda key: costs[key])
    full = fillers[escape]
    symbols = np.full(len(gaps) + int(full.sum()), escape, dtype=np.int64)
    symbols[np.cumsum(full + 1) - 1] = gaps % escape
    coded = encode_symbols(symbols, escape + 1)
    live = codes[places]
    values = encode_symbols(live - (live > zero), len(codebook) - 1)
    head = varint(len(places)) + bytes([escape]) + varint(len(symbols)) + varint(len(coded))
    return b"".join(split_codebook(np.delete(codebook, zero))) + head + coded + values


def _decode_sparse(reader: ByteReader, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    codebook = read_codebook(reader, dtype)
    live = reader.varint(limit=count)
    escape = reader.byte()
    if escape not in _ESCAPES:
        raise reader.error(f"the escape must be one of {_ESCAPES}, got {escape}")
    symbols = decode_symbols(*_stream(reader, limit=count + count // escape), escape + 1)
    ends = np.flatnonzero(symbols != escape)
    steps = np.cumsum(symbols)[ends]  # zeros in all before each element
    if len(ends) != live or (len(symbols) and symbols[-1] == escape):
        raise reader.error(f"{live} elements must have a gap each, got {len(ends)}")
    places = steps + np.arange(live)
    if live and places[-1] >= count:
        raise reader.error(f"elements must lie below {count}, got one at {places[-1]}")
    flat = np.zeros(count, dtype)
    flat[places] = codebook[decode_symbols(reader, live, len(codebook))]
    return flat


def _stream(reader: ByteReader, *, limit: int) -> tuple[ByteReader, int]:
    count = reader.varint(limit=limit)
    return reader.sub(reader.varint(limit=MAX_BYTES)), count
