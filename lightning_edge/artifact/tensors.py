"""One tensor as bytes and back, bit by bit: the smallest of several codecs.

A record is: element type: u8 (ONNX's), number of dimensions: varint, each: varint, codec: u8, size: varint, payload.

    constant  the one element
    raw       the elements
    zstd      the elements, compressed
    half      float32 elements that are all float16 numbers, as float16
    dense     codebook, then one code per element
    sparse    codebook of what is not zero; the zeros before each such element as gaps; one code per such element

A codebook is: values: varint, width: u8 (0 as they are, 1 float32 as float16), the values in ascending order of their
bits. A gap of g zeros is g // e times the symbol e, then g % e, where e, the escape, is a byte of the payload; zeros at
the end are not coded.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from lightning_edge.artifact.format import MAX_BYTES
from lightning_edge.functional.bytestream import ByteReader, varint
from lightning_edge.functional.coding import decode_symbols, encode_symbols, entropy_bits, estimate
from lightning_edge.functional.rans import MAX_ALPHABET

BFLOAT16 = 16
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
CODECS = ("constant", "raw", "zstd", "half", "dense", "sparse")
_ESCAPES = (14, 30, 62, 126, 254)
_MAX_DIMENSIONS = 64  # numpy has no more
_ZSTD_WINDOW = 1 << 23  # what level 19 uses
Bits = NDArray[Any]


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


def encode_tensor(array: NDArray[Any], dtype: int) -> tuple[bytes, str]:
    """Return the record of a tensor and the codec that was smallest.

    Args:
        array: Of the type that ``DTYPES`` has for ``dtype``.
        dtype: Element type of ONNX's TensorProto.

    >>> encode_tensor(np.zeros((3, 4), np.float32), 1)[1]
    'constant'
    """
    flat = np.ascontiguousarray(array, dtype=DTYPES[dtype]).reshape(-1)
    codec, payload = min(_candidates(flat), key=lambda pair: len(pair[1]))
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
    elif record.codec == "zstd":
        flat = _inflate(reader, count, dtype)
    elif record.codec == "half":
        flat = _from_half(reader, count, dtype)
    elif record.codec == "dense":
        codebook = _read_codebook(reader, dtype)
        flat = codebook[decode_symbols(reader, count, len(codebook))]
    else:
        flat = _decode_sparse(reader, count, dtype)
    reader.end()
    return np.require(flat.reshape(record.shape), requirements="W")  # a view of the file cannot be written to


def order0_bits(array: NDArray[Any]) -> float:
    """Return the order-0 entropy of the elements, in bits per element.

    >>> order0_bits(np.array([0.0, 1.0, 0.0, 1.0]))
    1.0
    """
    return entropy_bits(np.unique(_bits(array.reshape(-1)), return_counts=True)[1])


def _candidates(flat: NDArray[Any]) -> list[tuple[str, bytes]]:
    raw = flat.tobytes()
    bits = _bits(flat)
    if len(bits) and bool((bits == bits[0]).all()):
        return [("constant", raw[: flat.itemsize])]
    found = [("raw", raw)]
    if len(raw) > 64:
        found.append(("zstd", zstandard.ZstdCompressor(level=19, write_content_size=False).compress(raw)))
    if flat.dtype == np.float32 and _is_half(flat):
        found.append(("half", flat.astype("<f2").tobytes()))
    values, codes, counts = np.unique(bits, return_inverse=True, return_counts=True)
    if 1 < len(values) <= min(MAX_ALPHABET, len(bits) // 2):
        codebook = values.view(flat.dtype)
        found.append(("dense", _write_codebook(codebook) + encode_symbols(codes, len(values))))
        if values[0] == 0 and 4 * counts[0] > len(bits):
            found.append(("sparse", _encode_sparse(codes, codebook)))
    return found


def _encode_sparse(codes: NDArray[np.int64], codebook: NDArray[Any]) -> bytes:
    places = np.flatnonzero(codes)
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
    values = encode_symbols(codes[places] - 1, len(codebook) - 1)
    head = varint(len(places)) + bytes([escape]) + varint(len(symbols)) + varint(len(coded))
    return _write_codebook(codebook[1:]) + head + coded + values


def _decode_sparse(reader: ByteReader, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    codebook = _read_codebook(reader, dtype)
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


def _write_codebook(values: NDArray[Any]) -> bytes:
    if values.dtype == np.float32 and _is_half(values):
        return varint(len(values)) + b"\1" + values.astype("<f2").tobytes()
    return varint(len(values)) + b"\0" + values.tobytes()


def _read_codebook(reader: ByteReader, dtype: np.dtype[Any]) -> NDArray[Any]:
    size, width = reader.varint(limit=MAX_ALPHABET), reader.byte()
    if size == 0 or width > (1 if dtype == np.float32 else 0):
        raise reader.error(f"a codebook must have values of {dtype}, got {size} of width {width}")
    if width:
        return _from_half(reader, size, dtype)
    return np.frombuffer(reader.take(size * dtype.itemsize), dtype)


def _from_half(reader: ByteReader, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype != np.float32:
        raise reader.error(f"only float32 elements can be stored as float16, got {dtype}")
    return np.frombuffer(reader.take(2 * count), "<f2").astype(dtype)


def _inflate(reader: ByteReader, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    size = count * dtype.itemsize
    data = inflate(reader, limit=size)
    if len(data) != size:
        raise reader.error(f"{size} bytes must come out of zstd, got {len(data)}")
    return np.frombuffer(data, dtype)


def inflate(reader: ByteReader, *, limit: int) -> bytes:
    """Return what the rest of ``reader`` holds compressed by zstd, at most ``limit`` bytes.

    Raises:
        EdgeFormatError: If it is damaged, or more than ``limit``.

    >>> inflate(ByteReader(zstandard.compress(b"abc")), limit=3)
    b'abc'
    """
    error = reader.error
    stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
    parts, size = [], 0
    step = min(max(limit >> 16, 16), 1024)  # up to 32 KB come out of a byte: half the limit, or 512 KB, too much
    while reader.left and not stream.eof:
        try:
            parts.append(stream.decompress(reader.take(min(reader.left, step))))
        except zstandard.ZstdError as failure:
            raise error(f"zstd cannot read its stream: {failure}") from failure
        size += len(parts[-1])
        if size > limit:
            raise error(f"at most {limit:,} bytes must come out of zstd, got more")
    if reader.left or stream.unused_data or not stream.eof:
        raise error("zstd's stream must end where its bytes end, got another end")
    return b"".join(parts)


def _is_half(values: NDArray[Any]) -> bool:
    """Whether float16 holds every value exactly; not numbers keep their bits only in full."""
    with np.errstate(over="ignore"):
        back = values.astype("<f2").astype("<f4")
    return bool((_bits(back) == _bits(values)).all()) and not bool(np.isnan(values).any())


def _bits(flat: NDArray[Any]) -> Bits:
    """The elements as unsigned integers: -0.0 is not 0.0, and every NaN is equal to itself."""
    return np.ascontiguousarray(flat).view(f"u{flat.itemsize}")
