import struct
import tracemalloc
import zlib

import pytest
import zstandard

from lightning_edge.artifact.format import (
    INDEX,
    META,
    TENSORS,
    inflate,
    join_sections,
    read_bytes,
    section_data,
    split_sections,
)
from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError

FILE = join_sections({META: b"0.1", INDEX: b"index", TENSORS: b""})


def header(*entries, version=2, magic=b"EDGE", count=None):
    """A header that says anything, with the right checksum."""
    data = magic + bytes([version, len(entries) if count is None else count])
    data += b"".join(struct.pack("<BII", *entry) for entry in entries)
    return data + struct.pack("<I", zlib.crc32(data))


def test_the_layout_is_that_of_the_description():
    entry = struct.pack("<BII", 1, 3, zlib.crc32(b"0.1"))
    start = b"EDGE" + b"\x02\x01" + entry
    assert join_sections({META: b"0.1"}) == start + struct.pack("<I", zlib.crc32(start)) + b"0.1"


def test_sections_come_back_in_their_places():
    sections = split_sections(FILE)
    assert [(section.name, section.size) for section in sections] == [("meta", 3), ("index", 5), ("tensors", 0)]
    assert [bytes(section_data(FILE, sections, kind).take(3)) for kind in (META, INDEX)] == [b"0.1", b"ind"]
    assert section_data(FILE, sections, INDEX).offset == sections[1].offset == len(FILE) - 5


def test_a_section_of_a_later_version_is_passed_over():
    file = join_sections({META: b"0.1", 77: b"new"})
    assert [section.name for section in split_sections(file)] == ["meta", "unknown 77"]


def test_a_file_that_is_cut_short_or_too_long_is_refused():
    for size in range(len(FILE)):
        with pytest.raises(EdgeFormatError):
            split_sections(FILE[:size])
    with pytest.raises(EdgeFormatError, match="1 bytes are left over"):
        split_sections(FILE + b"\0")


def test_every_flipped_bit_is_found():
    for bit in range(8 * len(FILE)):
        damaged = bytearray(FILE)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EdgeFormatError):
            [section_data(bytes(damaged), split_sections(bytes(damaged)), kind) for kind in (META, INDEX, TENSORS)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "4 bytes are announced, 0 are left, at byte 0"),
        (b"PK\x03\x04more", "a .edge file must start with b'EDGE', got b'PK.x03.x04', at byte 0"),
        (header(version=1), "version must be 2, got 1: read it with the lightning_edge that wrote it, at byte 4"),
        (header(count=255), "9 bytes are announced, 4 are left"),
        (header()[:-1] + b"\xff", "the header does not match its checksum: the file is damaged, at byte 6"),
        (header((META, 0, 0), (META, 0, 0)), "a section must occur once, got one twice"),
        (header((META, 0xFFFFFFFF, 0)), "4294967295 bytes are announced, 0 are left"),
    ],
)
def test_a_hostile_header_is_refused(data, message):
    with pytest.raises(EdgeFormatError, match=message):
        split_sections(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zstandard.compress(bytes(17)), "at most 16 bytes must come out of zstd"),
        (zstandard.compress(bytes(16)) + b"x", "zstd's stream must end where its bytes end"),
        (zstandard.compress(bytes(16))[:-1], "zstd's stream must end where its bytes end"),
        (b"nonsense", "zstd cannot read its stream"),
        (b"", "zstd's stream must end"),
    ],
)
def test_a_hostile_stream_of_zstd_is_refused(data, message):
    with pytest.raises(EdgeFormatError, match=message):
        inflate(ByteReader(data), limit=16)


def test_a_bomb_of_zstd_is_stopped_near_its_limit():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(300_000_000))
    assert len(bomb) < 30_000
    tracemalloc.start()
    with pytest.raises(EdgeFormatError, match="at most 1,000 bytes must come out of zstd, got more"):
        inflate(ByteReader(bomb), limit=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 1 << 20


def test_a_section_that_is_missing_or_damaged_is_named_with_its_place():
    with pytest.raises(EdgeFormatError, match="section index must be in the file, got none"):
        section_data(header(), split_sections(header()), INDEX)
    damaged = FILE[:-1] + b"!"
    with pytest.raises(EdgeFormatError, match=f"section index does not match its checksum.*at byte {len(FILE) - 5}"):
        section_data(damaged, split_sections(damaged), INDEX)


def test_a_file_that_is_not_there_is_named_with_the_folder_it_was_looked_for_from(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"path must be a file, got 'no.edge'.*seen from {tmp_path}"):
        read_bytes("no.edge")
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path)


def test_a_file_larger_than_any_that_can_be_read_is_refused_unread(tmp_path):
    path = tmp_path / "large.edge"
    with path.open("wb") as file:
        file.truncate(1 << 31)  # a hole: takes no room
    with pytest.raises(EdgeFormatError, match="a file must have at most 2,147,483,647 bytes, got 2,147,483,648"):
        read_bytes(path)
