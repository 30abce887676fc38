"""A seeded mutator of packed files, and what reading its mutants comes to. Run as a program: COUNT SEED, prints JSON.

Damage to the file's bytes alone is found by the checksums; so most mutants are damaged inside and their checksums and
lengths made right again: then headers, the index, records and each codec's payload are read as hostile as they are.
"""

import json
import resource
import signal
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import zstandard

from lightning_edge.artifact.format import INDEX, META, TENSORS, inflate, join_sections, section_data, split_sections
from lightning_edge.artifact.inspecting import streams
from lightning_edge.artifact.reading import parse
from lightning_edge.artifact.tensors import CODECS, decode_tensor
from lightning_edge.functional.bytestream import ByteReader, EdgeFormatError, varint

GOLDEN = Path(__file__).with_name("golden")
MAX_BYTES = 1 << 18
"""What a mutant may expand to."""
MAX_MEMORY = 32 << 20
"""What reading may take: 48 bytes for each of these as said in `open_file`, the file, tables, and what numpy keeps."""
MAX_SECONDS = 10.0
"""Processor time that reading one mutant may take."""
NUMBERS = (0, 1, 2, 63, 64, 127, 128, 255, 1 << 13, 1 << 14, 1 << 16, 1 << 20, 1 << 28, (1 << 31) - 1, 1 << 32, 1 << 63)
LAYERS = {"bytes": 3, "header": 2, "meta": 1, "index": 1, "tensors": 2, "record": 4, "payload": 8}
"""What is damaged, and how often: the deeper, the more there is to go wrong, and the faster a mutant is read."""


@dataclass(frozen=True)
class Record:
    """A record in pieces: what stands before the payload's length, and the payload."""

    head: bytes
    payload: bytes

    def bytes(self) -> bytes:
        """Return the record with a length that is right."""
        return self.head + varint(len(self.payload)) + self.payload


@dataclass(frozen=True)
class Original:
    """A file in pieces."""

    data: bytes
    meta: bytes
    index: bytes
    tensors: bytes
    records: list[Record]


def take_apart(data: bytes) -> Original:
    """Return the pieces of an undamaged file."""
    sections = split_sections(data)
    readers = {section.kind: section_data(data, sections, section.kind) for section in sections}
    meta, tensors = (bytes(readers[kind].take(readers[kind].left)) for kind in (META, TENSORS))
    index = inflate(readers[INDEX], limit=1 << 24)
    records, reader = [], ByteReader(tensors)
    while reader.left:
        start = len(tensors) - reader.left
        reader.byte()
        for _ in range(reader.varint()):
            reader.varint()
        reader.byte()
        end = len(tensors) - reader.left
        records.append(Record(tensors[start:end], bytes(reader.take(reader.varint()))))
    return Original(data, meta, index, tensors, records)


def put_together(meta: bytes, index: bytes, tensors: bytes) -> bytes:
    """Return a file whose lengths and checksums are right, whatever its sections hold."""
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=False)
    return join_sections({META: meta, INDEX: compressor.compress(index), TENSORS: tensors})


def damaged(random: Random, data: bytes, other: bytes) -> bytes:
    """Return bytes with one to three damages: bits, bytes, numbers, pieces cut, doubled, put in or from another."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        at, size = random.randrange(len(out) + 1), random.choice((1, 1, 2, 4, 16))
        kind = random.randrange(9)
        if kind < 2 and out:
            out[at - 1] ^= 1 << random.randrange(8)
        elif kind == 2 and out:
            out[at - 1] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        elif kind == 3:
            out[at : at + size] = varint(random.choice(NUMBERS))
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            del out[at : at + size]
        elif kind == 6:
            out[at:at] = out[at : at + size]
        elif kind == 7:
            out[at:at] = random.randbytes(size)
        else:
            out[at:] = other[random.randrange(len(other) + 1) :]
    return bytes(out)


def mutant(random: Random, originals: Sequence[Original]) -> tuple[str, bytes]:
    """Return what was damaged, and the file."""
    one, other = random.choice(originals), random.choice(originals)
    (layer,) = random.choices(list(LAYERS), weights=list(LAYERS.values()))
    if layer == "bytes" or (layer in ("record", "payload") and not one.records):
        return "bytes", damaged(random, one.data, other.data)
    if layer == "header":
        size = 6 + 9 * one.data[5]
        head = damaged(random, one.data[:size], other.data[:size])
        return layer, head + struct.pack("<I", zlib.crc32(head)) + one.data[size + 4 :]
    if layer == "meta":
        return layer, put_together(damaged(random, one.meta, other.meta), one.index, one.tensors)
    if layer == "index":
        return layer, put_together(one.meta, damaged(random, one.index, other.index), one.tensors)
    if layer == "tensors":
        return layer, put_together(one.meta, one.index, damaged(random, one.tensors, other.tensors))
    record = random.choice(one.records)
    second = random.choice(other.records or one.records)
    if layer == "record":
        data = damaged(random, record.bytes(), second.bytes())
    else:  # of which the codec can be another, too
        head = record.head if random.randrange(8) else record.head[:-1] + bytes([random.randrange(len(CODECS))])
        data = Record(head, damaged(random, record.payload, second.payload)).bytes()
    return layer, put_together(b"", varint(1) + b"w", data)


def read_all(data: bytes) -> str:
    """Return whether a file is read or refused; whatever is raised beside EdgeFormatError comes out."""
    try:
        for record in parse(data, max_bytes=MAX_BYTES).records.values():
            streams(record)
        for record in parse(data, max_bytes=MAX_BYTES).records.values():
            decode_tensor(record)
    except EdgeFormatError:
        return "refused"
    return "read"


@dataclass
class Report:
    """What became of the mutants: counts by layer and outcome, the slowest of them, and memory beyond the first.

    Outcomes are "refused", "read", and "whole": a file that damage upon damage made one of the originals.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    slowest_mutant: str = ""
    seconds: float = 0.0
    memory_bytes: int = 0


def _too_long(*_: object) -> None:
    raise TimeoutError(f"reading takes more than {MAX_SECONDS} s")


def limit_memory() -> None:
    """Let this process get no more than MAX_MEMORY beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_MEMORY, resource.RLIM_INFINITY))


def fuzz(files: Sequence[bytes], *, count: int, seed: int, limit: Callable[[], None] = lambda: None) -> Report:
    """Read mutants, each within its time, and all within what ``limit`` leaves, called when all is ready."""
    report, originals, whole = Report(), [take_apart(data) for data in files], set(files)
    for original in originals:
        assert read_all(original.data) == "read"
    limit()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    alarm = signal.signal(signal.SIGVTALRM, _too_long)
    started = time.process_time()
    for number in range(count):
        layer, data = mutant(Random(f"{seed} {number}"), originals)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
        try:
            report.outcomes[f"{layer} {'whole' if data in whole else read_all(data)}"] += 1
        except Exception as error:
            report.failures.append(f"mutant {number}, {layer}: {error!r}: {data.hex()}")
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        taken = time.process_time() - start
        if taken > report.slowest_seconds:
            report.slowest_seconds, report.slowest_mutant = taken, f"{number}, {layer}, {len(data)} bytes"
    signal.signal(signal.SIGVTALRM, alarm)
    report.seconds = time.process_time() - started
    report.memory_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return report


def golden_files() -> Iterator[bytes]:
    """Yield the bytes of every golden file."""
    for path in sorted(GOLDEN.glob("*/*.edge")):
        yield path.read_bytes()


if __name__ == "__main__":
    found = fuzz(list(golden_files()), count=int(sys.argv[1]), seed=int(sys.argv[2]), limit=limit_memory)
    print(json.dumps(vars(found)))
