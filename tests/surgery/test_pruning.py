import copy

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


def test_lamp_spares_a_layer_of_small_weights():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[1].weight.copy_(0.01 * model[0].weight)
    assert [layer.zeros for layer in prune_(copy.deepcopy(model), sparsity=0.5).layers] == [1, 99]
    report = prune_(model, sparsity=0.5, score="lamp")
    assert report.zeros == 100
    assert [layer.zeros for layer in report.layers] == [50, 50]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("score", ["magnitude", "synflow"])
def test_two_of_four_are_counted_along_the_inputs_of_a_transposed_convolution_too(groups, score):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(8, 6, 3, groups=groups)
    report = prune_(layer, sparsity=0.5, pattern="2:4", score=score, example_inputs=torch.ones(1, 8, 4, 4))
    kept = (layer.weight != 0).view(groups, 8 // groups // 4, 4, 6 // groups, 9).sum(2)
    assert set(kept.flatten().tolist()) == {2}
    assert torch.equal(report.masks["weight"], layer.weight != 0)


def test_blocks_are_outputs_by_inputs_in_a_transposed_convolution_too():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(8, 6, 3)
    prune_(layer, sparsity=0.5, pattern="1x4")
    zeros = (layer.weight == 0).view(2, 4, 6, 9).sum(1)
    assert set(zeros.flatten().tolist()) == {0, 4}


def test_blocks_that_cannot_reach_the_target_are_warned_of():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 6))
    with torch.no_grad():
        model[0].weight[:4, :4] = 2.0  # the block that stays is a full one: 16 of 100 weights
    with pytest.warns(
        UserWarning, match=r"blocks of 4x4 do not reach sparsity 0\.9: '0' and 0 more layers end at 0\.8"
    ):
        report = prune_(model, sparsity=0.9, pattern="4x4", scope="layer", include=["0"])
    assert report.sparsity == 0.84


def test_a_floor_that_a_pattern_cannot_keep_is_refused():
    with pytest.raises(ValueError, match=r"min_kept must be at most 0\.5 for pattern '2:4', which keeps that fraction"):
        prune_(net(), sparsity=0.5, pattern="2:4", min_kept=0.6)
    with pytest.raises(ValueError, match=r"min_kept must leave 154 weights of '3' .* got 200, which leaves 115"):
        prune_(net(), sparsity=0.5, pattern="2:4", min_kept=200, include=["3"])


def test_attention_is_pruned_in_all_its_projections():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    report = prune_(layer, sparsity=0.5)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert list(report.masks) == names
    assert report.zeros == (192 + 64 + 128 + 128) // 2
    assert int((layer.self_attn.in_proj_weight == 0).sum()) > 0
    apart = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    assert list(prune_(apart, sparsity=0.5, exclude=["out_proj"]).masks) == [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
    ]
    with pytest.raises(ValueError, match="must leave a layer"):
        prune_(layer, sparsity=0.5, include=["self_attn"], exclude=["MultiheadAttention"])


def test_magnitudes_are_found_without_a_copy_of_the_weights():
    layer = nn.Linear(1000, 1000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        prune_(layer, sparsity=0.9)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 1_000_000 <= largest < 2_000_000  # the mask has a byte a weight, a copy of the weights four


class Heads(nn.Module):
    """A network that returns a tuple and a mapping."""

    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        x = self.body(x)
        return self.left(x), {"right": self.right(x), "labels": x.argmax(1)}


def test_synaptic_flow_counts_every_output():
    torch.manual_seed(0)
    model = Heads()
    report = prune_(model, sparsity=0.5, score="synflow", example_inputs=torch.ones(1, 4))
    assert report.zeros == 32
    assert all(layer.zeros < layer.size for layer in report.layers)
    with pytest.raises(ValueError, match="score 'synflow' must find a flow .* got no output with a gradient"):
        prune_(nn.Sequential(model, Detached()), sparsity=0.5, score="synflow", example_inputs=torch.ones(1, 4))


class Detached(nn.Module):
    def forward(self, outputs):
        return outputs[0].detach()


def test_a_pattern_that_fits_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"pattern must find weights to prune, got '2:4' for \[''\]"):
        prune_(nn.Conv2d(1, 4, 3), sparsity=0.5, pattern="2:4")
