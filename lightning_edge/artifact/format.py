"""The container: a header that says where the sections are, and their checksums. All numbers are little-endian.

    "EDGE"  version: u8  sections: u8  { kind: u8  size: u32  crc32: u32 } per section  crc32 of all before: u32
    the sections, one behind the other, to the end of the file

Sections: ``META`` (tool version, 0, recipe hash, as UTF-8), ``INDEX`` (zstd of: size of the names: varint, tensor names
joined by newlines, ONNX graph without its tensors; the graph is empty for a file of tensors alone) and ``TENSORS``
(records of :mod:`lightning_edge.artifact.tensors`, in the order of the names).
"""

import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zstandard

from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError

MAGIC = b"EDGE"
VERSION = 2
META, INDEX, TENSORS = 1, 2, 3
NAMES = {META: "meta", INDEX: "index", TENSORS: "tensors"}
MAX_BYTES = (1 << 31) - 1
"""Most bytes that a file may expand to: protobuf, and with it onnxruntime, reads no more."""
_ENTRY = struct.Struct("<BII")
_ZSTD_WINDOW = 1 << 23  # what level 19 uses


@dataclass(frozen=True)
class Section:
    """Where a section lies."""

    kind: int
    offset: int
    size: int
    crc32: int

    @property
    def name(self) -> str:
        """What the section holds."""
        return NAMES.get(self.kind, f"unknown {self.kind}")


def join_sections(sections: Mapping[int, bytes]) -> bytes:
    """Return the whole file.

    >>> split_sections(join_sections({META: b"0.1"}))[0].name
    'meta'
    """
    header = MAGIC + bytes([VERSION, len(sections)])
    header += b"".join(_ENTRY.pack(kind, len(data), zlib.crc32(data)) for kind, data in sections.items())
    return header + struct.pack("<I", zlib.crc32(header)) + b"".join(sections.values())


def split_sections(data: bytes) -> list[Section]:
    """Return the sections of a file after checking the header and that they fill the file exactly.

    Raises:
        EdgeFormatError: If this is no such file, one of a later version, or its lengths do not add up.

    >>> split_sections(b"PK")
    Traceback (most recent call last):
    lightning_edge.functional.bytestream.EdgeFormatError: 4 bytes are announced, 2 are left, at byte 0
    """
    reader = ByteReader(data)
    if bytes(reader.take(4)) != MAGIC:
        raise EdgeFormatError(f"a .edge file must start with {MAGIC!r}, got {data[:4]!r}", offset=0)
    version, count = reader.byte(), reader.byte()
    if version != VERSION:
        raise EdgeFormatError(
            f"version must be {VERSION}, got {version}: read it with the lightning_edge that wrote it", offset=4
        )
    entries = [_ENTRY.unpack(reader.take(_ENTRY.size)) for _ in range(count)]
    end = reader.offset
    if struct.unpack("<I", reader.take(4))[0] != zlib.crc32(data[:end]):
        raise EdgeFormatError("the header does not match its checksum: the file is damaged", offset=end)
    sections = []
    for kind, size, crc32 in entries:
        sections.append(Section(kind, reader.offset, size, crc32))
        reader.take(size)
    reader.end()
    if len({section.kind for section in sections}) != len(sections):
        raise EdgeFormatError("a section must occur once, got one twice", offset=6)
    return sections


def section_data(data: bytes, sections: list[Section], kind: int) -> ByteReader:
    """Return a reader over one section whose checksum is right.

    Raises:
        EdgeFormatError: If the section is missing or damaged.

    >>> file = join_sections({META: b"0.1"})
    >>> section_data(file, split_sections(file), META).left
    3
    """
    for section in sections:
        if section.kind == kind:
            part = memoryview(data)[section.offset : section.offset + section.size]
            if zlib.crc32(part) != section.crc32:
                reason = f"section {section.name} does not match its checksum: the file is damaged"
                raise EdgeFormatError(reason, offset=section.offset)
            return ByteReader(part, offset=section.offset)
    raise EdgeFormatError(f"section {NAMES[kind]} must be in the file, got none", offset=6)


def read_bytes(path: str | Path) -> bytes:
    """Return the file's bytes.

    Raises:
        FileNotFoundError: If there is no such file.
        EdgeFormatError: If it is larger than any file that could be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path must be a file, got {str(path)!r}, which does not exist (seen from {Path.cwd()})"
        )
    if path.stat().st_size > MAX_BYTES:
        raise EdgeFormatError(f"a file must have at most {MAX_BYTES:,} bytes, got {path.stat().st_size:,}", offset=0)
    return path.read_bytes()


@contextmanager
def within_memory() -> Iterator[None]:
    """Raise an :class:`EdgeFormatError` where a file expands to more than the machine has memory for."""
    try:
        yield
    except MemoryError as error:
        raise EdgeFormatError(
            "a file must expand to what the memory holds, got more: say how much that is by max_bytes", offset=0
        ) from error


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
