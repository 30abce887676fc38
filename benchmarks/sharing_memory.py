"""Memory and time of `share_weights_` on one large layer, the codes that it returns included; a process for each row.

Run: python benchmarks/sharing_memory.py
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from results import markdown, write_section
from torch import nn

from lightning_edge import share_weights_

ROWS = COLUMNS = 4096
CASES: dict[str, dict[str, Any]] = {
    "64 clusters": {},
    "64 clusters, half of the weights zero": {"zeros": True},
    "importance": {"importance": True},
    "rate 0.02": {"rate": 0.02},
    "channel_scale": {"channel_scale": True},
    "channel_scale, rate 0.02": {"channel_scale": True, "rate": 0.02},
    "block 2": {"block": 2},
    "block 4": {"block": 4},
}


def layer_of(rows: int, columns: int, *, zeros: bool) -> nn.Linear:
    """Return a layer of normal weights, every second of them zero if asked for."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        layer.weight.normal_()
        if zeros:
            layer.weight.view(-1)[::2] = 0.0
    return layer


def measure(
    rows: int, columns: int, *, zeros: bool = False, importance: bool = False, **options: Any
) -> dict[str, float]:
    """Return the bytes taken at most beyond the layer and the arguments, and the seconds (Linux)."""

    def status(key: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])

    layer = layer_of(rows, columns, zeros=zeros)
    given = {"weight": torch.rand(rows, columns)} if importance else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = status("VmRSS"), time.perf_counter()
    share_weights_(layer, clusters=64, importance=given, **options)
    return {"bytes": status("VmHWM") - before, "seconds": time.perf_counter() - start}


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="measure one, as JSON")
    arguments = parser.parse_args()
    if arguments.case:
        torch.set_num_threads(1)
        measure(64, 64, **CASES[arguments.case])  # what is loaded once is no part of it
        print(json.dumps(measure(ROWS, COLUMNS, **CASES[arguments.case])))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        peak = found["bytes"] / (4 * ROWS * COLUMNS)
        rows.append(
            {"sharing": case, "peak / size of the weights": f"{peak:.2f}", "seconds": f"{found['seconds']:.1f}"}
        )
    body = f"A linear layer of {ROWS} x {COLUMNS} normal weights, one thread.\n\n{markdown(rows)}"
    write_section("Sharing a large layer: memory", command="python benchmarks/sharing_memory.py", body=body)


if __name__ == "__main__":
    main()
