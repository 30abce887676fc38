import copy

import pytest
import torch
import torch.nn.functional as F
from coupled_networks import COUPLED, IMAGES, NAMES, TOKENS, Block, Residual, Separable, encoder, randomized
from torch import nn

from lightning_edge import slim_channels_
from lightning_edge.models import DigitsNet, LeNet5, ResNet20
from lightning_edge.surgery.channel_plan import ChannelPlan, Target
from lightning_edge.surgery.coupling import zero_units_


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("build", "shape"), COUPLED, ids=NAMES)
def test_a_plain_network_takes_the_widths_of_the_manifest_and_the_weights(build, shape):
    network, inputs = randomized(build()).eval(), torch.randn(shape)
    report = slim_channels_(network, example_inputs=inputs, parameters=0.7, round_to=2, protect_ends=False)
    assert report.difference <= 1e-5
    assert report.parameters == (count(build()), count(network))
    assert count(network) <= 0.7 * count(build())
    plain = build()
    slim_channels_(plain, manifest=report.manifest)
    plain.load_state_dict(network.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(plain.eval()(inputs), network(inputs))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("macs", [0.7, 0.5, 0.35])
def test_half_of_the_multiply_accumulates_means_at_most_half(macs, scope):
    network, inputs = ResNet20(), torch.randn(2, 3, 32, 32)
    report = slim_channels_(network, example_inputs=inputs, macs=macs, scope=scope)
    assert report.macs[0] == 40_551_040
    assert macs - 0.1 < report.macs[1] / report.macs[0] <= macs
    # Counted anew, on the narrow network.
    again = ChannelPlan(network, (inputs,))
    assert again.macs([torch.ones(group.units) for group in again.groups]) == report.macs[1]


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_widths_are_multiples(round_to):
    report = slim_channels_(
        ResNet20(), example_inputs=torch.randn(2, 3, 32, 32), sparsity=0.45, round_to=round_to, scope="layer"
    )
    widths = [sizes["out_channels"] for sizes in report.manifest.values() if "out_channels" in sizes]
    assert widths
    assert all(width % round_to == 0 for width in widths)


def test_all_groups_shrink_alike_in_scope_layer():
    report = slim_channels_(ResNet20(), example_inputs=torch.randn(2, 3, 32, 32), sparsity=0.5, scope="layer")
    widths = [report.manifest[f"layer{stage}.{block}.conv1"]["out_channels"] for stage in (1, 2, 3) for block in (0, 1)]
    assert widths == [8, 8, 16, 16, 32, 32]


def test_the_smallest_channels_go():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([3.0, 1.0, 4.0, 2.0]).view(4, 1, 1, 1))
        network[3].weight.fill_(1.0)
    slim_channels_(network, example_inputs=torch.ones(2, 1, 3, 3), sparsity=0.5, round_to=1, protect_ends=False)
    assert network[0].weight.flatten().tolist() == [3.0, 4.0]
    assert network[1].num_features == 2


def test_bn_scale_reads_the_norm():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([0.1, -5.0, 0.2, 3.0]))
    options = {"sparsity": 0.5, "round_to": 1, "protect_ends": False, "score": "bn_scale"}
    slim_channels_(network, example_inputs=torch.ones(2, 1, 3, 3), **options)
    assert network[1].weight.tolist() == [-5.0, 3.0]
    with pytest.raises(ValueError, match="'bn_scale' must find a batch norm in every group, got none at 'conv2'"):
        slim_channels_(LeNet5(), example_inputs=torch.ones(2, 1, 28, 28), sparsity=0.5, score="bn_scale")


def test_taylor_is_the_squared_change_of_the_loss():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs = torch.randn(8, 3)
    network(inputs).square().sum().backward()
    with torch.no_grad():
        products = [(p * p.grad).view(4, -1).sum(1) for p in network[0].parameters()]
    expected = (products[0] + products[1]).square()
    seen = []

    def score(module, group):
        from lightning_edge.surgery.channel_scores import score_units

        seen.append(score_units(module, group, "taylor"))
        return seen[0]

    slim_channels_(network, example_inputs=inputs, sparsity=0.25, round_to=1, protect_ends=False, score=score)
    torch.testing.assert_close(seen[0], expected)
    assert network[0].out_features == 3


def test_taylor_without_gradients_says_what_to_call():
    with pytest.raises(ValueError, match="score 'taylor' must find gradients, got none in conv2: call backward first"):
        slim_channels_(LeNet5(), example_inputs=torch.ones(2, 1, 28, 28), sparsity=0.5, score="taylor")


def test_random_scores_come_from_the_generator():
    def widths(seed):
        network = randomized(LeNet5())
        generator = torch.Generator().manual_seed(seed)
        slim_channels_(
            network, example_inputs=torch.ones(2, 1, 28, 28), sparsity=0.5, score="random", generator=generator
        )
        return network.fc1.weight.sum().item()

    assert widths(1) == widths(1) != widths(2)


@pytest.mark.parametrize("build", [DigitsNet, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 3))])
def test_the_rows_and_columns_of_adafactor_are_cut_alike(build):
    network, inputs = build(), torch.randn(8, 1, 8, 8)
    optimizer = torch.optim.Adafactor(network.parameters(), lr=1e-3)
    network(inputs).square().mean().backward()
    optimizer.step()
    slim_channels_(network, example_inputs=inputs, sparsity=0.5, optimizer=optimizer, protect_ends=False)
    for parameter, state in optimizer.state.items():
        assert parameter.ndim == 1 or state["row_var"].shape == (*parameter.shape[:-1], 1)
        assert parameter.ndim == 1 or state["col_var"].shape == (*parameter.shape[:-2], 1, parameter.shape[-1])
    network(inputs).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(("key", "value"), [("rows", torch.ones(5)), ("factors", [torch.eye(3), torch.eye(4)])])
def test_a_state_that_cannot_be_cut_is_refused_before_anything_changes(key, value):
    network, inputs = DigitsNet(), torch.randn(2, 1, 8, 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    optimizer.state[network.fc1.weight] = {"step": torch.ones(1), key: value}
    with pytest.raises(
        ValueError, match=rf"optimizer must hold states that can be cut .* got SGD with '{key}' of another shape"
    ):
        slim_channels_(network, example_inputs=inputs, sparsity=0.5, optimizer=optimizer)
    assert count(network) == 42_898


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5, "example_inputs": torch.ones(2, 4)}, {"manifest": {"0": {"out_features": 16}}}]
)
def test_a_layer_that_is_not_built_yet_is_named(options):
    network = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 2))
    with pytest.raises(ValueError, match="layer '0' must be built before it is compressed: run one batch"):
        slim_channels_(network, **options)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_goes_on_with_the_moments_of_what_is_left(optimizer):
    """Narrow after zeroing equals zeroed all along, step by step, moments included."""

    def training(narrow):
        torch.manual_seed(0)
        network = randomized(DigitsNet()).eval()
        options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        steps = optimizer(network.parameters(), lr=1e-7 if options else 1e-3, **options)
        inputs = torch.randn(8, 1, 8, 8)
        plan = ChannelPlan(network, (inputs,))
        kept = [torch.arange(group.units) % 2 == 0 for group in plan.groups]
        for step in range(4):
            if step == 2 and narrow:
                slim_channels_(
                    network,
                    example_inputs=inputs,
                    sparsity=0.5,
                    round_to=1,
                    scope="layer",
                    optimizer=steps,
                    score=lambda _, group: (torch.arange(group.units) % 2 == 0).float(),
                )
            if step >= 2 and not narrow:
                zero_units_(network, plan.groups, kept)
            steps.zero_grad()
            network(inputs).square().mean().backward()
            steps.step()
        if not narrow:
            zero_units_(network, plan.groups, kept)
        with torch.no_grad():
            return network(inputs)

    torch.testing.assert_close(training(True), training(False), rtol=1e-4, atol=1e-4)


def test_parameters_stay_the_same_objects():
    network = DigitsNet()
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    slim_channels_(network, example_inputs=torch.ones(2, 1, 8, 8), macs=0.5)
    assert {name: id(parameter) for name, parameter in network.named_parameters()} == before


def test_first_layer_and_patterns_protect():
    network = DigitsNet()
    report = slim_channels_(network, example_inputs=torch.ones(2, 1, 8, 8), sparsity=0.5, exclude=["fc*"])
    assert network.conv1.out_channels == 24
    assert report.protected["conv1"] == "the first layer is among them (protect_ends)"
    assert report.protected["fc1"] == "include and exclude leave it out"
    assert network.fc1.out_features == 64
    assert network.conv3.out_channels < 64


def test_heads_go_as_a_whole():
    network = randomized(Block()).eval()
    report = slim_channels_(
        network,
        example_inputs=torch.randn(TOKENS),
        sparsity=0.4,
        scope="layer",
        include=["attention*"],
        protect_ends=False,
    )
    assert report.manifest["attention"] == {"num_heads": 2}
    assert network.attention.qkv.weight.shape == (48, 32)


@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding", "both", "per_head"])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_attention_with_fewer_heads_computes_what_torch_does(masks, weights, batch_first):
    from lightning_edge.surgery.heads import NarrowAttention

    torch.manual_seed(0)
    whole = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    narrow = copy.deepcopy(whole)
    narrow.__class__ = NarrowAttention
    query, key = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    blocked = torch.rand(5, 7) < 0.3
    padded = torch.zeros(3, 7, dtype=torch.bool)
    padded[0, 5:] = True
    options = {
        "none": {},
        "bool": {"attn_mask": blocked},
        "float": {"attn_mask": torch.randn(5, 7)},
        "padding": {"key_padding_mask": padded},
        "both": {"attn_mask": blocked, "key_padding_mask": padded},
        "per_head": {"attn_mask": torch.randn(12, 5, 7)},
    }[masks]
    for average in (True, False):
        expected = whole(query, key, key, need_weights=weights, average_attn_weights=average, **options)
        found = narrow(query, key, key, need_weights=weights, average_attn_weights=average, **options)
        torch.testing.assert_close(found, expected)
    single = (query[0], key[0], key[0]) if batch_first else (query[:, 0], key[:, 0], key[:, 0])
    torch.testing.assert_close(narrow(*single, need_weights=weights), whole(*single, need_weights=weights))


def test_a_narrow_attention_refuses_what_it_cannot_do():
    network = encoder()
    slim_channels_(network, example_inputs=torch.randn(TOKENS), parameters=0.6, round_to=1, protect_ends=False)
    attention = next(layer.self_attn for layer in network.layers if type(layer.self_attn).__name__ == "NarrowAttention")
    x = torch.randn(2, 6, 32)
    with pytest.raises(ValueError, match=r"attn_mask must have a mask for each of the \d heads that are left, got 4"):
        attention(x, x, x, attn_mask=torch.zeros(8, 6, 6))
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal=True"):
        attention(x, x, x, is_causal=True)


def test_the_output_projection_of_attention_says_why_it_keeps_its_width():
    report = slim_channels_(encoder(), example_inputs=torch.randn(TOKENS), parameters=0.6, round_to=1)
    reasons = {name: why for name, why in report.protected.items() if name.endswith("out_proj")}
    assert set(reasons.values()) == {"attention keeps the width of its inputs"}


def test_an_encoder_with_fewer_heads_trains_and_evaluates_alike():
    network = randomized(encoder())
    slim_channels_(network, example_inputs=torch.randn(TOKENS), parameters=0.6, round_to=1, protect_ends=False)
    x = torch.randn(2, 6, 32)
    for layer in network.modules():
        layer.dropout = 0.0 if isinstance(getattr(layer, "dropout", None), float) else getattr(layer, "dropout", None)
    network.eval()
    with torch.no_grad():
        fused = network(x)
    torch.testing.assert_close(network(x), fused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of sparsity=, macs= and parameters= must be given, got none"),
        ({"sparsity": 0.5, "macs": 0.5}, "exactly one of"),
        ({"macs": 0.0}, r"macs must lie in \(0, 1\), the fraction that stays, got 0.0"),
        ({"sparsity": 1.0}, r"sparsity must lie in \(0, 1\), the fraction that goes, got 1.0"),
        ({"macs": 0.5, "score": "size"}, r"score must be one of \['l1', 'l2', .*got 'size'"),
        ({"macs": 0.5, "scope": "erk"}, "scope must be 'global' or 'layer', got 'erk'"),
        ({"macs": 0.5, "round_to": 0}, "round_to must be a whole number of at least 1, got 0"),
        ({"macs": 0.01}, "macs must be within reach, got 0.01: of .*, the narrowest widths cost .*lower round_to=8"),
        ({"macs": 0.5, "include": ["layer9"]}, "include must be a list of patterns that match .*, got 'layer9'"),
        ({"macs": 0.5, "include": "conv1"}, "include must be a list of patterns"),
        ({"macs": 0.5, "example_inputs": None}, "example_inputs must be given to trace the network"),
        ({"macs": 0.5, "manifest": {"conv1": {"out_channels": 8}}}, "manifest must be given alone"),
        ({"manifest": {"conv1": {"out_channels": 99}}}, "manifest must be of this network, got conv1.out_channels=99"),
        ({"manifest": {"conv9": {"out_channels": 9}}}, "manifest must be of this network, got conv9.out_channels=9"),
        (
            {"manifest": {"conv1": {"out_channels": 0}}},
            r"manifest must give sizes of at least 1 .* conv1.out_channels=0",
        ),
        ({"manifest": {"conv1": {"size": 3}}}, "manifest must give sizes"),
        ({"macs": 0.5, "score": lambda module, group: torch.ones(3)}, r"score must return \d+ numbers of at least 0"),
        ({"macs": 0.5, "include": ["fc2"]}, "network must have channels that can be removed, got none; left alone"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    network = DigitsNet()
    before = count(network)
    with pytest.raises(ValueError, match=message):
        slim_channels_(network, **({"example_inputs": torch.ones(2, 1, 8, 8)} | arguments))
    assert count(network) == before


def test_budget_of_a_target():
    assert Target(sparsity=0.4).budget(0.5) == 0.8
    assert Target(parameters=0.4).budget(1.0) == pytest.approx(0.4)


def test_a_removal_that_would_change_the_outputs_leaves_the_network(monkeypatch):
    from lightning_edge.surgery import channels

    monkeypatch.setattr(channels, "zero_units_", lambda *_: None)
    network = Separable()
    before = count(network)
    with pytest.raises(RuntimeError, match="outputs must not change when zeroed channels are removed"):
        slim_channels_(network, example_inputs=torch.randn(IMAGES), sparsity=0.5, round_to=1)
    assert count(network) == before


def test_macs_count_every_call_of_a_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.relu(self.inner(F.relu(self.inner(x)))))

    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Twice())
    plan = ChannelPlan(Residual(), (torch.randn(IMAGES),), protect_ends=False)
    assert plan.macs([torch.ones(16)]) == 64 * (3 * 16 * 9 + 16 * 16 * 9 + 16 * 16) + 16 * 4 * 10
    with pytest.raises(ValueError, match="network must have channels that can be removed"):
        slim_channels_(network, example_inputs=torch.ones(2, 3), macs=0.5, protect_ends=True)


def test_a_transposed_convolution_that_is_called_by_keyword_is_counted():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 2, 2)

        def forward(self, x):
            return self.up(input=self.first(input=x))

    plan = ChannelPlan(Keyword(), (torch.randn(IMAGES),), protect_ends=False)
    assert plan.macs([torch.ones(4)]) == 64 * (3 * 4 + 4 * 2 * 4)
