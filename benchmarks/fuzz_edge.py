"""Damaged .edge files, read as a stranger's: how many are read or refused, how long the slowest takes, how much memory.

The mutator is that of the tests: files of every codec, damaged as they are, or inside with their checksums made right.

Run: python benchmarks/fuzz_edge.py
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from results import markdown, write_section

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "artifact"))

from fuzzer import (
    LAYERS,
    MAX_BYTES,
    MAX_MEMORY,
    MAX_SECONDS,
    Record,
    Report,
    fuzz,
    golden_files,
    limit_memory,
    put_together,
    read_all,
)

from lightning_edge.artifact.codebooks import split_codebook
from lightning_edge.artifact.tensors import CODECS
from lightning_edge.functional.bytestream import varint
from lightning_edge.functional.context_coding import Pass, Plan, encode_with, steps_allowed
from lightning_edge.functional.contexts import Contexts

DAMAGED = {
    "bytes": "the file, its checksums left as they were",
    "header": "the table of sections, its checksum right",
    "meta": "the section of versions, all checksums right",
    "index": "names and graph before they are compressed, all checksums right",
    "tensors": "the section of tensors, all checksums right",
    "record": "one record, all checksums right",
    "payload": "what one codec reads, all lengths and checksums right",
}


_GREEDY_PAYLOAD = 38
"""Bytes of the smallest payload with as many columns as it allows."""
_GREEDY_BYTES = 20_000


def rows(report: Report) -> list[dict[str, str]]:
    """Return the counts of every layer."""
    table = []
    for layer in LAYERS:
        read, refused, whole = (report.outcomes[f"{layer} {outcome}"] for outcome in ("read", "refused", "whole"))
        other = sum(f", {layer}: " in failure for failure in report.failures)
        table.append(
            {
                "damaged": DAMAGED[layer],
                "files": f"{read + refused + whole + other:,}",
                "refused": f"{refused:,}",
                "read": f"{read:,}",
                "undamaged after all": f"{whole:,}",
                "anything else": f"{other:,}",
            }
        )
    return table


def greedy_file() -> bytes:
    """Return the file that, of those that we know, asks for the most work: many columns of one row, many contexts."""
    columns = steps_allowed(_GREEDY_PAYLOAD)
    plan = Plan((columns, 1, 1), 0, 0, None, Pass(64, Contexts(0, 0, 1, 64, 7)))
    head, _ = split_codebook(np.arange(200, dtype=np.uint8))
    codes = encode_with(plan, np.zeros((1, columns), dtype=np.int64), 200, riders=b"", lanes=1)
    start = bytes([2, 2, 1]) + varint(columns) + bytes([CODECS.index("context")])
    count = _GREEDY_BYTES // (_GREEDY_PAYLOAD + 10)
    names = "\n".join(map(str, range(count))).encode()
    return put_together(b"", varint(len(names)) + names, Record(start, head + codes).bytes() * count)


def main() -> None:
    """Read the mutants, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    files = list(golden_files())
    report = fuzz(files, count=arguments.count, seed=arguments.seed, limit=limit_memory)
    greedy, start = greedy_file(), time.process_time()
    outcome = read_all(greedy)
    seconds = time.process_time() - start
    for failure in report.failures:
        print(failure, file=sys.stderr)
    body = (
        f"{arguments.count:,} mutants of {len(files)} golden files of {sum(map(len, files)):,} bytes in all, seed"
        f" {arguments.seed}; each may expand to {MAX_BYTES:,} bytes, take {MAX_SECONDS:.0f} s of processor time and"
        f" {MAX_MEMORY >> 20} MiB of address space.\n\n{markdown(rows(report))}\n\n"
        f"Slowest: {1e3 * report.slowest_seconds:.0f} ms (mutant {report.slowest_mutant}); all:"
        f" {report.seconds:.0f} s of processor time; peak memory beyond that of reading the undamaged files:"
        f" {report.memory_bytes / (1 << 20):.1f} MiB; crashes: none, or there would be no table.\n\n"
        f"A file made by hand to ask for as much work as it may, {len(greedy):,} bytes, is {outcome} in"
        f" {seconds:.1f} s of processor time."
    )
    write_section("Damaged files", command=f"python benchmarks/fuzz_edge.py --count {arguments.count}", body=body)
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
