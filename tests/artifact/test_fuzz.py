"""Thousands of damaged files, of the golden ones: each is read or refused, in time, in little memory, by one error."""

import json
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from random import Random

import fuzzer
import numpy as np
import pytest
from fuzzer import LAYERS, MAX_MEMORY, MAX_SECONDS, damaged, fuzz, golden_files, mutant, put_together, take_apart

from lightning_edge import load_artifact, pack, unpack
from lightning_edge.artifact import EdgeFormatError, inspect, read_tensors
from lightning_edge.artifact.reading import onnx_bytes, parse

NETWORK = next(Path(fuzzer.GOLDEN).glob("*/network.edge"))
MUTANTS = 2000


def test_thousands_of_mutants_are_read_or_refused_within_time_and_memory():
    program = [sys.executable, fuzzer.__file__, str(MUTANTS), "0"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failures"] == []
    assert sum(report["outcomes"].values()) == MUTANTS
    assert {f"{layer} refused" for layer in LAYERS} <= set(report["outcomes"])
    assert {f"{layer} read" for layer in ("tensors", "record", "payload")} <= set(report["outcomes"])
    assert "bytes read" not in report["outcomes"]  # checksums find all damage that was not made to fit them
    assert report["slowest_seconds"] < MAX_SECONDS
    assert report["memory_bytes"] < MAX_MEMORY


@pytest.mark.parametrize("read", [read_tensors, inspect, onnx_bytes])
def test_every_reader_of_files_raises_one_class_alone(tmp_path, read):
    original, refused = take_apart(NETWORK.read_bytes()), 0
    for number in range(80):
        random = Random(number)
        data = put_together(original.meta, original.index, damaged(random, original.tensors, original.tensors))
        (tmp_path / "mutant.edge").write_bytes(data)
        try:
            read(tmp_path / "mutant.edge", max_bytes=1 << 18)
        except EdgeFormatError:
            refused += 1
    assert refused > 40


def test_hostile_graphs_are_loaded_and_unpacked_or_refused_by_the_one_class(tmp_path):
    original, refused = take_apart(NETWORK.read_bytes()), Counter()
    for number in range(60):
        data = put_together(original.meta, damaged(Random(number), original.index, original.index), original.tensors)
        (tmp_path / "mutant.edge").write_bytes(data)
        for read in (load_artifact, lambda path, **limit: unpack(path, tmp_path / "mutant.onnx", **limit)):
            try:
                read(tmp_path / "mutant.edge", max_bytes=1 << 18)
            except EdgeFormatError:
                refused[read] += 1
    assert refused[load_artifact] > 30
    assert max(refused.values()) < 60


def test_a_file_that_is_cut_anywhere_is_refused():
    data = NETWORK.read_bytes()
    for size in range(len(data)):
        with pytest.raises(EdgeFormatError):
            parse(data[:size])


def test_every_flipped_bit_of_a_file_is_found():
    data = NETWORK.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EdgeFormatError):
            parse(bytes(flipped))


@pytest.mark.parametrize("moment", ["half written", "before it is renamed", "after it was renamed"])
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path, moment):
    old, new = {"w": np.arange(9)}, {"w": np.arange(5000)}
    before = pack(old, tmp_path / "w.edge").path.read_bytes()
    after = pack(new, tmp_path / "new.edge").path.read_bytes()
    program = f"""
        import os, signal
        from pathlib import Path
        import numpy as np
        from lightning_edge import load_artifact, pack, unpack

        write, replace = Path.write_bytes, Path.replace
        def kill(): os.kill(os.getpid(), signal.SIGKILL)
        def killed_writing(self, data): write(self, data[: len(data) // 2]); kill()
        def killed_before(self, target): kill()
        def killed_after(self, target): replace(self, target); kill()
        moment = {moment!r}
        if moment == "half written": Path.write_bytes = killed_writing
        if moment == "before it is renamed": Path.replace = killed_before
        if moment == "after it was renamed": Path.replace = killed_after
        pack({{"w": np.arange(5000)}}, "w.edge")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "w.edge").read_bytes() == (after if moment == "after it was renamed" else before)


def test_a_file_that_is_taken_apart_can_be_put_together():
    for data in golden_files():
        original = take_apart(data)
        assert b"".join(record.bytes() for record in original.records) == original.tensors
        again = parse(put_together(original.meta, original.index, original.tensors))
        assert again.graph == parse(data).graph
        assert list(again.records) == list(parse(data).records)


def test_the_same_seed_gives_the_same_mutants():
    originals = [take_apart(data) for data in golden_files()]
    first, second = ([mutant(Random(number), originals) for number in range(200)] for _ in range(2))
    assert first == second
    assert len({data for _, data in first}) > 190


def test_what_is_raised_beside_the_one_class_is_a_failure(monkeypatch):
    monkeypatch.setattr(fuzzer, "decode_tensor", lambda record: [][record.elements])
    monkeypatch.setattr(fuzzer, "take_apart", lambda data: data)
    monkeypatch.setattr(fuzzer, "mutant", lambda random, originals: ("bytes", NETWORK.read_bytes()))
    report = fuzz([], count=3, seed=0)
    assert len(report.failures) == 3
    assert "mutant 2, bytes: IndexError('list index out of range')" in report.failures[2]


def test_what_takes_too_long_is_a_failure(monkeypatch):
    def endless(data):
        while True:
            pass

    monkeypatch.setattr(fuzzer, "read_all", endless)
    monkeypatch.setattr(fuzzer, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(fuzzer, "mutant", lambda random, originals: ("bytes", b""))
    assert "TimeoutError" in fuzz([], count=1, seed=0).failures[0]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are those of Linux")
def test_what_takes_too_much_memory_is_a_failure():
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(fuzzer.__file__).parent)!r})
        import fuzzer
        fuzzer.read_all = lambda data: bytes(fuzzer.MAX_MEMORY + (1 << 20)) and "read"
        fuzzer.mutant = lambda random, originals: ("bytes", b"")
        print(fuzzer.fuzz([], count=1, seed=0, limit=fuzzer.limit_memory).failures)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stdout
