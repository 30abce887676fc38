"""Read a packed file: its tensors, its graph, or an ordinary ONNX or safetensors file. Needs numpy and zstandard."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lightning_edge.artifact.codebooks import BFLOAT16
from lightning_edge.artifact.format import (
    INDEX,
    MAX_BYTES,
    META,
    TENSORS,
    Section,
    inflate,
    read_bytes,
    section_data,
    within_memory,
)
from lightning_edge.artifact.format import split_sections as split
from lightning_edge.artifact.tensors import (
    DTYPES,
    PackedTensor,
    decode_tensor,
    read_record,
)
from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError, varint

SAFETENSORS = {
    "F32": 1,
    "U8": 2,
    "I8": 3,
    "U16": 4,
    "I16": 5,
    "I32": 6,
    "I64": 7,
    "BOOL": 9,
    "F16": 10,
    "F64": 11,
    "U32": 12,
    "U64": 13,
    "BF16": BFLOAT16,
}


@dataclass(frozen=True)
class Contents:
    """A packed file, opened: names and records of its tensors, and the ONNX graph without them (may be empty)."""

    sections: list[Section]
    tool_version: str
    recipe_hash: str
    graph: bytes
    records: dict[str, PackedTensor]


def open_file(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Contents:
    """Open a packed file: check lengths and checksums, and read everything but the tensors' elements.

    Args:
        path: The file.
        max_bytes: Most bytes that the graph and all tensors may expand to, checked before memory is taken; the work on
            a tensor takes up to 48 bytes per element more. A file of some bytes can claim all of it: on a device, or
            with files from strangers, say what you have.

    Raises:
        FileNotFoundError: If there is no such file.
        EdgeFormatError: If it is damaged, cut short, hostile, too large or of a later version.
    """
    return parse(read_bytes(path), max_bytes=max_bytes)


def parse(data: bytes, *, max_bytes: int = MAX_BYTES) -> Contents:
    """Open the bytes of a packed file, see :func:`open_file`."""
    sections = split(data)
    meta = section_data(data, sections, META)
    version, _, recipe = _text(bytes(meta.take(meta.left)), meta.offset).partition("\0")
    index = section_data(data, sections, INDEX)
    start = index.offset
    reader = section_data(data, sections, TENSORS)
    inside = memoryview(inflate(index, limit=max_bytes))
    names, graph = _split_index(inside, start, limit=reader.left)
    records: dict[str, PackedTensor] = {}
    left = max_bytes - len(inside)
    for name in names:
        record = read_record(reader, limit=left)
        left -= record.elements * DTYPES[record.dtype].itemsize
        records[name] = record
    reader.end()
    if len(records) != len(names):
        raise EdgeFormatError("tensor names must differ, got one twice", offset=start)
    return Contents(sections, version, recipe, graph, records)


def read_tensors(path: str | Path, *, max_bytes: int = MAX_BYTES) -> dict[str, NDArray[Any]]:
    """Return the tensors of a packed file by name, bit by bit what was packed (bfloat16 as the uint16 of its bits).

    Args:
        path: The file.
        max_bytes: Most bytes that it may expand to, see :func:`open_file`.

    Raises:
        FileNotFoundError: If there is no such file.
        EdgeFormatError: If it is damaged, cut short, hostile or of a later version.
    """
    with within_memory():
        return {name: decode_tensor(record) for name, record in open_file(path, max_bytes=max_bytes).records.items()}


def onnx_bytes(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the ONNX model of a packed file, serialized, every tensor inside.

    Protocol buffers that are written one behind the other are read as one: the graph without its tensors, then a model
    of tensors alone. So this needs no ONNX library.

    Args:
        path: The file.
        max_bytes: Most bytes that it may expand to, see :func:`open_file`.

    Raises:
        FileNotFoundError: If there is no such file.
        EdgeFormatError: If it is damaged, or holds tensors alone.
    """
    with within_memory():
        contents = open_file(path, max_bytes=max_bytes)
        if not contents.graph:
            raise EdgeFormatError(
                "the file must hold a graph to be run, got tensors alone: unpack it to .safetensors", offset=0
            )
        tensors = b"".join(_field(5, _tensor_proto(name, record)) for name, record in contents.records.items())
        model = contents.graph + _field(7, tensors)
    if len(model) > MAX_BYTES:
        raise EdgeFormatError(f"a model must have at most {MAX_BYTES:,} bytes, got {len(model):,}", offset=0)
    return model


def unpack(path: str | Path, out: str | Path, *, max_bytes: int = MAX_BYTES) -> Path:
    """Write a packed file as an ordinary one; the suffix of ``out`` decides: ``.onnx`` or ``.safetensors``.

    Args:
        path: The packed file.
        out: The file to write.
        max_bytes: Most bytes that it may expand to, see :func:`open_file`.

    Raises:
        ValueError: If the suffix is another one.
        FileNotFoundError: If there is no such file, or no folder for ``out``.
        EdgeFormatError: If it is damaged, or has no graph for ``.onnx``.
    """
    out = Path(out)
    writers: dict[str, Callable[..., bytes]] = {".onnx": onnx_bytes, ".safetensors": _safetensors_bytes}
    if out.suffix not in writers:
        raise ValueError(f"out must end in one of {list(writers)}, got {out.name!r}")
    check_folder(out)
    return write_atomically(out, writers[out.suffix](path, max_bytes=max_bytes))


def check_folder(path: Path) -> None:
    """Raise a FileNotFoundError unless the folder of a file to be written exists."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"path must lie in a folder that exists, got {str(path)!r}: make {str(path.parent)!r} first"
        )


def write_atomically(path: Path, data: bytes) -> Path:
    """Write to a temporary name in the same folder and rename: ``path`` is the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _split_index(inside: memoryview, offset: int, *, limit: int) -> tuple[list[str], bytes]:
    """Return the names of at most ``limit`` tensors, and the graph."""
    reader = ByteReader(inside, offset=offset)
    joined = bytes(reader.take(reader.varint()))
    if joined.count(b"\n") >= max(1, limit):
        raise EdgeFormatError(f"{limit} bytes of tensors must hold every tensor named, got more names", offset=offset)
    return _text(joined, offset).split("\n") if joined else [], bytes(reader.take(reader.left))


def _text(data: bytes, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise EdgeFormatError(f"text must be UTF-8: {error.reason}", offset=offset) from error


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def _tensor_proto(name: str, record: PackedTensor) -> bytes:
    dims = b"".join(varint(1 << 3) + varint(size) for size in record.shape)
    kind = varint(2 << 3) + varint(record.dtype)
    return dims + kind + _field(8, name.encode()) + _field(9, decode_tensor(record).tobytes())


def _safetensors_bytes(path: str | Path, *, max_bytes: int) -> bytes:
    codes = {code: name for name, code in SAFETENSORS.items()}
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    position = 0
    with within_memory():
        for name, record in open_file(path, max_bytes=max_bytes).records.items():
            parts.append(decode_tensor(record).tobytes())
            end = position + len(parts[-1])
            header[name] = {"dtype": codes[record.dtype], "shape": record.shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + b"".join(parts)
