import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from lightning_edge.functional.sharing import INITS, _optimal, cluster_means, kmeans_1d


def inertia(values, centroids, codes):
    return float((values - centroids[codes]).double().square().sum())


def least_inertia(points, counts, clusters):
    """Try every partition of the sorted points."""
    best = np.inf
    for cuts in itertools.combinations(range(1, len(points)), clusters - 1):
        total = 0.0
        for first, last in itertools.pairwise([0, *cuts, len(points)]):
            mean = np.average(points[first:last], weights=counts[first:last])
            total += float((counts[first:last] * (points[first:last] - mean) ** 2).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("clusters", [1, 2, 7, 32])
def test_codes_are_nearest_and_centroids_are_means(init, clusters):
    values = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    centroids, codes = kmeans_1d(values, clusters, init=init, generator=torch.Generator().manual_seed(2))
    assert len(centroids) == clusters
    assert bool((centroids[1:] > centroids[:-1]).all())
    assert codes.shape == values.shape
    means = [values[codes == k].double().mean() for k in range(clusters)]
    torch.testing.assert_close(centroids.double(), torch.stack(means), rtol=1e-6, atol=1e-7)
    distance = (values[..., None] - centroids).abs()
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    # Assigned to the nearest centroid before the exact means were taken, which moves them by less than a bin.
    assert bool((chosen <= distance.min(-1).values + values.abs() / 256).all())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=3, max_size=9, unique=True), st.integers(1, 4), st.integers(0, 99))
def test_the_optimal_start_is_the_best_of_all_partitions(points, clusters, seed):
    clusters = min(clusters, len(points))
    sorted_points = np.sort(np.array(points, dtype=np.float64))
    counts = np.random.default_rng(seed).integers(1, 5, len(points)).astype(np.float64)
    centroids = _optimal(sorted_points, counts, clusters)
    error = float((counts * ((sorted_points[:, None] - centroids) ** 2).min(1)).sum())
    assert error == pytest.approx(least_inertia(sorted_points, counts, clusters), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("clusters", [16, 64])
def test_inertia_of_the_optimal_start_is_not_above_that_of_scikit_learn(clusters):
    values = torch.distributions.Laplace(0.0, 1.0).sample((20_000,))
    peer = KMeans(clusters, n_init=1, random_state=0).fit(values.numpy()[:, None])
    assert inertia(values, *kmeans_1d(values, clusters, init="optimal")) <= peer.inertia_


def test_heavy_tails_leave_no_cluster_empty():
    values = torch.cat([torch.randn(10_000) * 0.01, torch.tensor([-100.0, 100.0])])
    centroids, codes = kmeans_1d(values, 32)
    assert len(centroids) == 32
    assert len(codes.unique()) == 32


@pytest.mark.parametrize("init", INITS)
def test_no_more_distinct_values_than_clusters_are_kept_exactly(init):
    values = torch.tensor([0.1, -2.0, 0.1, 7.5, -2.0])
    centroids, codes = kmeans_1d(values, 4, init=init, generator=torch.Generator().manual_seed(0))
    assert centroids.tolist() == torch.tensor([-2.0, 0.1, 7.5]).tolist()
    assert torch.equal(centroids[codes], values)


@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_random_starts_repeat_with_the_generator(init):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    first, second = (kmeans_1d(values, 16, init=init, generator=torch.Generator().manual_seed(5))[0] for _ in "12")
    assert torch.equal(first, second)


def test_cluster_means_match_a_loop_and_empty_clusters_are_zero():
    values, codes = torch.randn(100), torch.randint(0, 3, (100,))
    means = cluster_means(values, codes, 4)
    torch.testing.assert_close(means[:3], torch.stack([values[codes == k].double().mean() for k in range(3)]))
    assert means[3] == 0.0


@pytest.mark.parametrize(
    ("values", "clusters", "init", "message"),
    [
        (torch.empty(0), 2, "linear", "values must not be empty"),
        (torch.tensor([1.0, float("nan")]), 2, "linear", "values must be finite"),
        (torch.ones(3), 0, "linear", "clusters must be a whole number >= 1.*got 0"),
        (torch.ones(3), 2, "best", "init must be one of .*'optimal'.*got 'best'"),
    ],
)
def test_bad_input_is_named(values, clusters, init, message):
    with pytest.raises(ValueError, match=message):
        kmeans_1d(values, clusters, init=init)
