"""One-dimensional k-means over a histogram: the shared values of a weight tensor, and which weight takes which.

The weights are read a few times, whatever the number of clusters: once into a fine histogram (counts and sums), on
which Lloyd's iterations cost a search of k boundaries each, once for the exact assignment and once for the exact means.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_edge.functional.floats import sortable_bits

Init = Literal["linear", "density", "random", "kmeans++", "optimal"]
INITS: tuple[Init, ...] = ("linear", "density", "random", "kmeans++", "optimal")
Floats = NDArray[np.float64]

_FINE_SHIFT = 14  # keys of 18 bits: 512 bins to each power of two
_COARSE_BINS = 1 << 11
_MAX_ITERATIONS = 1000


def kmeans_1d(
    values: Tensor, clusters: int, *, init: Init = "linear", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster scalars: return the sorted centroids and the index of each value's centroid.

    Lloyd's algorithm on a histogram of logarithmic bins, each represented by the mean of what fell into it; clusters
    that run empty are put where the squared error is largest. ``init`` chooses the start:

    * ``"linear"``: equally spaced between the smallest and the largest value (best for large weights: Han et al. 2016,
      arXiv:1510.00149, section 3.2);
    * ``"density"``: equally spaced quantiles (same paper);
    * ``"random"``: values drawn without replacement; ``"kmeans++"``: Arthur and Vassilvitskii 2007, drawn by squared
      distance. Both need ``generator`` for repeatable results;
    * ``"optimal"``: the least squared error over a coarse histogram, by dynamic programming with divide and conquer
      (the monotone splits of Wang and Song 2011, "Ckmeans.1d.dp").

    Args:
        values: Finite numbers, any shape, not empty.
        clusters: Largest number of centroids, >= 1.
        init: Where the centroids start.
        generator: Source of the random draws.

    Returns:
        Centroids in ascending order, shape (k,) with k <= ``clusters`` (fewer when there are fewer distinct values),
        dtype of ``values``; and int32 codes of the shape of ``values``: the index of the nearest centroid.

    Raises:
        ValueError: If ``values`` is empty or not finite, ``clusters`` is below 1 or ``init`` is unknown.

    >>> kmeans_1d(torch.tensor([0.0, 0.2, 5.0, 5.2]), 2)
    (tensor([0.1000, 5.1000]), tensor([0, 0, 1, 1], dtype=torch.int32))
    """
    check_clusters(clusters)
    check_init(init)
    flat = values.detach().flatten()
    if flat.numel() == 0:
        raise ValueError("values must not be empty, got a tensor of no elements")
    keys = sortable_bits(flat, what="values")
    distinct = _few_distinct(flat, clusters)
    if distinct is not None:
        centroids = distinct
    else:
        points, counts = _histogram(flat, keys)
        start = _initial(points, counts, clusters, init, generator)
        centroids = torch.from_numpy(_lloyd(points, counts, start)).to(flat)
    boundaries = (centroids[1:] + centroids[:-1]) / 2
    codes = torch.bucketize(flat, boundaries, out_int32=True)
    if distinct is None:
        centroids, codes = _exact_means(flat, codes, len(centroids))
    return centroids, codes.view(values.shape)


def check_clusters(clusters: int) -> None:
    """Raise a ValueError unless ``clusters`` is a whole number of at least 1.

    >>> check_clusters(16)
    """
    if isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 1:
        raise ValueError(f"clusters must be a whole number >= 1, the shared values of a layer, got {clusters!r}")


def check_init(init: str) -> None:
    """Raise a ValueError unless ``init`` is a known start.

    >>> check_init("linear")
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {list(INITS)}, got {init!r}")


def cluster_means(values: Tensor, codes: Tensor, clusters: int) -> Tensor:
    """Return the mean of ``values`` in each cluster, summed in float64, shape (clusters,); 0 for an empty cluster.

    >>> cluster_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), 2)
    tensor([2., 5.], dtype=torch.float64)
    """
    flat, index = values.flatten().double(), codes.flatten()
    counts = torch.bincount(index, minlength=clusters)
    if flat.is_cuda:  # bincount adds up in the order of the threads there: sort, so that every rank gets the same bits
        return torch.segment_reduce(flat[index.argsort(stable=True)], "sum", lengths=counts) / counts.clamp(min=1)
    return torch.bincount(index, weights=flat, minlength=clusters) / counts.clamp(min=1)


def _few_distinct(flat: Tensor, clusters: int) -> Tensor | None:
    """Return the distinct values when there are no more than ``clusters``, seen cheaply on a sample first."""
    if len(torch.unique(flat[: 4 * clusters + 64])) > clusters:
        return None
    distinct = torch.unique(flat)
    return distinct if len(distinct) <= clusters else None


def _histogram(flat: Tensor, keys: Tensor) -> tuple[Floats, Floats]:
    """Return the mean and the count of every bin that is not empty, in ascending order."""
    index = (keys >> _FINE_SHIFT) + (1 << 31 - _FINE_SHIFT)
    counts = torch.bincount(index).cpu().numpy().astype(np.float64)
    sums = torch.bincount(index, weights=flat.double()).cpu().numpy()
    filled = counts > 0
    return sums[filled] / counts[filled], counts[filled]


def _initial(points: Floats, counts: Floats, clusters: int, init: Init, generator: torch.Generator | None) -> Floats:
    clusters = min(clusters, len(points))
    if init == "linear":
        linear: Floats = points[0] + (points[-1] - points[0]) * np.linspace(0.0, 1.0, clusters)
        return linear
    if init == "density":
        quantiles = (np.arange(clusters) + 0.5) / clusters * counts.sum()
        density: Floats = points[np.searchsorted(np.cumsum(counts), quantiles)]
        return density
    if init == "optimal":
        return _optimal(*_merge_bins(points, counts, max(_COARSE_BINS, 4 * clusters)), clusters)
    if init == "random":
        picked = torch.multinomial(torch.from_numpy(counts), clusters, generator=generator).numpy()
        return points.take(np.sort(picked))
    return _kmeans_plus_plus(points, counts, clusters, generator)


def _kmeans_plus_plus(points: Floats, counts: Floats, clusters: int, generator: torch.Generator | None) -> Floats:
    weight = counts
    chosen: list[float] = []
    distance = np.full(len(points), np.inf)
    for _ in range(clusters):
        chosen.append(points[int(torch.multinomial(torch.from_numpy(weight), 1, generator=generator))])
        distance = np.minimum(distance, (points - chosen[-1]) ** 2)
        weight = counts * distance
    return np.sort(np.array(chosen))


def _merge_bins(points: Floats, counts: Floats, bins: int) -> tuple[Floats, Floats]:
    """Merge neighbours into at most ``bins`` points of about equal share of the cube root of the density.

    The best centroids of many clusters are dense like the cube root of the density (Panter and Dite 1951): so the
    tails keep their resolution, which equal counts would take from them, and the centre too, unlike equal widths.
    """
    if len(points) <= bins:
        return points, counts
    width = np.gradient(points)
    share = np.cumsum(np.cbrt(counts / width) * width)
    group = np.minimum((share / share[-1] * bins).astype(np.int64), bins - 1)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    merged = np.add.reduceat(counts, starts)
    return np.add.reduceat(points * counts, starts) / merged, merged


def _optimal(points: Floats, counts: Floats, clusters: int) -> Floats:
    """Return the centroids of the partition of sorted points with the least squared error.

    cost[j] = min over i <= j of (cost of i..j as one cluster) + (previous cost[i - 1]); the best i never falls when j
    rises, so each row is solved for the middle j of all open ranges at once, level by level: O(k n log n), in numpy.
    """
    n = len(points)
    centred = points - np.average(points, weights=counts)  # against cancellation in the second moments
    w, m, q = (np.concatenate([[0.0], np.cumsum(counts * centred**p)]) for p in range(3))
    cost = q[1:] - m[1:] ** 2 / w[1:]
    splits = np.zeros((clusters, n), dtype=np.int32)
    for k in range(1, clusters):
        cost, splits[k] = _next_row(np.concatenate([[0.0], cost]), splits[k - 1], w, m, q)
    edges = np.zeros(clusters + 1, dtype=np.int64)
    edges[clusters] = n
    for k in range(clusters - 1, 0, -1):
        edges[k] = splits[k, edges[k + 1] - 1]
    first, last = edges[:-1], edges[1:]
    full = last > first
    means: Floats = (m[last] - m[first])[full] / (w[last] - w[first])[full]
    return means + np.average(points, weights=counts)


def _next_row(
    before: Floats, least_split: NDArray[np.int32], w: Floats, m: Floats, q: Floats
) -> tuple[Floats, NDArray[np.int32]]:
    n = len(before) - 1
    cost, split = np.empty(n), np.zeros(n, dtype=np.int32)
    # One level: open ranges of ends j, each with the range of starts i that its best split can have.
    lo_j, hi_j, lo_i, hi_i = (np.array([v]) for v in (0, n - 1, 0, n - 1))
    while len(lo_j):
        j = (lo_j + hi_j) // 2
        first = np.maximum(lo_i, least_split[j])  # with one cluster more, the last one starts no earlier
        length = np.minimum(hi_i, j) - first + 1
        starts = np.concatenate([[0], np.cumsum(length)[:-1]])
        i = np.arange(length.sum()) - np.repeat(starts - first, length)
        end = np.repeat(j + 1, length)
        weight, moment = w[end] - w[i], m[end] - m[i]
        value = before[i] + (q[end] - q[i]) - moment * moment / weight
        least = np.minimum.reduceat(value, starts)
        hits = np.flatnonzero(value == np.repeat(least, length))
        owner = np.searchsorted(starts, hits, side="right") - 1
        best = i[hits[np.searchsorted(owner, np.arange(len(j)))]]
        cost[j], split[j] = least, best
        left, right = lo_j < j, j < hi_j
        lo_j, hi_j, lo_i, hi_i = (
            np.concatenate(pair)
            for pair in (
                (lo_j[left], j[right] + 1),
                (j[left] - 1, hi_j[right]),
                (lo_i[left], best[right]),
                (best[left], hi_i[right]),
            )
        )
    return cost, split


def _lloyd(points: Floats, counts: Floats, centroids: Floats) -> Floats:
    """Alternate nearest-centroid partition and means, on cumulative sums, until the partition stands still."""
    w = np.concatenate([[0.0], np.cumsum(counts)])
    m = np.concatenate([[0.0], np.cumsum(counts * points)])
    q = np.concatenate([[0.0], np.cumsum(counts * points**2)])
    before, wanted = None, min(len(centroids), len(points))
    for _ in range(_MAX_ITERATIONS):
        edges = np.concatenate([[0], np.searchsorted(points, (centroids[1:] + centroids[:-1]) / 2), [len(points)]])
        if before is not None and np.array_equal(edges, before):
            break
        before = edges
        weight, moment = np.diff(w[edges]), np.diff(m[edges])
        full = weight > 0
        centroids = moment[full] / weight[full]
        missing = wanted - len(centroids)
        if missing:
            error = np.diff(q[edges])[full] - centroids * moment[full]
            centroids = _split_worst(centroids, error, weight[full], missing)
    return centroids


def _split_worst(centroids: Floats, error: Floats, weight: Floats, count: int) -> Floats:
    """Replace the ``count`` clusters of largest squared error by two centroids each, one deviation apart."""
    worst = np.argsort(error, kind="stable")[::-1][:count]
    spread = np.sqrt(np.maximum(error[worst], 0.0) / weight[worst]) / 2
    moved = centroids.copy()
    moved[worst] -= spread
    return np.unique(np.concatenate([moved, centroids[worst] + spread]))


def _exact_means(flat: Tensor, codes: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Return the means of the assigned values and codes without the clusters that took none."""
    counts = torch.bincount(codes, minlength=clusters)
    used = counts > 0
    means = cluster_means(flat, codes, clusters).to(flat.dtype)
    renumber = (used.cumsum(0) - 1).to(torch.int32)
    return means[used], renumber[codes] if not bool(used.all()) else codes
