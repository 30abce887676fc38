"""The partition of sorted points into clusters of the least squared error: the optimal start of a 1-D k-means."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_EXACT_POINTS, _EXACT_SPLITS = 1 << 11, 1 << 22
_COARSE_BINS, _EXACT_CLUSTERS = 1 << 10, 32
_PLACES = 33  # of each edge in one move, half of them to either side
_FIRST_REACH, _LEAST_REACH = 2.0, 0.1  # clusters
_WORTH_MOVING, _MOST_MOVES = 1e-3, 60


def optimal_centroids(points: Floats, counts: Floats, clusters: int) -> Floats:
    """Return the centroids of a partition of sorted points with the least squared error, or nearly.

    Exactly for up to 2,048 points, or four to a cluster. For more, exactly with 32 clusters of 1,024 merged points;
    these intervals are cut into as many pieces as their errors are worth, and all edges are then moved together among
    the single points.

    >>> optimal_centroids(np.array([0.0, 1.0, 9.0]), np.ones(3), 2).tolist()
    [0.5, 9.0]
    """
    w, m, q = _cumulative(points, counts)
    if len(points) <= max(_EXACT_POINTS, 4 * clusters) and len(points) * clusters <= _EXACT_SPLITS:
        edges = _exact_edges(w, m, q, clusters)
    else:
        share = np.append(0.0, _cube_root_share(points, counts))
        group = (share[:-1] / share[-1] * _COARSE_BINS).astype(np.int64)
        starts = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(points))
        # An outlier can have nearly all of the share: then there are few groups, and the pieces below do the work.
        coarse = min(clusters, _EXACT_CLUSTERS, len(starts) - 1)
        edges = starts[_exact_edges(w[starts], m[starts], q[starts], coarse)]
        pieces = np.append(0, np.cumsum(_pieces(_errors(edges[:-1], edges[1:], w, m, q), np.diff(edges), clusters)))
        cuts = np.searchsorted(share, np.interp(np.arange(clusters + 1), pieces, share[edges]))
        cuts[pieces] = edges
        edges = _move_edges(cuts, w, m, q)
    first, last = edges[:-1], edges[1:]
    full = last > first
    means: Floats = (m[last] - m[first])[full] / (w[last] - w[first])[full]
    return means + np.average(points, weights=counts)


def _pieces(errors: Floats, points: Integers, clusters: int) -> Integers:
    """Return into how many clusters to cut each interval: n equal pieces of it have about 1 / n**2 of its error."""
    pieces = np.ones(len(errors), dtype=np.int64)
    for _ in range(clusters - len(errors)):
        gain = errors * (1 / pieces**2 - 1 / (pieces + 1) ** 2)
        pieces[np.where(pieces < points, gain, -1.0).argmax()] += 1
    return pieces


def _cube_root_share(points: Floats, counts: Floats) -> Floats:
    """Return the running integral of the cube root of the density.

    The best centroids of many clusters are dense like the cube root of the density (Panter and Dite 1951): bins of
    equal share keep the resolution of the tails, which equal counts would take, and of the centre too, unlike widths.
    """
    width = np.gradient(points)
    return np.cumsum(np.cbrt(counts / width) * width)


def _cumulative(points: Floats, counts: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the cumulative count, first and second moment about the mean, each from 0."""
    centred = points - np.average(points, weights=counts)  # against cancellation in the second moments
    w, m, q = (np.concatenate([[0.0], np.cumsum(counts * centred**p)]) for p in range(3))
    return w, m, q


def _errors(first: Integers, last: Integers, w: Floats, m: Floats, q: Floats) -> Floats:
    """Return the squared error of the clusters from ``first`` to before ``last``; infinite where they end too early."""
    weight, moment = w[last] - w[first], m[last] - m[first]
    error = np.maximum(q[last] - q[first] - moment * moment / np.where(weight > 0, weight, 1.0), 0.0)
    return np.where(weight < 0, np.inf, error)


def _move_edges(edges: Integers, w: Floats, m: Floats, q: Floats) -> Integers:
    """Move all edges together, first by up to two clusters, then in ever smaller steps, while that helps."""
    reach, before = _FIRST_REACH, np.inf
    for _ in range(_MOST_MOVES):
        edges, error = _moved_once(edges, w, m, q, reach)
        if error > before * (1 - _WORTH_MOVING):
            reach /= 2
        if reach < _LEAST_REACH:
            break
        before = error
    return edges


def _moved_once(edges: Integers, w: Floats, m: Floats, q: Floats, reach: float) -> tuple[Integers, float]:
    """Return the best edges among some places of each, up to ``reach`` clusters away, and their squared error.

    Dynamic programming over all edges. The present place is among them, so the error never rises.
    """
    room = np.concatenate([[0.0], (edges[2:] - edges[:-2]) / 2, [0.0]])
    half = _PLACES // 2
    step = np.maximum(room * reach / half, 1.0)  # a point at least: clusters that hold none must be able to move
    step[[0, -1]] = 0.0
    offsets = np.rint(step[:, None] * np.arange(-half, half + 1)).astype(np.int64)
    places = np.clip(edges[:, None] + offsets, 0, len(w) - 1)
    best, column, choices = np.zeros(_PLACES), np.arange(_PLACES), []
    for start in range(0, len(edges) - 1, 32):  # in blocks, to bound the memory
        first, last = places[start : start + 32][: len(edges) - 1 - start], places[start + 1 : start + 33]
        for error in _errors(first[:, :, None], last[:, None, :], w, m, q):
            total = best[:, None] + error
            choice = total.argmin(0)
            best = total[choice, column]
            choices.append(choice)
    moved, at = edges.copy(), int(best.argmin())
    least = float(best[at])
    for k in range(len(edges) - 2, 0, -1):
        at = choices[k][at]
        moved[k] = places[k, at]
    return moved, least


def _exact_edges(w: Floats, m: Floats, q: Floats, clusters: int) -> Integers:
    """Return the edges of the partition with the least squared error (Wang and Song 2011, "Ckmeans.1d.dp").

    cost[j] = min over i <= j of (cost of i..j as one cluster) + (previous cost[i - 1]); the best i never falls when j
    rises, so each row is solved for the middle j of all open ranges at once, level by level: O(k n log n), in numpy.
    """
    n = len(w) - 1
    cost = q[1:] - m[1:] ** 2 / w[1:]
    splits = np.zeros((clusters, n), dtype=np.int32)
    for k in range(1, clusters):
        cost, splits[k] = _next_row(np.concatenate([[0.0], cost]), splits[k - 1], w, m, q)
    edges = np.zeros(clusters + 1, dtype=np.int64)
    edges[clusters] = n
    for k in range(clusters - 1, 0, -1):
        edges[k] = splits[k, edges[k + 1] - 1]
    return edges


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
