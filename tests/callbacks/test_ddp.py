import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist
HERE = Path(__file__).parent


def two_processes(folder, when="never", seed=1):
    """Fit in two processes; return the exit code, the errors of both, and what each rank wrote."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "ddp_worker.py"), str(folder), when, str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    ranks = [dict(line.split() for line in path.read_text().splitlines()) for path in sorted(folder.glob("rank*.txt"))]
    return done.returncode, done.stderr, ranks


def test_ranks_that_see_different_data_decide_alike(tmp_path):
    code, errors, (first, second) = two_processes(tmp_path)
    assert code == 0, errors
    assert first.pop("data") != second.pop("data")
    assert first == second
    assert (tmp_path / "out" / "model.edge").is_file()


@pytest.mark.parametrize("when", ["channels", "codes", "distillation", "steps", "calibration"])
def test_channels_codes_steps_ranges_and_what_a_teacher_taught_are_the_same_on_both_ranks(tmp_path, when):
    code, errors, (first, second) = two_processes(tmp_path, when=when)
    assert code == 0, errors
    assert first.pop("data") != second.pop("data")
    assert first == second
    assert (tmp_path / "out" / "model.edge").is_file()


def test_weights_that_diverged_are_found_at_the_next_decision(tmp_path):
    code, errors, ranks = two_processes(tmp_path, when="masks")
    assert code != 0
    assert ranks == []
    assert errors.count("RuntimeError: the pruning masks must be the same on every rank") >= 2


def test_a_file_that_disagrees_raises_on_both_ranks(tmp_path):
    start = time.monotonic()
    code, errors, ranks = two_processes(tmp_path, when="export")
    assert code != 0
    assert ranks == []
    assert errors.count("ArtifactMismatchError") >= 2
    assert time.monotonic() - start < 180  # gloo itself would wait for half an hour
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert kept == ["model.rejected.edge", "model.rejected.edge.json"]
