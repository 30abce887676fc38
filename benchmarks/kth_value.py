"""Time and extra memory of the exact global threshold over 100 million scores: ours, torch.kthvalue, torch.topk.

Each method runs in a process of its own, so that the peak of its memory is its own.

Run: python benchmarks/kth_value.py
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from results import markdown, write_section
from torch import Tensor

from lightning_edge.functional.pruning import pruned_count, smallest_masks

SPARSITY, THREADS = 0.9, 1
SHARES = (0.5, 0.25, 0.125, 0.0625, 0.0625)  # of all scores, by tensor
KIB, MIB = 2**10, 2**20


def ours(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the masks of smallest_masks."""
    return smallest_masks(scores, count=count)


def kthvalue(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the masks above the k-th value of all scores in one tensor."""
    threshold = torch.cat([score.flatten() for score in scores]).kthvalue(count).values
    return [score > threshold for score in scores]


def topk(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the masks of the largest of all scores in one tensor, as torch.nn.utils.prune does it."""
    together = torch.cat([score.flatten() for score in scores])
    kept = torch.topk(together, len(together) - count).indices
    mask = torch.zeros(len(together), dtype=torch.bool)
    mask[kept] = True
    return [part.view_as(score) for part, score in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]


METHODS: dict[str, Callable[[Sequence[Tensor], int], list[Tensor]]] = {
    "functional.pruning.smallest_masks": ours,
    "torch.cat and torch.kthvalue": kthvalue,
    "torch.cat and torch.topk": topk,
}


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def measure(method: str, size: int) -> dict[str, float | int | str]:
    """Run one method in this process."""
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(int(share * size), generator=generator).abs_() for share in SHARES]
    METHODS[method]([score[:1000] for score in scores], 1)  # its code is loaded before the clock starts
    count = pruned_count(sum(score.numel() for score in scores), SPARSITY)
    before, start = peak_bytes(), time.perf_counter()
    masks = METHODS[method](scores, count)
    seconds, extra = time.perf_counter() - start, peak_bytes() - before
    bits = hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in masks)).hexdigest()
    return {
        "seconds": seconds,
        "extra": extra,
        "zeros": sum(mask.numel() - int(mask.sum()) for mask in masks),
        "count": count,
        "bits": bits,
    }


def main() -> None:
    """Measure each method in a process of its own, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000_000, help="number of scores")
    parser.add_argument("--method", choices=METHODS, help="measure this one, and print it")
    arguments = parser.parse_args()
    if arguments.method:
        print(json.dumps(measure(arguments.method, arguments.size)))
        return
    command = [sys.executable, __file__, "--size", str(arguments.size), "--method"]
    found = {}
    for method in METHODS:
        done = subprocess.run([*command, method], capture_output=True, text=True, check=True)
        found[method] = json.loads(done.stdout)
        print(method, found[method], flush=True)
    own = found["functional.pruning.smallest_masks"]
    rows = [
        {
            "method": method,
            "seconds": f"{result['seconds']:.2f}",
            "extra memory, MiB": f"{result['extra'] / MIB:.0f}",
            "zeros": f"{result['zeros']:,}",
            "zeros asked for": f"{result['count']:,}",
            "positions equal to ours": "all" if result["bits"] == own["bits"] else "not all (ties)",
        }
        for method, result in found.items()
    ]
    body = (
        f"{arguments.size:,} float32 scores ({arguments.size * 4 / MIB:.0f} MiB) in {len(SHARES)} tensors, the largest"
        f" {max(SHARES):.0%} of them; sparsity {SPARSITY}; {THREADS} thread. Extra memory: peak above that of the"
        f" process with its scores; the masks alone take {arguments.size / MIB:.0f} MiB.\n\n{markdown(rows)}"
    )
    write_section("Global threshold", command="python benchmarks/kth_value.py", body=body)


if __name__ == "__main__":
    main()
