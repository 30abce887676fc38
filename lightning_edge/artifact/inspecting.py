"""What is in a packed file: its tensors, how each is coded, and where its bytes go."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from lightning_edge.artifact.codebooks import (
    AS_HALF,
    BFLOAT16,
    CONSECUTIVE,
    codebook_head,
    codebook_values,
    read_codebook,
)
from lightning_edge.artifact.format import INDEX, MAX_BYTES, TENSORS, within_memory
from lightning_edge.artifact.reading import open_file
from lightning_edge.artifact.tensors import DTYPES, PackedTensor, decode_tensor, order0_bits
from lightning_edge.functional import context_coding, rans
from lightning_edge.functional.bytestream import ByteReader
from lightning_edge.functional.coding import CODERS

_ADAPTIVE_STATE_BYTES = 2.5
"""What a state of an adaptive stream costs on average; up to two bytes of that are filled by riders."""


@dataclass(frozen=True)
class StreamInfo:
    """One stream of symbols: who codes it, in how many lanes, and what their states cost beyond what they carry."""

    coder: str
    lanes: int
    lane_bytes: float


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a packed file; ``lane_bytes``, a part of ``size_bytes``, are what the lanes' states cost."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    distinct: int
    zeros: int
    codec: str
    coder: str
    lanes: int
    lane_bytes: float
    size_bytes: int
    bits_per_weight: float
    entropy_bits: float


@dataclass(frozen=True)
class SectionInfo:
    """One section of a packed file: what it holds, where it lies, and its checksum in hexadecimal."""

    name: str
    offset: int
    size_bytes: int
    crc32: str


@dataclass(frozen=True)
class PartInfo:
    """One part of a packed file: its bytes there, and its bytes expanded."""

    name: str
    size_bytes: int
    raw_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What is in a packed file: its sections, tensors and parts, sizes in bytes; what the states of all lanes cost."""

    path: str
    size_bytes: int
    tool_version: str
    recipe_hash: str
    graph_bytes: int
    lane_bytes: float
    sections: tuple[SectionInfo, ...]
    tensors: tuple[TensorInfo, ...]
    totals: tuple[PartInfo, ...]


def inspect(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Inspection:
    """Return what is in a packed file.

    Args:
        path: The file.
        max_bytes: Most bytes that it may expand to, see :func:`~lightning_edge.artifact.reading.open_file`.

    Raises:
        FileNotFoundError: If there is no such file.
        EdgeFormatError: If it is damaged, cut short, hostile or of a later version.

    >>> import tempfile
    >>> from lightning_edge import pack
    >>> file = pack({"w": np.zeros((64, 64), np.float32)}, Path(tempfile.mkdtemp()) / "w.edge").path
    >>> [(row.name, row.size_bytes, row.raw_bytes) for row in inspect(file).totals][2]
    ('tensors', 10, 16384)
    """
    with within_memory():
        contents = open_file(path, max_bytes=max_bytes)
        rows = tuple(_tensor_info(name, record) for name, record in contents.records.items())
    sections = tuple(SectionInfo(s.name, s.offset, s.size, f"{s.crc32:08x}") for s in contents.sections)
    sizes = {section.kind: section.size for section in contents.sections}
    size = sections[-1].offset + sections[-1].size_bytes
    raw = sum(record.elements * DTYPES[record.dtype].itemsize for record in contents.records.values())
    index = len("\n".join(contents.records).encode()) + len(contents.graph)
    totals = (
        PartInfo("container", size - sizes[INDEX] - sizes[TENSORS], 0),
        PartInfo("graph and names", sizes[INDEX], index),
        PartInfo("tensors", sizes[TENSORS], raw),
        PartInfo("file", size, index + raw),
    )
    return Inspection(
        path=str(path),
        size_bytes=size,
        tool_version=contents.tool_version,
        recipe_hash=contents.recipe_hash,
        graph_bytes=sizes[INDEX],
        lane_bytes=sum((row.lane_bytes for row in rows), start=0.0),
        sections=sections,
        tensors=rows,
        totals=totals,
    )


def streams(record: PackedTensor) -> list[StreamInfo]:
    """Return the streams of symbols of a record, in their order, of which only the heads are read.

    Raises:
        EdgeFormatError: If a head is damaged.
    """
    return list(_streams(record))


def _tensor_info(name: str, record: PackedTensor) -> TensorInfo:
    offset, payload = record.payload.offset, record.payload.take(record.payload.left)
    first, second = (replace(record, payload=ByteReader(payload, offset=offset)) for _ in range(2))
    array, found = decode_tensor(first), streams(second)
    return TensorInfo(
        name=name,
        shape=record.shape,
        dtype="bfloat16" if record.dtype == BFLOAT16 else array.dtype.name,
        distinct=len(np.unique(array)),
        zeros=int(array.size - np.count_nonzero(array)),
        codec=record.codec,
        coder="+".join(dict.fromkeys(stream.coder for stream in found)),
        lanes=sum(stream.lanes for stream in found),
        lane_bytes=sum((stream.lane_bytes for stream in found), start=0.0),
        size_bytes=record.size,
        bits_per_weight=8 * record.size / max(1, array.size),
        entropy_bits=order0_bits(array),
    )


def _streams(record: PackedTensor) -> Iterator[StreamInfo]:
    dtype, count, reader = DTYPES[record.dtype], record.elements, record.payload
    if record.codec == "planes":
        for _ in range(dtype.itemsize):
            yield _symbols(reader.sub(reader.varint(limit=MAX_BYTES)), count, 256)
    elif record.codec == "dense":
        yield _symbols(reader, count, len(read_codebook(reader, dtype)))
    elif record.codec == "sparse":
        values = len(read_codebook(reader, dtype))
        live, escape, gaps = reader.varint(), reader.byte(), reader.varint()
        yield _symbols(reader.sub(reader.varint(limit=MAX_BYTES)), gaps, escape + 1)
        yield _symbols(reader, live, values)
    elif record.codec == "blocks":
        block = max(1, reader.byte())
        alphabet = len(read_codebook(reader, dtype, values=block * rans.MAX_ALPHABET)) // block
        yield _symbols(reader, count // block, alphabet)
    elif record.codec == "context":
        yield _adaptive(reader, record)


def _symbols(reader: ByteReader, count: int, alphabet: int) -> StreamInfo:
    """Return what the head of a stream of :mod:`lightning_edge.functional.coding` says."""
    kind = reader.byte()
    if kind >= len(CODERS):
        raise reader.error(f"coder {kind} is unknown: the file may be of a later version")
    if CODERS[kind] != "rans":
        return StreamInfo(CODERS[kind], 0, 0.0)
    _, _, states = rans.read_head(reader, count, alphabet)
    # Of its 32 bits a state carries as many as it has grown beyond 2**16, where the encoder began.
    carried = np.log2(np.maximum(states, 1) / (1 << 16)).sum() / 8
    return StreamInfo("rans", len(states), float(4 * len(states) - carried))


def _adaptive(reader: ByteReader, record: PackedTensor) -> StreamInfo:
    """Return what the head of a stream of :mod:`lightning_edge.functional.context_coding` says."""
    dtype = DTYPES[record.dtype]
    size, width = codebook_head(reader, dtype)
    riders = size * (2 if width == AS_HALF else dtype.itemsize)
    if width == CONSECUTIVE:
        codebook_values(reader, size, width, dtype)
        riders = 0
    _, lanes = context_coding.read_head(reader, prod(record.shape[1:]), size)
    return StreamInfo("adaptive", lanes, _ADAPTIVE_STATE_BYTES * lanes - min(riders, 2 * lanes))
