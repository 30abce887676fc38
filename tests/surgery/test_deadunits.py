import pytest
import torch
import torch.nn.functional as F
from coupled_networks import IMAGES, Residual, Separable, randomized
from torch import nn

from lightning_edge import prune_, remove_dead_units_, slim_channels_
from lightning_edge.models import DigitsNet, LeNet5, LeNet300, ResNet20
from lightning_edge.surgery.quantization import capture_, deployed


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def sparse(build, sparsity):
    """A network whose units differ in size, so that a global threshold empties some of them."""
    network = randomized(build()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                shape = (len(layer.weight), *(1 for _ in layer.weight.shape[1:]))
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
                layer.weight.mul_(torch.rand(shape, generator=generator) ** 2 / layer.weight[0].numel() ** 0.5)
    prune_(network, sparsity=sparsity)
    return network


@pytest.mark.parametrize(
    ("build", "shape", "sparsity"),
    [
        (LeNet300, (8, 1, 28, 28), 0.98),
        (LeNet5, (8, 1, 28, 28), 0.97),
        (DigitsNet, (8, 1, 8, 8), 0.95),
        (ResNet20, (2, 3, 32, 32), 0.95),
        (Residual, IMAGES, 0.98),
        (Separable, IMAGES, 0.8),
    ],
)
def test_outputs_stay_and_parameters_go(build, shape, sparsity):
    network = sparse(build, sparsity)
    inputs = torch.randn(shape)
    with torch.no_grad():
        expected = network(inputs)
    report = remove_dead_units_(network, example_inputs=torch.randn(shape))
    assert report.count > 0
    assert count(network) < count(build())
    with torch.no_grad():
        torch.testing.assert_close(network(inputs), expected, rtol=1e-5, atol=1e-5)
    plain = build()
    slim_channels_(plain, manifest=report.manifest)
    plain.load_state_dict(network.state_dict(), strict=True)
    assert remove_dead_units_(network, example_inputs=inputs).count == 0


def test_a_unit_that_nobody_reads_goes_with_those_that_only_it_reads():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for layer in (network[0], network[2], network[4]):
            layer.weight.fill_(1.0)
        network[4].weight[:, 3] = 0.0  # nobody reads unit 3 of the second layer,
        network[2].weight[:3, 0] = 0.0  # which alone reads unit 0 of the first
    assert remove_dead_units_(network, example_inputs=torch.ones(2, 3)).removed == {"0": 1, "2": 1}


def test_the_constant_of_a_unit_without_inputs_moves_into_the_bias():
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    with torch.no_grad():
        network[0].weight[1] = 0.0
        network[0].bias[1] = 2.0
        expected = network[2].bias + 2.0 * network[2].weight[:, 1]
    remove_dead_units_(network, example_inputs=torch.randn(2, 2))
    torch.testing.assert_close(network[2].bias, expected)


class Normed(nn.Module):
    def __init__(self, padding, bias=False):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.b, self.norm_b = nn.Conv2d(6, 4, 3, padding=padding, bias=bias), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm_a(self.a(x)))
        return self.head(F.relu(self.norm_b(self.b(x))).mean((2, 3)))


@pytest.mark.parametrize("bias", [True, False])
def test_without_a_bias_the_constant_moves_into_the_running_mean(bias):
    network = randomized(Normed(padding=0, bias=bias)).eval()
    with torch.no_grad():
        network.a.weight[2] = 0.0
        network.norm_a.bias[2] = 3.0
        mean = network.norm_b.running_mean.clone()
        inputs = torch.randn(4, 1, 8, 8)
        expected = network(inputs)
        assert remove_dead_units_(network, example_inputs=inputs).removed == {"a": 1}
        torch.testing.assert_close(network(inputs), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(network.norm_b.running_mean, mean) == bias


def test_a_constant_at_a_zero_padded_border_is_left_alone():
    network = randomized(Normed(padding=1)).eval()
    with torch.no_grad():
        network.a.weight[2] = 0.0
        network.norm_a.bias[2] = 3.0
    assert remove_dead_units_(network, example_inputs=torch.randn(4, 1, 8, 8)).count == 0
    with torch.no_grad():
        network.norm_a.bias[2] = -3.0  # behind the ReLU a zero, as the padding is
        network.norm_a.running_mean[2] = 0.0
    assert remove_dead_units_(network, example_inputs=torch.randn(4, 1, 8, 8)).removed == {"a": 1}


def test_a_layer_keeps_its_last_unit():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.fill_(1.5)
    inputs = torch.randn(2, 3)
    expected = network(inputs)
    remove_dead_units_(network, example_inputs=inputs)
    assert network[0].out_features == 1
    torch.testing.assert_close(network(inputs), expected)


def test_a_quantized_network_is_captured_again_with_its_ranges():
    network = sparse(DigitsNet, 0.95)
    inputs = torch.rand(8, 1, 8, 8)
    captured = capture_(network, (inputs,))
    network.train()
    network(inputs)
    network.eval()
    with torch.no_grad():
        expected = network(inputs)
        report = remove_dead_units_(network, example_inputs=inputs)
        assert report.count > 0
        assert count(network) < 42_898
        outputs = network(inputs)
    again = vars(network)["forward"].observer_state()
    # Shorter sums are rounded in another order, which now and then takes an integer to the one beside it.
    steps = (outputs - expected).abs() / again["linear_1.scale"]
    assert steps.max() < 1.01
    assert (steps > 0.01).float().mean() < 0.1
    assert again["relu.min_val"] == captured.observer_state()["relu.min_val"]
    assert len(again["conv3.weight.scale"]) == network.conv3.out_channels < 64
    assert deployed(network, (inputs,))(inputs).shape == (8, 10)


def test_a_live_network_stays_and_so_does_its_mode():
    network = DigitsNet().train()
    report = remove_dead_units_(network, example_inputs=torch.randn(2, 1, 8, 8))
    assert (report.count, report.manifest, report.removed) == (0, {}, {})
    assert network.training
    assert count(network) == 42_898


def test_a_removal_that_would_change_the_outputs_leaves_the_network(monkeypatch):
    from lightning_edge.surgery import deadunits

    monkeypatch.setattr(deadunits, "_response", lambda layer, emitted: torch.ones(len(layer.weight)))
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    with torch.no_grad():
        network[0].weight[1] = 0.0
        network[0].bias[1] = 2.0
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(RuntimeError, match="outputs must not change when dead units are removed"):
        remove_dead_units_(network, example_inputs=torch.randn(2, 2))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Gated(nn.Module):
    """Units that are constant or not, depending on what they meet before their consumer."""

    def __init__(self, meet):
        super().__init__()
        self.a, self.b, self.meet = nn.Linear(6, 8), nn.Linear(8, 3), meet
        with torch.no_grad():
            self.a.weight[:4] = 0.0

    def forward(self, x):
        return self.b(self.meet(self.a(x), x))


@pytest.mark.parametrize(
    "meet",
    [
        lambda units, x: units * x.sum(1, keepdim=True).relu(),
        lambda units, x: units + (x.min() > 0.5),
        lambda units, x: units * float(x.sum() > 0),
        lambda units, x: units if x.sum() < 0 else -units,
        lambda units, x: F.layer_norm(units.relu(), (8,)) * 0,
        lambda units, x: units * units.mean(1, keepdim=True).relu(),
    ],
    ids=["gate", "comparison", "number", "decision", "norm", "mean"],
)
def test_units_that_meet_data_are_left_alone_whatever_the_example(meet):
    torch.manual_seed(0)
    network, inputs = Gated(meet), torch.rand(16, 6)
    with torch.no_grad():
        expected = network(inputs)
        assert remove_dead_units_(network, example_inputs=-torch.ones(2, 6)).count == 0
        torch.testing.assert_close(network(inputs), expected)


@pytest.mark.parametrize(
    "meet",
    [
        lambda units, x: 1 - units.relu() * 2,
        lambda units, x: (units + units.sigmoid()).clamp_(min=0.1),
        lambda units, x: units[:, :, None, None].flatten(1),
        lambda units, x: F.max_pool1d(units.unsqueeze(2), 1).squeeze(2) * units,
        lambda units, x: units.unsqueeze(2).mean(2) + units,
    ],
    ids=["arithmetic", "two ways", "flattened", "pooled", "mean"],
)
def test_units_that_meet_nothing_else_go(meet):
    torch.manual_seed(0)
    network, inputs = Gated(meet), torch.rand(16, 6)
    with torch.no_grad():
        expected = network(inputs)
        assert remove_dead_units_(network, example_inputs=-torch.ones(2, 6)).removed == {"a": 4}
        torch.testing.assert_close(network(inputs), expected)


class Squeezed(nn.Module):
    """A gate of the units' own, as in squeeze-and-excitation: the gate's weights decide whether a unit is alive."""

    def __init__(self):
        super().__init__()
        self.a, self.down, self.up, self.b = nn.Conv2d(1, 8, 3), nn.Linear(8, 4), nn.Linear(4, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.a(x)
        gate = self.up(self.down(x.mean((2, 3))).relu()).sigmoid().view(len(x), -1, 1, 1)
        return self.b(x * gate)


def test_a_unit_goes_with_its_gate():
    torch.manual_seed(0)
    network, inputs = Squeezed(), torch.randn(4, 1, 5, 5)
    with torch.no_grad():
        network.a.weight[:3] = 0.0
        network.up.weight[:2] = 0.0
        expected = network(inputs)
        assert remove_dead_units_(network, example_inputs=inputs).removed == {"a": 2}
        torch.testing.assert_close(network(inputs), expected)


def test_layers_that_are_called_by_keyword_are_seen_too():
    class Keyword(Normed):
        def forward(self, x):
            x = F.relu(self.norm_a(input=self.a(input=x)))
            return self.head(input=F.relu(self.norm_b(input=self.b(input=x))).mean((2, 3)))

    network = randomized(Keyword(padding=0)).eval()
    with torch.no_grad():
        network.a.weight[2] = 0.0
        network.norm_a.bias[2] = 3.0
        inputs = torch.randn(4, 1, 8, 8)
        expected = network(inputs)
        assert remove_dead_units_(network, example_inputs=inputs).removed == {"a": 1}
        torch.testing.assert_close(network(inputs), expected, rtol=1e-5, atol=1e-5)


def test_without_bias_and_norm_only_a_zero_goes():
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    with torch.no_grad():
        network[0].weight[1:3] = 0.0
        network[0].bias[1], network[0].bias[2] = 2.0, -2.0
    assert remove_dead_units_(network, example_inputs=torch.randn(4, 2)).removed == {"0": 1}
