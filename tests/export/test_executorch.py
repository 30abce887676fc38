import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_edge import load_artifact, quantize
from lightning_edge.export import export
from lightning_edge.export.executorch import MAX_BATCH, to_executorch
from lightning_edge.models import ResNet20
from lightning_edge.surgery.quantization import capture_, convert


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 16, 4)

    def forward(self, images):
        first = F.relu(self.bn1(self.conv1(images)))
        return self.fc(F.max_pool2d(F.relu(self.conv2(first)) + first, 2).flatten(1))


def test_a_missing_executorch_is_named_with_the_command_that_brings_it(monkeypatch):
    for name in [*filter(lambda name: name.split(".")[0] == "executorch", sys.modules), "executorch"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "lightning-edge\[executorch\]"'):
        to_executorch(nn.Linear(2, 2), (torch.zeros(2, 2),))


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("executorch", reason="the extra executorch is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runtime calls itself experimental on import
        from executorch.runtime import Runtime
    return Runtime.get()


@pytest.fixture(scope="module")
def images():
    return torch.rand(MAX_BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def run(runtime, program, images):
    method = runtime.load_program(program).load_method("forward")
    return method.execute([images.contiguous()])[0].clone()


@pytest.fixture(scope="module")
def network(images):
    torch.manual_seed(0)
    net = Net()
    net(images)
    return net


@pytest.fixture(scope="module")
def quantized(runtime, images):
    torch.manual_seed(0)
    net = Net()
    net(images)
    capture_(net, (images,))
    for _ in range(3):
        net(images)
    return net, to_executorch(net, (images,))


def test_the_float_program_computes_what_the_network_computes(runtime, network, images, tmp_path):
    path = export(network, tmp_path / "model.pte", example_inputs=(images,))
    assert network.training
    network.eval()
    with torch.no_grad():
        expected = network(images)
    network.train()
    torch.testing.assert_close(run(runtime, path.read_bytes(), images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 17, MAX_BATCH])
def test_the_int8_program_computes_what_the_converted_network_computes_at_any_batch_size(
    runtime, quantized, images, size
):
    net, program = quantized
    with torch.no_grad():
        expected = convert(net)(images[:size])
    step = float(net.forward.observers["linear"].scale)
    torch.testing.assert_close(run(runtime, program, images[:size]), expected, rtol=0, atol=1.01 * step)


def test_biases_of_channels_without_weight_arrive(runtime, images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    with torch.no_grad():
        net[0].weight[1] = 0.0
        net[0].weight[2] = 1e-12
        net[0].bias.copy_(torch.tensor([0.5, 40.0, 30.0]))
    captured = capture_(net, (images,))
    net(images)
    net.eval()
    step = float(captured.observers["conv2d_1"].scale)
    got = run(runtime, to_executorch(net, (images,)), images)
    torch.testing.assert_close(got, net(images).detach(), rtol=0, atol=1.01 * step)


def test_a_shortcut_that_strides_and_pads_is_lowered(runtime, images):
    """The first block of a stage of ResNet-20 (option A); partitions that share a dequantization cannot be lowered."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, stride=2, padding=1)

        def forward(self, x):
            return F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))

    torch.manual_seed(0)
    net = Block()
    captured = capture_(net, (images,))
    net(images)
    net.eval()
    got = run(runtime, to_executorch(net, (images,)), images)
    # The convolution and the sum each round once.
    torch.testing.assert_close(got, net(images).detach(), rtol=0, atol=2.01 * float(captured.observers["relu"].scale))


def test_the_int8_program_holds_a_byte_per_weight(quantized):
    net, program = quantized
    weights = sum(parameter.numel() for parameter in net.parameters())
    assert len(program) < weights + 12_000 < 4 * weights + 12_000


def test_everything_but_the_reshape_runs_in_xnnpack(quantized):
    """Dequantized convolutions in portable kernels would name their operators in the program."""
    _, program = quantized
    assert b"XnnpackBackend" in program
    for operator in (b"aten::convolution", b"aten::linear", b"aten::max_pool2d", b"quantized_decomposed"):
        assert operator not in program


def test_exporting_twice_gives_the_same_bytes(quantized, images):
    net, program = quantized
    assert to_executorch(net, (images[:1],)) == program


class Mobile(nn.Module):
    """Depthwise-separable convolutions with ReLU6, a residual sum, two average pools, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand = self.layer(1, 8, 3), self.layer(8, 16, 1)
        self.depthwise = self.layer(16, 16, 3, groups=16)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 4)

    def layer(self, channels, width, size, groups=1):
        convolution = nn.Conv2d(channels, width, size, padding=size // 2, groups=groups, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU6())

    def forward(self, images):
        x = self.stem(images)
        x = F.avg_pool2d(x + self.project(self.depthwise(self.expand(x))), 2)
        return self.fc(F.relu(x).mean((2, 3)))


NETWORKS = {"resnet": (ResNet20, (8, 3, 32, 32)), "mobile": (Mobile, (8, 1, 8, 8))}


@pytest.fixture(params=NETWORKS)
def deployable(request):
    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    net, batch = make(), torch.randn(shape)
    net(batch)
    return net.eval(), batch


@pytest.mark.parametrize("scheme", [None, "int8_static"])
def test_whole_networks_are_one_partition_of_xnnpack(runtime, deployable, scheme, tmp_path):
    net, batch = deployable
    quantized = net if scheme is None else quantize(net, [batch], scheme=scheme)
    session = load_artifact(export(quantized, tmp_path / "model.pte", example_inputs=(batch,)))  # a warning is an error
    with torch.no_grad():
        expected = (quantized if scheme is None else convert(quantized))(batch)
    torch.testing.assert_close(torch.from_numpy(session(batch.numpy())), expected, rtol=1e-3, atol=1e-3)
    program = (tmp_path / "model.pte").read_bytes()
    assert program.count(b"XnnpackBackend") == 1


def test_every_layer_sum_and_pool_of_whole_networks_is_an_integer_kernel_of_onnxruntime(deployable, tmp_path):
    net, batch = deployable
    path = export(quantize(net, [batch]), tmp_path / "model.onnx", example_inputs=(batch,))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert (operators.count("QuantizeLinear"), operators.count("DequantizeLinear")) == (1, 1)
    floats = {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "AveragePool", "GlobalAveragePool", "ReduceMean", "Clip"}
    assert not floats & set(operators)


class Turned(nn.Module):
    def forward(self, images, others):
        return (images + others).t()


def test_batches_that_cannot_be_cut_or_joined_are_refused(runtime, tmp_path):
    rows = torch.randn(2, 3)
    session = load_artifact(export(Turned(), tmp_path / "turned.pte", example_inputs=(rows, rows)))
    few, many = np.ones((5, 3), np.float32), np.ones((MAX_BATCH * 2, 3), np.float32)
    assert session(few, few).shape == (3, 5)
    with pytest.raises(ValueError, match=r"turned\.pte must get at most 64 rows, got 128: its outputs"):
        session(many, many)
    with pytest.raises(ValueError, match=r"inputs of turned\.pte must have as many rows each, one or more, got"):
        session(few, few[:3])
    with pytest.raises(ValueError, match=r"one or more, got \{0\}"):
        session(few[:0], few[:0])


def test_a_damaged_program_is_named(runtime, tmp_path):
    path = tmp_path / "damaged.pte"
    path.write_bytes(b"no program" * 100)
    with pytest.raises(ValueError, match=r"ExecuTorch must be able to load .*damaged\.pte, got"):
        load_artifact(path)


@pytest.mark.parametrize("slopes", [1, 4])
@pytest.mark.parametrize("scheme", [None, "int8_static", "fp16"])
def test_prelu_runs(runtime, scheme, slopes, tmp_path):
    torch.manual_seed(0)
    batch = torch.randn(8, 1, 8, 8)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.PReLU(slopes), nn.Flatten(), nn.Linear(144, 4), nn.PReLU(slopes)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.linspace(-0.5, 0.5, slopes) if slopes > 1 else torch.tensor([0.3]))
    quantized = net if scheme is None else quantize(net, [batch], scheme=scheme)
    session = load_artifact(export(quantized, tmp_path / "model.pte", example_inputs=(batch,)))
    with torch.no_grad():
        expected = (convert(quantized) if scheme == "int8_static" else quantized)(batch)
    torch.testing.assert_close(torch.from_numpy(session(batch.numpy())), expected, rtol=0.01, atol=0.01)
    assert (tmp_path / "model.pte").read_bytes().count(b"XnnpackBackend") == 1


class Halves(nn.Module):
    """Swaps two halves of the channels, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second, self.way = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1), way

    def forward(self, images):
        hidden = self.first(images)
        rows, channels, height, width = hidden.shape
        if self.way == "chunk":
            hidden = torch.cat(hidden.chunk(2, 1)[::-1], 1)
        elif self.way == "split":
            hidden = torch.cat(hidden.split([5, 3], dim=1)[::-1], 1)
        elif self.way == "shuffle":
            hidden = hidden.view(rows, 2, channels // 2, height, width).transpose(1, 2).reshape(hidden.shape)
        return self.second(hidden).mean((2, 3))


@pytest.mark.parametrize("way", ["plain", "chunk", "split", "shuffle"])
@pytest.mark.filterwarnings("ignore:every operator must run in XNNPACK")
def test_batches_may_grow_and_shrink_between_calls(runtime, way, tmp_path):
    torch.manual_seed(0)
    net, batch = Halves(way).eval(), torch.randn(5, 3, 16, 16)
    quantized = quantize(net, [batch])
    converted = convert(quantized)
    session = load_artifact(export(quantized, tmp_path / "model.pte", example_inputs=(batch,)))
    for rows in (5, 1, 3, 64, 2, 64):
        rows = torch.randn(rows, 3, 16, 16)
        np.testing.assert_array_equal(session(rows.numpy()), converted(rows).detach().numpy())


@pytest.mark.parametrize("activation", [nn.Mish(), nn.Softplus(), nn.CELU(2.0), nn.Hardshrink(), nn.SiLU(), nn.GLU(1)])
@pytest.mark.filterwarnings("ignore:every operator must run in XNNPACK")
def test_activations_of_several_operators_run_behind_integers(runtime, activation, tmp_path):
    torch.manual_seed(0)
    batch = torch.randn(4, 3, 16, 16)  # with eight channels as with eight rows and columns: layouts could be mistaken
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), activation).eval()
    quantized = quantize(net, [batch])
    session = load_artifact(export(quantized, tmp_path / "model.pte", example_inputs=(batch,)))
    expected = convert(quantized)(batch).detach()
    torch.testing.assert_close(torch.from_numpy(session(batch.numpy())), expected, rtol=0.02, atol=0.03)


class Shared(nn.Module):
    """The weight of a layer is read by something else too."""

    def __init__(self, read):
        super().__init__()
        self.layer, self.read = nn.Linear(4, 4), read

    def forward(self, rows):
        return self.read(self.layer(rows), self.layer.weight)


@pytest.mark.parametrize(
    "read",
    [
        lambda hidden, weight: hidden @ weight.t(),
        lambda hidden, weight: hidden * weight.abs().sum(1),
        lambda hidden, weight: (hidden, weight),
        lambda hidden, weight: (hidden, weight, weight.t()),
    ],
)
@pytest.mark.filterwarnings("ignore:every operator must run in XNNPACK")
def test_a_weight_may_be_read_beside_its_layer(runtime, read, tmp_path):
    net, rows = Shared(read).eval(), torch.randn(3, 4)
    found = load_artifact(export(net, tmp_path / "shared.pte", example_inputs=(rows,)))(rows.numpy())
    with torch.no_grad():
        expected = net(rows)
    found, expected = (values if isinstance(values, tuple | list) else [values] for values in (found, expected))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), atol=1e-5)


def test_operators_that_xnnpack_leaves_are_named(runtime, images):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Softplus())
    with pytest.warns(
        UserWarning, match=r"every operator must run in XNNPACK to be fast, got \['aten::gt.Scalar', 'aten::log1p'"
    ):
        to_executorch(net, (images,))
