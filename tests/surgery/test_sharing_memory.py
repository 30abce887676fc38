import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
    import json
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    from lightning_edge import share_weights_

    def status(key):
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])

    def peak(size, options):
        torch.manual_seed(0)
        layer = nn.Linear(size, size, bias=False)
        if options.pop("importance", False):
            options["importance"] = {"weight": torch.rand(size, size)}
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        share_weights_(layer, clusters=16, **options)
        return status("VmHWM") - before

    torch.set_num_threads(1)
    peak(64, json.loads(sys.argv[1]))
    print(peak(2048, json.loads(sys.argv[1])) / (4 * 2048**2))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are those that Linux keeps")
@pytest.mark.parametrize(
    ("options", "most"),  # times the size of the weights, 16 MB; tables of up to 20 MB are 1.2 of it
    [({}, 1.9), ({"importance": True}, 2.7), ({"channel_scale": True}, 3.2), ({"block": 2}, 3.2)],
    ids=str,
)
def test_sharing_takes_a_few_times_the_memory_of_the_weights(options, most):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps(options)]
    # Else the allocator keeps what is freed, and the peak is that of its habits.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    peaks: list[float] = []
    while len(peaks) < 3 and not (peaks and min(peaks) < most):  # pages that were swapped out before come on top of it
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    assert min(peaks) < most
