import re

import pytest
import torch
import torch.nn.functional as F
from coupled_networks import COUPLED, IMAGES, NAMES, Concatenation, Residual, Separable, randomized
from torch import nn

from lightning_edge.models import ResNet20
from lightning_edge.surgery.coupling import Trial, coupled_groups, remove_units_, zero_units_


def groups_of(network, shape):
    coupling = coupled_groups(network, (torch.randn(shape),))
    return {group.name: {(side.layer, side.side) for side in group.members} for group in coupling.groups}, coupling


@pytest.mark.parametrize(("build", "shape"), COUPLED, ids=NAMES)
@pytest.mark.parametrize("which", ["first", "last", "many"])
def test_removing_units_is_zeroing_them(build, shape, which):
    network = randomized(build()).eval()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    groups = coupled_groups(network, (inputs,)).groups
    kept = []
    for group in groups:
        mask = torch.ones(group.units, dtype=torch.bool)
        mask[{"first": [0], "last": [-1], "many": list(range(1, group.units))}[which]] = False
        kept.append(mask)
    zero_units_(network, groups, kept)
    with torch.no_grad():
        expected = network(inputs)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        remove_units_(network, groups, kept)
        torch.testing.assert_close(network(inputs), expected, rtol=1e-4, atol=1e-5)
    assert sum(parameter.numel() for parameter in network.parameters()) < parameters


def test_a_residual_addition_couples_all_its_producers():
    groups, coupling = groups_of(Residual(), IMAGES)
    layers = {layer for layer, _ in groups["first"]}
    assert layers == {"first", "inner", "norm", "shortcut", "head"}
    assert coupling.protected == {"head": "its channels are outputs of the network"}


def test_a_flattened_channel_is_several_features():
    _, coupling = groups_of(Residual(), IMAGES)
    units = {side.layer: units for side, units in coupling.groups[0].members.items()}
    assert units["head"].shape == (16, 4)
    assert units["head"][3].tolist() == [12, 13, 14, 15]


def test_a_concatenation_shifts_the_channels_of_its_second_part():
    _, coupling = groups_of(Concatenation(), IMAGES)
    right = next(group for group in coupling.groups if group.name == "right")
    units = {side.layer: units.flatten().tolist() for side, units in right.members.items() if side.side == "in"}
    assert units == {"both": list(range(16, 24)), "dense": list(range(32, 40))}


def test_a_unit_of_a_grouped_convolution_takes_a_channel_of_every_group():
    _, coupling = groups_of(Separable(), IMAGES)
    grouped = next(group for group in coupling.groups if group.name == "pointwise")
    units = {(side.layer, side.side): units for side, units in grouped.members.items()}
    assert units["grouped", "in"][1].tolist() == [1, 9, 17, 25]


def test_inner_channels_of_option_a_blocks_are_found_and_the_shortcuts_named():
    groups, coupling = groups_of(ResNet20(), (2, 3, 32, 32))
    assert sorted(groups) == [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    assert set(coupling.protected) >= {"conv1", "layer1.0.conv2", "layer3.2.conv2", "linear"}


class Shuffled(nn.Module):
    """The channels are reordered on their way, which a dependency graph takes for an elementwise operation."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(4, 10, 1)

    def forward(self, x):
        return self.b(F.pixel_shuffle(self.a(x), 2))


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.position = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.b(self.a(x) + self.position)


class Softmaxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x).softmax(-1))


@pytest.mark.parametrize(
    ("network", "shape", "layer", "reason"),
    [
        (Shuffled(), IMAGES, "a", "does not follow its channels to b"),
        (Added(), (2, 4), "a", "a parameter of its own is added to them"),
        (Softmaxed(), (2, 4), "a", "removing them is not zeroing them, the outputs differ by"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)),
            IMAGES,
            "0",
            "1: GroupNorm mixes or orders channels",
        ),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 3)),
            (2, 4),
            "0",
            "0 has parametrized or shared parameters",
        ),
    ],
)
def test_what_cannot_be_followed_is_protected_and_named(network, shape, layer, reason):
    coupling = coupled_groups(network, (torch.randn(shape),))
    assert not coupling.groups
    assert re.search(reason, coupling.protected[layer])


def test_tied_layers_are_protected():
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    network[2].weight = network[0].weight
    assert not coupled_groups(network, (torch.randn(2, 6),)).groups


def test_the_network_stays_as_it_is():
    network = Residual().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    coupled_groups(network, (torch.ones(IMAGES),))
    assert network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="example_inputs must be what the network is called with, got: mat1 and mat2"):
        coupled_groups(nn.Linear(3, 2), (torch.ones(2, 4),))


def test_a_network_that_makes_single_precision_inside_is_compared_in_single_precision():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x.float())))

    assert Trial(Single(), (torch.randn(2, 4),))._tolerance == 1e-4
    assert [group.name for group in coupled_groups(Single(), (torch.randn(2, 4),)).groups] == ["a"]


class Recorder:
    """Keeps the last output it saw: what a LightningModule around the network looks like to a hook."""

    def __init__(self):
        self.output = None

    def keep(self, layer, inputs, output):
        self.output = output


def test_hooks_that_hold_activations_do_not_stop_the_search_for_groups():
    network, inputs, recorder = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        torch.randn(2, 4),
        Recorder(),
    )
    network[0].register_forward_hook(recorder.keep)
    network(inputs)
    assert recorder.output.grad_fn is not None
    assert [group.name for group in coupled_groups(network, (inputs,)).groups] == ["0"]
