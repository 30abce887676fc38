import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_edge.export import export
from lightning_edge.export.executorch import MAX_BATCH, to_executorch
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
