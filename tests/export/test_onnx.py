import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from lightning_edge import load_artifact, quantize
from lightning_edge.export import export
from lightning_edge.export.onnx import to_onnx
from lightning_edge.models.resnet import CifarResNet
from lightning_edge.surgery.quantization import capture_, convert


class Net(nn.Module):
    """What an integer runtime has to fuse: convolutions, a residual sum, pools, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 3)
        self.fc = nn.Linear(12, 4)

    def forward(self, images):
        first = F.relu(self.bn1(self.conv1(images)))
        second = F.max_pool2d(F.relu(self.bn2(self.conv2(first)) + first), 2)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.conv3(second)), 1).flatten(1))


@pytest.fixture(scope="module")
def images():
    return torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def make_network(images):
    """Pruned and shared, with batch norms that have seen data."""
    torch.manual_seed(0)
    network = Net()
    values = torch.tensor([-0.25, 0.0, 0.0, 0.1, 0.3])
    with torch.no_grad():
        for layer in (network.conv1, network.conv2, network.conv3):
            layer.weight.copy_(values[torch.randint(5, layer.weight.shape)])
        network.bn1.weight.uniform_(0.5, 1.5)
        for _ in range(20):
            network(images)
    return network


@pytest.fixture
def network(images):
    return make_network(images)


@pytest.fixture(scope="module")
def quantized(images):
    """A captured network, its converted graph, and its ONNX model."""
    network = make_network(images)
    capture_(network, (images,))
    for _ in range(5):
        network(images)
    return network, convert(network), to_onnx(network, (images,))


def run(model, images):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def constants(model):
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def optimized_operators(model, folder):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3  # onnxruntime warns that the optimized file is for this machine
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def test_weights_have_the_modules_names_and_exactly_its_bits(network, images):
    stored = constants(to_onnx(network, (images,)))
    state = network.state_dict()
    for name in ("conv1.weight", "conv2.weight", "conv2.bias", "conv3.weight", "fc.weight", "fc.bias"):
        assert stored[name].tobytes() == state[name].numpy().tobytes()


def test_batch_norms_are_a_scale_and_a_shift(network, images):
    model = to_onnx(network, (images,))
    stored = constants(model)
    assert {name for name in stored if name.startswith("bn")} == {"bn1.scale", "bn1.shift", "bn2.scale", "bn2.shift"}
    expected = network.bn1.weight / torch.sqrt(network.bn1.running_var + 1e-3)
    np.testing.assert_allclose(stored["bn1.scale"].flatten(), expected.detach().numpy(), rtol=1e-6)
    assert "BatchNormalization" not in [node.op_type for node in model.graph.node]


def test_the_float_file_computes_what_the_network_computes_at_any_batch_size(network, images):
    model = to_onnx(network, (images[:1],))
    network.eval()
    for size in (1, 2, 64):
        torch.testing.assert_close(run(model, images[:size]), network(images[:size]).detach(), rtol=1e-4, atol=1e-5)


def test_exporting_twice_gives_the_same_bytes_and_no_trace_of_the_machine(network, quantized, images):
    for module in (network, quantized[0]):
        first, second = (to_onnx(module, (images,)).SerializeToString(deterministic=True) for _ in range(2))
        assert first == second
        assert [
            trace for trace in (b"torch", b".py", b"stack", str(Path(__file__).parents[2]).encode()) if trace in first
        ] == []


def test_exporting_changes_nothing_of_the_network(quantized, images):
    network, _, _ = quantized
    network.train()
    network.bn1.eval()

    def state():
        tensors = [*network.state_dict().values(), *network.forward.observer_state().values(), torch.get_rng_state()]
        return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()

    before, flags = state(), [module.training for module in network.modules()]
    to_onnx(network, (images,))
    assert state() == before
    assert [module.training for module in network.modules()] == flags


def test_int8_weights_are_stored_as_integers_with_their_zeros_and_shared_values(quantized):
    network, converted, model = quantized
    stored = constants(model)
    floats = [name for name, value in stored.items() if value.dtype == np.float32 and value.size > 12]
    assert floats == []
    for name in ("conv1", "conv2", "conv3", "fc"):
        assert (stored[f"{name}.weight"] == converted.get_submodule(name).weight_int8.numpy()).all()
    weight = network.conv2.weight.detach().numpy()
    assert ((stored["conv2.weight"] == 0) == (weight == 0)).all()
    assert max(len(np.unique(channel)) for channel in stored["conv2.weight"]) <= 4


def test_activations_are_uint8_and_biases_int32_with_the_scale_of_the_accumulator(quantized):
    _, converted, model = quantized
    stored = constants(model)
    nodes = model.graph.node
    producers = {output: node for node in nodes for output in node.output}
    zero_points = [stored[node.input[2]] for node in nodes if node.op_type == "QuantizeLinear"]
    assert {value.dtype for value in zero_points} == {np.dtype(np.uint8)}
    layers = [node for node in nodes if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 4
    for layer in layers:
        data, weight, bias = (producers[name] for name in layer.input)
        step = stored[data.input[1]] * stored[weight.input[1]]
        assert stored[bias.input[0]].dtype == np.int32
        np.testing.assert_allclose(stored[bias.input[1]], step, rtol=1e-6)
    bias = producers[layers[2].input[2]]
    np.testing.assert_allclose(
        stored[bias.input[0]] * stored[bias.input[1]], converted.conv3.bias_rounded.numpy(), atol=1e-4
    )


def test_onnxruntime_runs_every_layer_with_integer_kernels(quantized, tmp_path):
    operators = optimized_operators(quantized[2], tmp_path)
    assert operators.count("QLinearConv") == 3
    assert operators.count("QLinearAdd") == 1
    assert operators.count("QGemm") == 1
    assert operators.count("QLinearGlobalAveragePool") == 1
    assert not {"Conv", "Gemm", "Add", "Relu", "MatMul"} & set(operators)


def test_the_int8_file_computes_what_the_converted_network_computes(quantized, images):
    network, converted, model = quantized
    with torch.no_grad():
        expected = converted(images)
    step = float(network.forward.observers["linear"].scale)
    got = run(model, images)
    assert float((got - expected).abs().max()) <= 2.001 * step
    assert float((got - expected).abs().mean()) < 0.2 * step
    assert run(model, images[:3]).shape == (3, 4)


def test_biases_of_channels_without_weight_arrive(images):
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    with torch.no_grad():
        network[0].weight[1] = 0.0
        network[0].weight[2] = 1e-12
        network[0].bias.copy_(torch.tensor([0.5, 40.0, 30.0]))
    capture_(network, (images,))
    network(images)
    model = to_onnx(network, (images,))
    network.eval()
    torch.testing.assert_close(run(model, images), network(images).detach(), rtol=0, atol=0.2)


def test_a_linear_network_without_bias_is_quantized(images):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False))
    captured = capture_(network, (images,))
    network(images)
    network.eval()
    step = float(captured.observers["linear"].scale)
    torch.testing.assert_close(
        run(to_onnx(network, (images,)), images), network(images).detach(), rtol=0, atol=1.01 * step
    )


def test_export_writes_one_file_whole_and_replaces_the_old_one(network, images, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    assert export(network, path, example_inputs=(images,)) == path
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]
    assert onnx.load(path) == to_onnx(network, (images,))


def test_export_that_fails_leaves_the_old_file_and_no_other(tmp_path, images):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    blank = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    capture_(blank, (images,))
    with pytest.raises(ValueError, match="before they are converted"):
        export(blank, path, example_inputs=(images,))
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_export_that_is_cut_off_while_writing_leaves_the_old_file(network, images, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full_disk(draft, content):
        with draft.open("wb") as file:
            file.write(content[:10])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export(network, path, example_inputs=(images,))
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_unknown_suffixes_and_missing_folders_are_refused(network, images, tmp_path):
    with pytest.raises(
        ValueError, match=r"path must end in one of \['\.edge', '\.onnx', '\.pte'\], got 'model\.tflite'"
    ):
        export(network, "model.tflite", example_inputs=(images,))
    with pytest.raises(FileNotFoundError, match="must lie in a folder that exists"):
        export(network, tmp_path / "missing" / "model.onnx", example_inputs=(images,))


def test_of_a_residual_network_nothing_but_the_first_and_the_last_value_is_float(tmp_path):
    torch.manual_seed(0)
    network, batch = CifarResNet(blocks=1), torch.randn(4, 3, 32, 32)
    network(batch)
    model = to_onnx(quantize(network, [batch]), (batch,))
    pads = [node for node in model.graph.node if node.op_type == "Pad"]
    assert {constants(model)[node.input[2]].dtype for node in pads} == {np.dtype(np.uint8)}
    operators = optimized_operators(model, tmp_path)
    assert (operators.count("QuantizeLinear"), operators.count("DequantizeLinear")) == (1, 1)
    assert not {"Conv", "Gemm", "Add", "Relu", "GlobalAveragePool"} & set(operators)


class Joined(nn.Module):
    """Branches of different ranges and a reused value, concatenated twice in a row."""

    def __init__(self):
        super().__init__()
        self.stem, self.left = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.right, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(28, 6, 3)

    def forward(self, images):
        x = F.relu(self.stem(images))
        inner = torch.cat([F.relu(self.left(x)), 3 * self.right(x)], 1)
        return self.last(torch.cat([inner, F.max_pool2d(x, 3, 1, 1), x], 1))


@pytest.mark.parametrize("suffix", ["onnx", "pte"])
def test_concatenated_values_of_different_scales_stay_integers_and_the_numbers_are_those_of_the_graph(
    images, tmp_path, suffix
):
    if suffix == "pte":
        pytest.importorskip("executorch")
    torch.manual_seed(0)
    quantized = quantize(Joined(), [images])
    scales = {name: float(quantizer.scale[0]) for name, quantizer in quantized.forward.observers.items()}
    assert scales["cat"] != scales["relu_1"]
    path = export(quantized, tmp_path / f"model.{suffix}", example_inputs=(images,))
    with torch.no_grad():
        expected = convert(quantized)(images).numpy()
    assert np.array_equal(load_artifact(path)(images.numpy()), expected)


def test_onnxruntime_joins_integers(images, tmp_path):
    torch.manual_seed(0)
    operators = optimized_operators(to_onnx(quantize(Joined(), [images]), (images,)), tmp_path)
    assert operators.count("QLinearConcat") == 2
    assert not {"Conv", "FusedConv", "Concat", "MaxPool"} & set(operators)
