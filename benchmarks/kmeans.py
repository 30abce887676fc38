"""Time and inertia of our 1-D k-means against scikit-learn's, one million values into 256 clusters, in one run.

Run: python benchmarks/kmeans.py
"""

import statistics
import time
from collections.abc import Callable

import torch
from results import markdown, write_section
from sklearn.cluster import KMeans

from lightning_edge.functional.sharing import INITS, kmeans_1d

VALUES, CLUSTERS, REPEATS = 1_000_000, 256, 5


def timed(run: Callable[[], tuple[torch.Tensor, torch.Tensor]], repeats: int) -> tuple[float, torch.Tensor]:
    """Return the median seconds of some runs, and the shared values of the last."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        centroids, codes = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), centroids[codes.long()]


def main() -> None:
    """Measure, and write the section."""
    values = torch.randn(VALUES, generator=torch.Generator().manual_seed(0))

    def sklearn() -> tuple[torch.Tensor, torch.Tensor]:
        fitted = KMeans(CLUSTERS, n_init=1, random_state=0).fit(values.numpy()[:, None])
        return torch.from_numpy(fitted.cluster_centers_[:, 0]), torch.from_numpy(fitted.labels_)

    def ours(init: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        return lambda: kmeans_1d(values, CLUSTERS, init=init, generator=torch.Generator().manual_seed(0))

    peer_seconds, peer_shared = timed(sklearn, 1)
    peer_inertia = float((values - peer_shared).double().square().sum())
    rows = [
        {
            "method": "scikit-learn KMeans(n_init=1)",
            "seconds": f"{peer_seconds:.2f}",
            "times faster": "1",
            "inertia": f"{peer_inertia:.3f}",
            "inertia / scikit-learn's": "1",
        }
    ]
    for init in INITS:
        seconds, shared = timed(ours(init), REPEATS)
        inertia = float((values - shared).double().square().sum())
        rows.append(
            {
                "method": f"kmeans_1d(init={init!r})",
                "seconds": f"{seconds:.3f}",
                "times faster": f"{peer_seconds / seconds:.0f}",
                "inertia": f"{inertia:.3f}",
                "inertia / scikit-learn's": f"{inertia / peer_inertia:.3f}",
            }
        )
    body = f"{VALUES:,} normal values into {CLUSTERS} clusters; ours: median of {REPEATS} runs.\n\n{markdown(rows)}"
    write_section("1-D k-means", command="python benchmarks/kmeans.py", body=body)


if __name__ == "__main__":
    main()
