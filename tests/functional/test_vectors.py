import pytest
import torch
from sklearn.cluster import KMeans

from lightning_edge.functional import vectors
from lightning_edge.functional.vectors import kmeans_vectors


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inertia(values, centroids, codes, weights=1.0):
    return float((weights * (values - centroids[codes.long()]).square()).sum())


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_codes_are_nearest_and_centroids_are_weighted_means(block, weighted):
    values = torch.randn(600, block, generator=seeded())
    weights = torch.rand(600, block, generator=seeded(1)) if weighted else None
    centroids, codes = kmeans_vectors(values, 8, weights=weights, iterations=200, generator=seeded())
    importance = torch.ones_like(values) if weights is None else weights
    distance = (importance[:, None] * (values[:, None] - centroids).square()).sum(-1)
    assert codes.dtype == torch.int32
    assert torch.equal(codes.long(), distance.argmin(1))
    for k in range(8):
        mine, weight = values[codes == k], importance[codes == k]
        torch.testing.assert_close(centroids[k], (mine * weight).sum(0) / weight.sum(0))


def test_inertia_is_near_that_of_scikit_learn():
    values = torch.randn(3000, 4, generator=seeded())
    peer = KMeans(32, n_init=1, random_state=0).fit(values.numpy())
    assert inertia(values, *kmeans_vectors(values, 32, iterations=100, generator=seeded())) <= 1.03 * peer.inertia_


@pytest.mark.parametrize("clusters", [3, 10])
def test_no_more_distinct_vectors_than_clusters_are_kept_exactly(clusters):
    distinct = torch.tensor([[0.1, -2.0], [7.5, 0.3], [0.0, 0.0]])
    values = distinct[[0, 1, 2, 1, 0, 0]]
    centroids, codes = kmeans_vectors(values, clusters, generator=seeded())
    assert len(centroids) == 3
    assert torch.equal(centroids[codes.long()], values)


def test_a_large_tensor_starts_from_a_sample_and_leaves_no_cluster_empty(monkeypatch):
    monkeypatch.setattr(vectors, "_START_VECTORS", 64)
    values = torch.cat([torch.randn(3000, 2, generator=seeded()) * 0.01, torch.tensor([[9.0, 9.0]])])
    centroids, codes = kmeans_vectors(values, 16, iterations=50, generator=seeded())
    assert len(codes.unique()) == len(centroids) == 16


def test_one_seed_gives_one_result_on_any_number_of_threads():
    values = torch.randn(5000, 4, generator=seeded())
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(kmeans_vectors(values, 16, iterations=3, generator=seeded(5)))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_the_dtype_of_the_values_is_kept():
    values = torch.randn(100, 2, generator=seeded())
    for dtype in (torch.float64, torch.bfloat16):
        assert kmeans_vectors(values.to(dtype), 4, generator=seeded())[0].dtype == dtype


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        (torch.ones(4), {}, r"values must be of shape \(n, block\), not empty, got \(4,\)"),
        (torch.ones(0, 2), {}, r"values must be of shape \(n, block\), not empty, got \(0, 2\)"),
        (torch.tensor([[1.0, float("nan")]]), {}, "values must be finite"),
        (torch.ones(4, 2), {"iterations": 0}, "iterations must be at least 1, got 0"),
        (torch.ones(4, 2), {"weights": -torch.ones(4, 2)}, "weights must be finite and >= 0"),
    ],
)
def test_bad_input_is_named(values, arguments, message):
    with pytest.raises(ValueError, match=message):
        kmeans_vectors(values, 2, **arguments)
