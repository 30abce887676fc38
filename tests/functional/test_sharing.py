import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from lightning_edge.functional.partition import _cumulative, _errors, _exact_edges, optimal_centroids
from lightning_edge.functional.sharing import (
    INITS,
    _exact_means,
    cluster_means,
    kmeans_1d,
)


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
    centroids = optimal_centroids(sorted_points, counts, clusters)
    error = float((counts * ((sorted_points[:, None] - centroids) ** 2).min(1)).sum())
    assert error == pytest.approx(least_inertia(sorted_points, counts, clusters), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("clusters", [16, 64])
def test_inertia_of_the_optimal_start_is_not_above_that_of_scikit_learn(clusters):
    values = torch.distributions.Laplace(0.0, 1.0).sample((20_000,))
    peer = KMeans(clusters, n_init=1, random_state=0).fit(values.numpy()[:, None])
    assert inertia(values, *kmeans_1d(values, clusters, init="optimal")) <= peer.inertia_


@pytest.mark.parametrize("clusters", [24, 100])
def test_the_optimal_start_is_within_half_a_percent_of_the_exact_one_on_heavy_tails(clusters):
    normal = torch.randn(4, 2500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t with 3 degrees of freedom
    points = values.unique().numpy()
    w, m, q = _cumulative(points, np.ones(len(points)))
    edges = _exact_edges(w, m, q, clusters)
    exact = float(_errors(edges[:-1], edges[1:], w, m, q).sum())
    assert inertia(values, *kmeans_1d(values, clusters, init="optimal")) <= 1.005 * exact


def test_weighted_means_and_codes_are_those_of_repeated_values():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    times = torch.randint(1, 6, (500,), generator=torch.Generator().manual_seed(1))
    centroids, codes = kmeans_1d(values, 8, init="optimal", weights=times * 0.25)
    repeated, repeated_codes = kmeans_1d(values.repeat_interleave(times), 8, init="optimal")
    torch.testing.assert_close(centroids, repeated)
    assert torch.equal(codes.repeat_interleave(times), repeated_codes)


def test_weights_draw_the_centroids_to_what_matters():
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(3000, generator=torch.Generator().manual_seed(1)) ** 4

    def weighted_error(centroids, codes):
        return float((weights * (values - centroids[codes]).square()).sum())

    aware = weighted_error(*kmeans_1d(values, 8, init="optimal", weights=weights))
    assert aware < 0.995 * weighted_error(*kmeans_1d(values, 8, init="optimal"))


def test_a_mean_over_no_importance_is_the_plain_mean():
    values, codes = torch.tensor([1.0, 3.0, 5.0, 9.0]), torch.tensor([0, 0, 1, 1])
    weights = torch.tensor([0.0, 0.0, 1.0, 3.0])
    assert cluster_means(values, codes, 2, weights=weights).tolist() == [2.0, pytest.approx(8.0)]


def test_means_that_changed_places_are_sorted_and_unused_codes_dropped():
    values, codes = torch.tensor([5.0, 1.0, 3.0, 5.0]), torch.tensor([0, 3, 1, 0], dtype=torch.int32)
    centroids, codes = _exact_means(values, codes, 4, None)
    assert centroids.tolist() == [1.0, 3.0, 5.0]
    assert codes.tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize("size", [7, 40_000])
def test_neighbouring_floats_stay_two_values(size):
    low = torch.tensor(0.1)
    values = torch.stack([low, torch.nextafter(low, torch.tensor(1.0))]).repeat(size)
    centroids, codes = kmeans_1d(values, 2)
    assert torch.equal(centroids[codes], values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_values_is_kept(dtype):
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    centroids, codes = kmeans_1d(values, 8)
    assert centroids.dtype == dtype
    distance = (values[:, None].double() - centroids.double()).abs()
    assert bool((distance.gather(1, codes.long()[:, None])[:, 0] <= distance.min(1).values + 0.02).all())


@pytest.mark.parametrize("clusters", [16, 32, 100])
@pytest.mark.parametrize("outlier", [100.0, 1e4])
@pytest.mark.parametrize("init", ["linear", "optimal"])
def test_heavy_tails_leave_no_cluster_empty(init, outlier, clusters):
    body = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.01
    centroids, codes = kmeans_1d(torch.cat([body, torch.tensor([-outlier, outlier])]), clusters, init=init)
    assert len(centroids) == len(codes.unique()) == clusters


def test_outliers_cost_the_optimal_start_two_clusters_and_no_more():
    body = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.01
    alone = inertia(body, *kmeans_1d(body, 30, init="optimal"))
    values = torch.cat([body, torch.tensor([-100.0, 100.0])])
    assert inertia(values, *kmeans_1d(values, 32, init="optimal")) <= 1.005 * alone


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
    ("values", "clusters", "options", "message"),
    [
        (torch.empty(0), 2, {}, "values must not be empty"),
        (torch.tensor([1.0, float("nan")]), 2, {}, "values must be finite"),
        (torch.ones(3), 0, {}, "clusters must be a whole number >= 1.*got 0"),
        (torch.ones(3), 2, {"init": "best"}, "init must be one of .*'optimal'.*got 'best'"),
        (torch.ones(3), 2, {"rate": -0.5}, "rate must be a finite number >= 0.*got -0.5"),
        (torch.ones(3), 2, {"weights": torch.ones(2)}, r"weights must have the shape of values, \(3,\), got \(2,\)"),
        (torch.ones(2), 2, {"weights": torch.tensor([1.0, float("nan")])}, "weights must be finite and >= 0"),
    ],
)
def test_bad_input_is_named(values, clusters, options, message):
    with pytest.raises(ValueError, match=message):
        kmeans_1d(values, clusters, **options)
