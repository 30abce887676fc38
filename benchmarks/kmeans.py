"""Our k-means on weights: time and inertia beside scikit-learn and the exact optimum, large tensors, and memory.

The exact optimum is that of the package kmeans1d, if it is installed.

Run: python benchmarks/kmeans.py
"""

import argparse
import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from results import markdown, write_section
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.distributions import Laplace, StudentT

from lightning_edge.data import DigitsDataModule
from lightning_edge.functional.sharing import INITS, Init, kmeans_1d
from lightning_edge.models import DigitsNet

VALUES, CLUSTERS, REPEATS = 1_000_000, 256, 5
EXACT_VALUES, LARGE_VALUES = 200_000, 25_000_000
COMMAND = "python benchmarks/kmeans.py"


def timed(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the median seconds of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def squared_error(values: Tensor, centroids: Tensor, codes: Tensor) -> float:
    """Return the inertia, in float64."""
    return float((values.double() - centroids.double()[codes.long()]).square().sum())


def ours(values: Tensor, clusters: int, init: Init, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Run our k-means with a seeded start."""
    return kmeans_1d(values, clusters, init=init, generator=torch.Generator().manual_seed(seed))


def beside_scikit_learn() -> None:
    """Measure time and inertia of every start."""
    values = torch.randn(VALUES, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    fitted = KMeans(CLUSTERS, n_init=1, random_state=0).fit(values.numpy()[:, None])
    peer_seconds = time.perf_counter() - start
    peer = squared_error(values, torch.from_numpy(fitted.cluster_centers_[:, 0]), torch.from_numpy(fitted.labels_))

    def row(method: str, seconds: float, inertia: float) -> dict[str, str]:
        return {
            "method": method,
            "seconds": f"{seconds:.3f}",
            "times faster": f"{peer_seconds / seconds:.0f}",
            "inertia": f"{inertia:.3f}",
            "inertia / scikit-learn's": f"{inertia / peer:.3f}",
        }

    rows = [row("scikit-learn KMeans(n_init=1)", peer_seconds, peer)]
    for init in INITS:
        seconds = timed(lambda init=init: ours(values, CLUSTERS, init))
        rows.append(row(f"kmeans_1d(init={init!r})", seconds, squared_error(values, *ours(values, CLUSTERS, init))))
    body = f"{VALUES:,} normal values into {CLUSTERS} clusters; ours: median of {REPEATS} runs.\n\n{markdown(rows)}"
    write_section("1-D k-means", command=COMMAND, body=body)


def beside_the_optimum() -> None:
    """Measure the inertia of the optimal start against that of an exact solver."""
    if importlib.util.find_spec("kmeans1d") is None:
        print("left out: inertia against the exact optimum, the package kmeans1d is not installed")
        return
    import kmeans1d

    torch.manual_seed(0)
    samples = {
        "normal": torch.randn(EXACT_VALUES),
        "Laplace": Laplace(0.0, 1.0).sample((EXACT_VALUES,)),
        "Student's t, 3 degrees of freedom": StudentT(3.0).sample((EXACT_VALUES,)),
    }
    rows = []
    for name, values in samples.items():
        for clusters in (16, CLUSTERS):
            start = time.perf_counter()
            codes, centroids = kmeans1d.cluster(values.double().numpy(), clusters)
            exact_seconds = time.perf_counter() - start
            exact = squared_error(values, torch.tensor(centroids), torch.tensor(codes))
            inertia = squared_error(values, *ours(values, clusters, "optimal"))
            rows.append(
                {
                    "values": name,
                    "clusters": clusters,
                    "exact, seconds": f"{exact_seconds:.2f}",
                    "ours, seconds": f"{timed(lambda v=values, k=clusters: ours(v, k, 'optimal')):.3f}",
                    "inertia / exact": f"{inertia / exact:.5f}",
                }
            )
    body = f'{EXACT_VALUES:,} values; `kmeans_1d(init="optimal")` beside the package kmeans1d.\n\n{markdown(rows)}'
    write_section("1-D k-means: distance to the optimum", command=COMMAND, body=body)


def large_tensor() -> None:
    """Measure a large tensor against one search of the boundaries, and the memory in fresh processes."""
    values = torch.randn(LARGE_VALUES, generator=torch.Generator().manual_seed(0))
    boundaries = torch.linspace(-4, 4, CLUSTERS - 1)
    search = timed(lambda: torch.bucketize(values, boundaries), 3)
    rows = [{"what": f"torch.bucketize, {CLUSTERS - 1} boundaries", "seconds": f"{search:.2f}", "/ bucketize": "1"}]
    for init in ("linear", "optimal"):
        seconds = timed(lambda init=init: ours(values, CLUSTERS, init), 3)
        what = f"kmeans_1d(init={init!r})"
        rows.append({"what": what, "seconds": f"{seconds:.2f}", "/ bucketize": f"{seconds / search:.2f}"})
    memory = []
    for clusters, rate in ((16, 0.0), (CLUSTERS, 0.0), (65_536, 0.0), (64, 0.01)):
        for weighted in (False, True):
            command = [sys.executable, __file__, "--memory", str(clusters), str(rate), str(int(weighted))]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            memory.append(
                {
                    "clusters": clusters,
                    "rate": rate,
                    "weights": "yes" if weighted else "no",
                    "peak beyond the tensor, MB": f"{found['bytes'] / 1e6:.0f}",
                    "/ size of the tensor": f"{found['bytes'] / (4 * LARGE_VALUES):.2f}",
                }
            )
    body = (
        f"{LARGE_VALUES:,} normal values into {CLUSTERS} clusters, {torch.get_num_threads()} threads, median of 3 runs."
        f"\n\n{markdown(rows)}\n\nMemory, the codes that are returned included; one process each.\n\n{markdown(memory)}"
    )
    write_section("1-D k-means: a large tensor", command=COMMAND, body=body)


def peak_memory(clusters: int, rate: float, weighted: bool) -> int:
    """Return the bytes that one call takes at most beyond its arguments (Linux)."""

    def status(key: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])

    kmeans_1d(torch.randn(100_000), 64, rate=0.01, weights=torch.rand(100_000))  # what is loaded once is no part of it
    values = torch.randn(LARGE_VALUES, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(LARGE_VALUES) if weighted else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    kmeans_1d(values, clusters, rate=rate, weights=weights)
    return status("VmHWM") - before


def trained_network(data: DigitsDataModule) -> nn.Module:
    """Train DigitsNet for some seconds."""
    torch.manual_seed(0)
    network = DigitsNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(15):
        for images, labels in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def starts_on_a_network(network: nn.Module, data: DigitsDataModule) -> None:
    """Measure what the start means for a trained network, shared without any retraining."""
    batches = list(data.test_dataloader())
    right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in batches)
    total = sum(len(labels) for _, labels in batches)
    rows = []
    for clusters in (4, 8, 16, 32, 256):
        errors: dict[str, list[float]] = {init: [] for init in INITS}
        accuracy: dict[str, list[float]] = {init: [] for init in INITS}
        for init in INITS:
            for seed in range(5 if init in ("random", "kmeans++") else 1):
                shared, error = copy.deepcopy(network), 0.0
                for layer in shared.modules():
                    if isinstance(layer, nn.Conv2d | nn.Linear):
                        centroids, codes = ours(layer.weight, clusters, init, seed)
                        error += squared_error(layer.weight, centroids, codes)
                        layer.weight.copy_(centroids[codes.long()])
                hits = sum(int((shared(images).argmax(1) == labels).sum()) for images, labels in batches)
                errors[init].append(error)
                accuracy[init].append(100 * hits / total)
        least = errors["optimal"][0]
        means = {init: (statistics.mean(errors[init]) / least, statistics.mean(accuracy[init])) for init in INITS}
        rows.append(
            {"clusters": clusters, **{init: f"{ratio:.3f}, {hits:.1f} %" for init, (ratio, hits) in means.items()}}
        )
    body = (
        f"DigitsNet ({100 * right / total:.1f} % of {total} test images), every layer shared, not retrained: inertia "
        f"relative to the optimal start, and test accuracy. Random starts: mean of 5 seeds.\n\n{markdown(rows)}"
    )
    write_section("1-D k-means: starts on a trained network", command=COMMAND, body=body)


def main() -> None:
    """Measure, and write the sections."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", nargs=3, metavar=("CLUSTERS", "RATE", "WEIGHTED"), help="measure one peak, as JSON")
    arguments = parser.parse_args()
    if arguments.memory:
        clusters, rate, weighted = arguments.memory
        print(json.dumps({"bytes": peak_memory(int(clusters), float(rate), bool(int(weighted)))}))
        return
    beside_scikit_learn()
    beside_the_optimum()
    large_tensor()
    data = DigitsDataModule()
    data.setup()
    starts_on_a_network(trained_network(data), data)


if __name__ == "__main__":
    main()
