"""One-dimensional k-means over a histogram: the shared values of a weight tensor, and which weight takes which.

The weights are read a few times, whatever the number of clusters: once into a fine histogram (counts and sums), on
which Lloyd's iterations cost a search of k boundaries each, once for the exact assignment and once for the exact means.
All of it happens in chunks: beyond the codes and the histogram, no copy of the values is made.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_edge.functional.partition import optimal_centroids
from lightning_edge.functional.rate import (
    IMPORTANCE_CLASSES,
    Cells,
    Importance,
    add_by,
    assign_1d,
    check_rate,
    chunks,
    log_bins,
    rate_aware,
)

Init = Literal["linear", "density", "random", "kmeans++", "optimal"]
INITS: tuple[Init, ...] = ("linear", "density", "random", "kmeans++", "optimal")
Floats = NDArray[np.float64]

_FINE_SHIFT = 14  # keys of 18 bits: 512 bins to each power of two
_CLASS_SHIFT = 16  # fewer where every bin is held once for each class of importance
_MAX_ITERATIONS = 1000


def kmeans_1d(
    values: Tensor,
    clusters: int,
    *,
    init: Init = "linear",
    weights: Tensor | None = None,
    rate: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster scalars: return the sorted centroids and the index of each value's centroid.

    Lloyd's algorithm on a histogram of logarithmic bins, each represented by the mean of what fell into it; clusters
    that run empty are put where the squared error is largest. ``init`` chooses the start:

    * ``"linear"``: equally spaced between the smallest and the largest value (best for large weights: Han et al. 2016,
      arXiv:1510.00149, section 3.2);
    * ``"density"``: equally spaced quantiles (same paper);
    * ``"random"``: values drawn without replacement; ``"kmeans++"``: Arthur and Vassilvitskii 2007, drawn by squared
      distance. Both need ``generator`` for repeatable results;
    * ``"optimal"``: the least squared error over a histogram, by dynamic programming.

    With a ``rate`` the clusters are rate-aware (entropy-constrained quantization: Chou, Lookabaugh, Gray 1989): a value
    takes the centroid of least ``weight * (value - centroid)**2 + rate * bits``, where the bits are -log2 of the share
    of all values in that cluster (counted, not weighted), and assignment, means and code lengths alternate until they
    stand still. Clusters that run empty disappear: give many clusters, and the rate decides how many are worth it.
    ``"linear"`` is the start for that: with entropy coding, equal steps are near the best.

    Memory beyond ``values``: the codes (4 bytes a value), a copy if ``values`` is not contiguous, and a few MB.

    Args:
        values: Finite numbers, any shape, not empty.
        clusters: Largest number of centroids, >= 1.
        init: Where the centroids start.
        weights: Importance of each value, >= 0, shape of ``values`` (squared gradients, say); all zero counts as equal.
        rate: Price of one bit in the unit of the weighted squared error, >= 0.
        generator: Source of the random draws.

    Returns:
        Centroids in ascending order, shape (k,) with k <= ``clusters`` (fewer when there are fewer distinct values or
        the rate left fewer), dtype of ``values``; and int32 codes of the shape of ``values``. Without a rate a code is
        the index of the nearest centroid.

    Raises:
        ValueError: If ``values`` is empty or not finite, ``clusters`` is below 1, ``init`` is unknown, or ``weights``
            or ``rate`` is out of its range.

    >>> kmeans_1d(torch.tensor([0.0, 0.2, 5.0, 5.2]), 2)
    (tensor([0.1000, 5.1000]), tensor([0, 0, 1, 1], dtype=torch.int32))
    """
    check_clusters(clusters)
    check_init(init)
    check_rate(rate)
    flat = values.detach().flatten()
    if flat.numel() == 0:
        raise ValueError("values must not be empty, got a tensor of no elements")
    importance = None if weights is None else Importance(weights, values)
    cells = _histogram(flat, importance, by_class=rate > 0.0)
    distinct = _few_distinct(flat, clusters)
    if distinct is not None and rate == 0.0:
        return distinct, torch.bucketize(flat, distinct, out_int32=True).view(values.shape)
    points, mass = _merge_classes(cells)
    start = _initial(points, mass, clusters, init, generator)
    if rate > 0.0:
        price = rate if importance is None else rate / importance.largest
        centroids, lengths = (torch.from_numpy(found) for found in rate_aware(cells, start, price))
        codes = assign_1d(values, centroids, bits=lengths, rate=rate, weights=weights).view(-1)
    else:
        centroids = torch.from_numpy(_lloyd(points, mass, start))
        codes = assign_1d(flat, centroids)
    centroids, codes = _exact_means(flat, codes, len(centroids), importance)
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


def cluster_means(values: Tensor, codes: Tensor, clusters: int, *, weights: Tensor | None = None) -> Tensor:
    """Return the mean of ``values`` in each cluster, summed in float64, shape (clusters,); 0 for an empty cluster.

    With ``weights``, importances >= 0 in the shape of ``values``, the weighted mean; a cluster whose weights are all
    zero has its plain mean.

    >>> cluster_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), 2)
    tensor([2., 5.], dtype=torch.float64)
    """
    importance = None if weights is None else Importance(weights, values)
    return _means(values.flatten(), codes.flatten(), clusters, importance)[0]


def _means(flat: Tensor, index: Tensor, clusters: int, importance: Importance | None) -> tuple[Tensor, Tensor]:
    """Return the mean and the mass (number or summed importance) of each cluster."""
    sums, mass = torch.zeros(2, clusters, dtype=torch.float64, device=flat.device)
    for part in chunks(flat):
        value, code = flat[part].double(), index[part]
        weight = None if importance is None else importance(part)
        add_by(mass, code, weight)
        add_by(sums, code, value if weight is None else value * weight)
    return torch.where(mass > 0, sums / mass, 0.0), mass


def _few_distinct(flat: Tensor, clusters: int) -> Tensor | None:
    """Return the distinct values when there are no more than ``clusters``; the first chunk mostly tells."""
    distinct = flat[:0]
    for part in (slice(0, 4 * clusters + 64), *chunks(flat)):
        distinct = torch.unique(torch.cat([distinct, flat[part]]))
        if len(distinct) > clusters:
            return None
    return distinct


def _histogram(flat: Tensor, importance: Importance | None, *, by_class: bool) -> list[Cells]:
    """Return the bins that are not empty, in ascending order: one list, or one for each class of importance."""
    classes = IMPORTANCE_CLASSES if by_class and importance is not None else 1
    shift = _FINE_SHIFT if classes == 1 else _CLASS_SHIFT
    bins, numbers = 1 << 32 - shift, None
    if classes > 1:  # number the bins that occur, so that their classes take little memory
        seen = torch.zeros(bins, dtype=torch.bool, device=flat.device)
        for part in chunks(flat):
            seen[log_bins(flat[part], shift)] = True
        numbers, bins = seen.cumsum(0) - 1, int(seen.sum())
    # numpy's zeros cost nothing where no value falls, and start no threads.
    counts, mass, moment = (torch.from_numpy(np.zeros(bins * classes)).to(flat.device) for _ in range(3))
    for part in chunks(flat):
        cell, value = log_bins(flat[part], shift), flat[part].double()
        if importance is not None:
            weight = importance(part)
            if numbers is not None:
                cell = numbers[cell] * classes + importance.classes(weight)
            add_by(mass, cell, weight)
            value *= weight
        add_by(counts, cell)
        add_by(moment, cell, value)
    mass = counts if importance is None else mass
    columns = zip(*(table.cpu().numpy().reshape(bins, classes).T for table in (counts, mass, moment)), strict=True)
    return [_cells(*column) for column in columns if column[0].any()]


def _cells(counts: Floats, mass: Floats, moment: Floats) -> Cells:
    filled = np.flatnonzero(counts)
    counts, mass = counts[filled], mass[filled]
    return Cells(float(mass.sum() / counts.sum()), moment[filled] / mass, counts, mass)


def _merge_classes(cells: Sequence[Cells]) -> tuple[Floats, Floats]:
    """Return the points of all classes in ascending order, and their mass."""
    if len(cells) == 1:
        return cells[0].points, cells[0].mass
    points, position = np.unique(np.concatenate([cell.points for cell in cells]), return_inverse=True)
    mass = np.bincount(position, weights=np.concatenate([cell.mass for cell in cells]))
    return points, mass.astype(np.float64)


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
        return optimal_centroids(points, counts, clusters)
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


def _exact_means(flat: Tensor, codes: Tensor, clusters: int, importance: Importance | None) -> tuple[Tensor, Tensor]:
    """Return the means of the assigned values in ascending order, without the clusters that took none."""
    exact, mass = _means(flat, codes, clusters, importance)
    means, used = exact.to(flat.dtype), mass.nonzero().flatten()
    order = used[means[used].argsort(stable=True)]
    if torch.equal(order, torch.arange(clusters, device=order.device)):
        return means, codes
    renumber = torch.zeros(clusters, dtype=torch.int32, device=codes.device)
    renumber[order] = torch.arange(len(order), dtype=torch.int32, device=codes.device)
    for part in chunks(codes):
        codes[part] = renumber.index_select(0, codes[part])
    return means[order], codes
