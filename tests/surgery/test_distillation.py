import pytest
import torch
from torch import nn

from lightning_edge.models import ResNet20
from lightning_edge.surgery.adapters import FeatureAdapter, Projection
from lightning_edge.surgery.distillation import match_layers, recorded
from lightning_edge.surgery.quantization import capture_, convert
from lightning_edge.surgery.weights import load_weights_


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())
        self.fc = nn.Linear(6, 3)

    def forward(self, images):
        features = self.block(torch.relu(self.norm(self.conv(images))))
        return self.fc(features.mean((2, 3)))


def images(rows=5, seed=0):
    return torch.randn(rows, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_each_call_is_recorded_with_its_inputs_and_the_outputs_of_the_layers():
    network = Small()
    with recorded(network, ["block", "conv"]) as calls:
        first, second = network(images()), network(images=images(2))
    assert torch.equal(calls[0].output, first)
    assert torch.equal(calls[1].output, second)
    assert list(calls[1].kwargs) == ["images"]
    assert torch.equal(calls[0].features["conv"], network.conv(images()))
    network(images())
    assert len(calls) == 2
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())


def test_gradients_flow_through_what_is_recorded():
    network = Small()
    with recorded(network, ["block"]) as calls:
        network(images())
    calls[0].features["block"].square().mean().backward()
    assert float(network.conv.weight.grad.abs().sum()) > 0
    assert network.fc.weight.grad is None


@pytest.mark.parametrize("layer", ["conv", "norm", "block", "block.1", "fc"])
def test_layers_of_a_captured_network_are_recorded_too(layer):
    torch.manual_seed(0)
    network = Small().eval()
    with recorded(network, [layer]) as plain:
        network(images())
    capture_(network, (images(),))
    network.train()
    network(images())
    network.eval()
    with recorded(network, [layer]) as calls:
        network(images())
    own, expected = calls[0].features[layer], plain[0].features[layer]
    assert own.shape == expected.shape
    # The numbers are fake-quantized, and the norm's statistics have seen one batch more.
    assert torch.corrcoef(torch.stack([own.flatten(), expected.flatten()]))[0, 1] > 0.99


def test_a_hint_inside_a_captured_network_has_a_gradient_that_is_not_zero():
    network = Small()
    capture_(network, (images(),))
    network.train()
    with recorded(network, ["conv"]) as calls:
        network(images())
    calls[0].features["conv"].square().mean().backward()
    assert float(network.conv.weight.grad.abs().sum()) > 0


def test_recording_changes_nothing_of_the_integer_network():
    network, example = ResNet20().eval(), torch.randn(2, 3, 32, 32)
    captured = capture_(network, (example,))
    network.train()
    network(example)
    network.eval()
    before = convert(network)
    nodes = len(captured.graph_module.graph.nodes)
    with recorded(network, ["layer1", "conv1"]):
        network(example)
    assert len(captured.graph_module.graph.nodes) == nodes + 2
    after = convert(network)
    assert [str(node) for node in before.graph.nodes] == [str(node) for node in after.graph.nodes]
    assert torch.equal(before(example), after(example))


def test_a_layer_that_gives_no_tensor_is_refused():
    class Strange(nn.Module):
        def forward(self, value):
            return {"value": value}

    network = nn.Sequential(Strange())
    with (
        recorded(network, ["0"]),
        pytest.raises(ValueError, match="layer '0' must give a tensor to be matched, got a d"),
    ):
        network(images())


def test_names_and_globs_are_paired_in_the_order_of_the_modules():
    network = ResNet20()
    assert match_layers(network, network, {"layer?": "layer?"}) == [(f"layer{i}", f"layer{i}") for i in (1, 2, 3)]
    assert match_layers(network, network, {"layer1.*": "layer2.*", "linear": "linear"})[-1] == ("linear", "linear")


def test_names_that_do_not_exist_list_the_nearest():
    with pytest.raises(ValueError, match="layers of the student, got 'layer9', which matches none; nearest: \\['layer"):
        match_layers(ResNet20(), ResNet20(), {"layer9": "layer1"})
    with pytest.raises(ValueError, match="layers of the teacher, got 'block'"):
        match_layers(ResNet20(), ResNet20(), {"layer1": "block"})
    with pytest.raises(ValueError, match="equally many layers"):
        match_layers(ResNet20(), ResNet20(), {"layer?": "layer1"})


@pytest.mark.parametrize(
    ("source", "target"),
    [((2, 4, 8, 8), (2, 6, 4, 4)), ((2, 4, 4, 4), (2, 4, 8, 8)), ((2, 5), (2, 7)), ((2, 9, 5), (2, 9, 7))],
)
def test_adapters_give_the_shape_that_is_wanted(source, target):
    adapter = FeatureAdapter(source, target)
    assert adapter(torch.randn(3, *source[1:])).shape == (3, *target[1:])
    assert Projection(source, 16)(torch.randn(3, *source[1:])).shape == (3, 16)


def test_where_only_positions_differ_an_adapter_has_nothing_to_train():
    assert not list(FeatureAdapter((2, 4, 8, 8), (2, 4, 4, 4)).parameters())


def test_features_that_cannot_be_adapted_are_refused():
    with pytest.raises(ValueError, match="equally many dimensions"):
        FeatureAdapter((2, 4, 8, 8), (2, 4))
    with pytest.raises(ValueError, match="must differ in width alone"):
        FeatureAdapter((2, 9, 5), (2, 8, 5))


@pytest.mark.parametrize("prefix", ["", "module.", "student.network."])
def test_weights_are_found_under_any_prefix(tmp_path, prefix):
    source, target = Small(), Small()
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.ckpt")
    load_weights_(target, tmp_path / "weights.ckpt")
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def test_files_without_the_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint must be a file"):
        load_weights_(Small(), tmp_path / "none.ckpt")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must hold weights of Small, got .* without 'conv.weight'"):
        load_weights_(Small(), tmp_path / "other.pt")
    state = Small().state_dict() | {"conv.weight": torch.zeros(5, 1, 3, 3)}
    torch.save(state, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="size mismatch for conv.weight"):
        load_weights_(Small(), tmp_path / "wide.pt")


def test_what_is_recorded_is_what_a_layer_gave_and_the_network_got():
    class Changes(nn.Module):
        def forward(self, values):
            return values.mul_(2.0)

    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), Changes())
    outer = nn.Sequential(Changes(), network)
    inputs = torch.randn(4, 2)
    expected = network[0](2 * inputs)
    with recorded(outer, ["1.0", "1.1"]) as calls:
        outer(inputs.clone())
    assert torch.equal(calls[0].args[0], inputs)
    assert torch.equal(calls[0].features["1.0"], expected)
    assert torch.equal(calls[0].features["1.1"], expected.relu())


def test_an_adapter_follows_the_positions_of_a_batch():
    adapter = FeatureAdapter((2, 4, 8, 8), (2, 6, 4, 4))
    assert adapter(torch.randn(3, 4, 10, 10), (5, 5)).shape == (3, 6, 5, 5)
    assert adapter(torch.randn(3, 4, 10, 10)).shape == (3, 6, 4, 4)


def test_a_file_that_holds_no_weights_is_refused_with_its_name(tmp_path):
    path = tmp_path / "weights.pt"
    for content, message in (
        (b"junk", "checkpoint must be a file of tensors"),
        ([1, 2], "checkpoint must hold a state_dict, got .* with a list"),
        ({"epoch": 3}, "checkpoint must hold weights of Linear"),
        (nn.ReLU(), r"checkpoint must be a file of tensors,.* save network.state_dict\(\) alone"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_weights_(nn.Linear(1, 1), path)
