import pytest
import torch
from torch import nn

from lightning_edge import prune_


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(45, 7))


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9, 0.994])
def test_the_global_count_is_exact(sparsity):
    model = net()
    report = prune_(model, sparsity=sparsity)
    zeros = sum(int((m.weight == 0).sum()) for m in (model[0], model[3]))
    assert zeros == report.zeros == int(sparsity * 405)


def test_each_layer_reaches_the_target_in_scope_layer():
    model = net()
    report = prune_(model, sparsity=0.8, scope="layer")
    assert [(layer.size, layer.zeros) for layer in report.layers] == [(90, 72), (315, 252)]


def test_the_largest_weights_stay_as_they_were():
    model = net()
    before = model[3].weight.detach().clone()
    mask = prune_(model, sparsity=0.7, include=["3"]).masks["3.weight"]
    assert torch.equal(model[3].weight[mask], before[mask])
    assert before[~mask].abs().max() <= before[mask].abs().min()


def test_zeros_are_positive_zeros():
    model = net()
    prune_(model, sparsity=0.9)
    assert not bool(torch.signbit(model[3].weight[model[3].weight == 0]).any())


def test_biases_and_norms_are_untouched():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items() if "0.weight" != name != "3.weight"}
    prune_(model, sparsity=0.99)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_score_of_the_users_own_decides():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    prune_(model, sparsity=0.5, score=lambda weight: torch.arange(4.0).view(1, 4))
    assert (model[0].weight != 0).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\).*got 1\.0"),
        ({"sparsity": 90}, r"for 90 percent write 0\.9"),
        ({"sparsity": -0.1}, "sparsity must lie in"),
        ({"sparsity": 0.5, "scope": "local"}, r"scope must be one of \['global', 'layer', 'erk'\], got 'local'"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "sparsity must be 0.5 for pattern '2:4', which fixes it, got 0.6"),
        ({"sparsity": 0.5, "pattern": "2:4", "scope": "erk"}, "scope must not be 'erk' for pattern '2:4'"),
        ({"sparsity": {"0": 0.5}, "scope": "erk"}, "scope must not be 'erk' with a mapping"),
        ({"sparsity": {}}, "sparsity must name a layer, got an empty mapping"),
        ({"sparsity": {"conv*": 0.5}}, r"sparsity must name selected layers, got 'conv\*'; they are \['0', '3'\]"),
        ({"sparsity": {"0": 90}}, r"sparsity must lie in \[0, 1\)"),
        ({"sparsity": "0.5"}, r"sparsity must lie in \[0, 1\), the fraction of zeros, got '0.5'"),
        ({"sparsity": 0.5, "score": "size"}, r"score must be one of \['magnitude', .*, got 'size'"),
        (
            {"sparsity": 0.999},
            "min_kept must leave 404 weights of '0' and 1 more layers to prune, got 1",
        ),
        (
            {"sparsity": 0.5, "score": "taylor"},
            "score 'taylor' must find gradients, got none of '0.weight'",
        ),
        ({"sparsity": 0.5, "score": "synflow"}, "example_inputs must be given for score 'synflow', got None"),
        (
            {"sparsity": 0.5, "score": lambda w: w[:1]},
            r"score must return the shape \(5, 2, 3, 3\) of '0.weight', got",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_(net(), **arguments)
