import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional import rate as rate_module
from lightning_edge.functional.rate import assign_1d, code_lengths, envelope
from lightning_edge.functional.sharing import INITS, cluster_means, kmeans_1d


def costs(values, centroids, bits, rate, weights=None):
    """The cost of every value at every centroid, in float64."""
    importance = 1.0 if weights is None else weights.double()[:, None]
    return importance * (values.double()[:, None] - centroids.double()).square() + rate * bits


def chosen_costs(values, centroids, bits, rate, codes, weights=None):
    return costs(values, centroids, bits, rate, weights).gather(1, codes.long()[:, None])[:, 0]


def total_cost(values, centroids, codes, rate, weights=None):
    bits = code_lengths(codes, len(centroids))
    return float(chosen_costs(values, centroids, bits, rate, codes, weights).sum())


def slow_rate_aware(values, start, rate, weights):
    """Chou, Lookabaugh and Gray's alternation over single values, every cost computed."""
    centroids, bits = start.double(), torch.zeros(len(start), dtype=torch.float64)
    for _ in range(300):
        codes = costs(values, centroids, bits, rate, weights).argmin(1)
        used, codes = codes.unique(return_inverse=True)
        mass = torch.zeros(len(used)).double().index_add_(0, codes, weights.double())
        centroids = torch.zeros(len(used)).double().index_add_(0, codes, weights.double() * values.double()) / mass
        bits = -(torch.bincount(codes) / len(values)).double().log2()
    return centroids, codes


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12),
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30),
    st.floats(0, 4),
    st.integers(0, 99),
)
def test_every_value_takes_a_centroid_of_the_least_cost(centroids, values, rate, seed):
    centroids, values = torch.tensor(centroids), torch.tensor(values)
    bits = torch.from_numpy(np.random.default_rng(seed).exponential(3.0, len(centroids)))
    codes = assign_1d(values, centroids, bits=bits, rate=rate)
    least = costs(values, centroids, bits, rate).min(1).values
    torch.testing.assert_close(chosen_costs(values, centroids, bits, rate, codes), least, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 1e-3])  # the second puts several boundaries into one bin
def test_many_values_are_assigned_as_few_are(dtype, spread):
    values = (1 + spread * torch.randn(40_000, generator=torch.Generator().manual_seed(0))).to(dtype)
    centroids = 1 + spread * torch.linspace(-3, 3, 64).double()
    bits = torch.linspace(2, 9, 64)
    codes = assign_1d(values, centroids, bits=bits, rate=1e-3 * spread**2)
    few = [assign_1d(part, centroids, bits=bits, rate=1e-3 * spread**2) for part in values.split(1000)]
    assert torch.equal(codes, torch.cat(few))


@pytest.mark.parametrize("copies", [1, 1000])  # searched, and looked up
def test_neighbouring_floats_keep_their_own_centroid(copies):
    low = 1.37 ** torch.arange(-20.0, 20.0)
    centroids = torch.stack([low, torch.nextafter(low, torch.full_like(low, torch.inf))], 1).flatten()
    values = centroids.repeat(copies)
    assert torch.equal(centroids[assign_1d(values, centroids).long()], values)


@pytest.mark.parametrize("copies", [1, 40_000])
def test_a_tie_goes_to_the_smaller_centroid(copies):
    codes = assign_1d(torch.tensor([0.5]).repeat(copies), torch.tensor([0.0, 1.0]))
    assert codes.unique().tolist() == [0]


def test_centroids_may_come_in_any_order_and_twice():
    values, centroids = torch.tensor([-1.0, 0.1, 2.2]), torch.tensor([2.0, 0.0, -1.0, 0.0])
    bits = torch.tensor([1.0, 5.0, 1.0, 2.0])
    assert assign_1d(values, centroids, bits=bits, rate=1e-3).tolist() == [2, 3, 0]


def test_weighted_assignment_is_exact_when_a_class_holds_one_importance():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    weights = torch.where(torch.arange(500) % 20 == 0, 1.0, 0.6 * 2.0 ** -(torch.arange(500) % 20)) * 3e-9
    centroids, bits = torch.linspace(-2, 2, 9), torch.linspace(1, 8, 9).roll(3)
    codes = assign_1d(values, centroids, bits=bits, rate=1e-10, weights=weights)
    least = costs(values, centroids, bits, 1e-10, weights).min(1).values
    torch.testing.assert_close(
        chosen_costs(values, centroids, bits, 1e-10, codes, weights), least, rtol=1e-6, atol=1e-16
    )


def test_classes_of_importance_cost_little():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(5000, generator=generator), torch.randn(5000, generator=generator) ** 4
    weights[::7] = 0.0
    centroids, bits = torch.linspace(-3, 3, 33), code_lengths(torch.randn(5000).mul(5).int().clamp(-16, 16) + 16, 33)
    codes = assign_1d(values, centroids, bits=bits, rate=0.01, weights=weights)
    spent = chosen_costs(values, centroids, bits, 0.01, codes, weights).sum()
    assert float(spent) <= 1.005 * float(costs(values, centroids, bits, 0.01, weights).min(1).values.sum())


def test_weights_that_are_all_zero_count_as_equal():
    values, centroids, bits = torch.randn(50), torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([3.0, 1.0, 2.0])
    equal = assign_1d(values, centroids, bits=bits, rate=0.3)
    assert torch.equal(assign_1d(values, centroids, bits=bits, rate=0.3, weights=torch.zeros(50)), equal)


def test_code_lengths_are_entropies_and_finite():
    codes = torch.tensor([[0, 0, 0, 0], [1, 1, 3, 3]], dtype=torch.int32)
    assert code_lengths(codes, 5).tolist() == [1.0, 2.0, 4.0, 2.0, 4.0]


def test_a_dominated_line_has_no_region():
    kept, boundaries = envelope(np.array([0.0, 1.0, 2.0]), np.array([0.0, 5.0, 0.0]))
    assert kept.tolist() == [0, 2]
    assert boundaries.tolist() == [1.0]


@pytest.mark.parametrize("rate", [0.003, 0.03, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_rate_aware_clusters_cost_no_more_than_the_slow_alternation(rate, weighted):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4000, generator=generator)
    weights = torch.rand(4000, generator=generator) ** 3 if weighted else None
    centroids, codes = kmeans_1d(values, 32, rate=rate, weights=weights)
    importance = torch.ones(4000) if weights is None else weights
    start = torch.linspace(float(values.min()), float(values.max()), 32)
    slow = total_cost(values, *slow_rate_aware(values, start, rate, importance), rate, importance)
    assert total_cost(values, centroids, codes, rate, importance) <= 1.02 * slow
    assert bool((centroids.diff() > 0).all())
    assert len(codes.unique()) == len(centroids) <= 32
    torch.testing.assert_close(
        centroids.double(), cluster_means(values, codes, len(centroids), weights=weights), rtol=1e-6, atol=1e-7
    )


def test_a_higher_rate_spends_fewer_bits_and_leaves_fewer_clusters():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    entropies, sizes = [], []
    for rate in (0.0, 0.01, 0.1, 1.0, 100.0):
        centroids, codes = kmeans_1d(values, 64, rate=rate)
        entropies.append(float(code_lengths(codes, len(centroids))[codes.long()].mean()))
        sizes.append(len(centroids))
    assert entropies == sorted(entropies, reverse=True)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64
    assert sizes[-1] == 1


@pytest.mark.parametrize("init", INITS)
def test_a_rate_merges_even_few_distinct_values(init):
    values = torch.tensor([0.0] * 60 + [0.01] * 3 + [1.0] * 40)
    centroids, codes = kmeans_1d(values, 8, init=init, rate=0.01, generator=torch.Generator().manual_seed(0))
    assert len(centroids) == 2
    assert codes.tolist() == [0] * 63 + [1] * 40


def test_values_of_no_importance_take_the_cheapest_code():
    values, weights = torch.linspace(-1, 1, 1000), torch.ones(1000)
    weights[600:] = 0.0
    _, codes = kmeans_1d(values, 16, rate=0.01, weights=weights)
    counts = torch.bincount(codes)
    assert codes[600:].unique().tolist() == [int(counts.argmax())]


def test_threads_change_nothing():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(150_000, generator=generator), torch.rand(150_000, generator=generator)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append((*kmeans_1d(values, 16), *kmeans_1d(values, 16, rate=0.01, weights=weights)))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_the_bounds_of_chunks_change_no_code(monkeypatch):
    values, weights = torch.randn(5000), torch.rand(5000)
    whole = kmeans_1d(values, 16, rate=0.01, weights=weights)
    monkeypatch.setattr(rate_module, "_CPU_CHUNK", 777)
    parts = kmeans_1d(values, 16, rate=0.01, weights=weights)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centroids": torch.empty(0)}, r"centroids must be of shape \(k,\), k >= 1, got \(0,\)"),
        ({"bits": torch.ones(3)}, r"bits must be one per centroid, got \(3,\) for 2"),
        ({"rate": -1.0}, "rate must be a finite number >= 0.*got -1.0"),
        ({"rate": float("nan")}, "rate must be a finite number >= 0.*got nan"),
        ({"weights": torch.ones(3)}, r"weights must have the shape of values, \(2,\), got \(3,\)"),
        ({"weights": torch.tensor([1.0, -1.0])}, "weights must be finite and >= 0, got values from -1.0 to 1.0"),
        ({"values": torch.tensor([1.0, float("inf")])}, "values must be finite"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"values": torch.ones(2), "centroids": torch.ones(2), "bits": torch.ones(2), "rate": 1.0} | change
    values, centroids = arguments.pop("values"), arguments.pop("centroids")
    with pytest.raises(ValueError, match=message):
        assign_1d(values, centroids, **arguments)


def test_lengths_of_no_codes_are_refused():
    with pytest.raises(ValueError, match="codes must not be empty"):
        code_lengths(torch.empty(0, dtype=torch.int32), 2)


def test_one_importance_for_each_row_counts_as_that_of_all_its_values():
    torch.manual_seed(4)
    values, rows = torch.randn(300, 200), torch.rand(300, 1)
    few = kmeans_1d(values, 16, rate=0.01, weights=rows.expand(values.shape))
    whole = kmeans_1d(values, 16, rate=0.01, weights=rows.expand(values.shape).contiguous())
    assert torch.equal(few[0], whole[0])
    assert torch.equal(few[1], whole[1])


def test_codes_go_where_they_are_asked_to_go():
    out = torch.full((3,), -1, dtype=torch.int32)
    codes = assign_1d(torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0.0, 1.0]), out=out)
    assert codes.data_ptr() == out.data_ptr()
    assert out.tolist() == [0, 1, 0]
