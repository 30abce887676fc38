"""Networks of scheme "fp16" in ExecuTorch: float16 inside, float32 outside, all of it in XNNPACK."""

import math

import pytest
import torch
from torch import nn

from lightning_edge import export, load_artifact, quantize
from lightning_edge.models.resnet import CifarResNet
from lightning_edge.surgery.copying import copied

pytest.importorskip("executorch", reason="the extra executorch is not installed")


class Tagger(nn.Module):
    """Integers in, a dict out, a batch norm that no layer is in front of."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.linear = nn.Embedding(9, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, tokens):
        hidden = self.norm(self.embedding(tokens))
        return {"logits": self.linear(torch.relu(hidden)), "tokens": tokens}


def test_a_whole_network_is_one_partition_that_computes_in_half_precision(tmp_path):
    torch.manual_seed(0)
    net, batch = CifarResNet(blocks=1), torch.randn(8, 3, 32, 32)
    net(batch)
    with torch.no_grad():
        net.bn1.running_var.mul_(1e-7)  # not a number of float16
        net.bn1.weight.mul_(0.003)
    quantized = quantize(net.eval(), scheme="fp16")
    before = copied(quantized).state_dict()
    session = load_artifact(export(quantized, tmp_path / "model.pte", example_inputs=(batch,)))  # a warning is an error
    assert (tmp_path / "model.pte").read_bytes().count(b"XnnpackBackend") == 1
    with torch.no_grad():
        expected = quantized(batch)
    found = torch.from_numpy(session(batch.numpy()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert not torch.equal(found, expected)  # it is not float32 that computes
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_linear_layers_take_two_bytes_a_weight(tmp_path):
    net, batch = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)), torch.randn(4, 256)
    whole = export(net, tmp_path / "whole.pte", example_inputs=(batch,)).stat().st_size
    half = export(quantize(net, scheme="fp16"), tmp_path / "half.pte", example_inputs=(batch,)).stat().st_size
    assert half < 0.6 * whole


@pytest.mark.filterwarnings("ignore:every operator must run in XNNPACK")  # an embedding does not
def test_integers_stay_integers(tmp_path):
    torch.manual_seed(0)
    net, tokens = Tagger().eval(), torch.randint(9, (8,))
    quantized = quantize(net, scheme="fp16")
    session = load_artifact(export(quantized, tmp_path / "model.pte", example_inputs=(tokens,)))
    logits, same = session(tokens.numpy())
    assert same.tolist() == tokens.tolist()
    torch.testing.assert_close(torch.from_numpy(logits), quantized(tokens)["logits"].detach(), rtol=0.01, atol=0.01)


def test_layers_that_were_kept_are_refused_by_name(tmp_path):
    net, batch = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"keep must be empty for a \.pte file of scheme 'fp16'.* got a 1\.weight"):
        export(quantize(net, scheme="fp16", keep=["1"]), tmp_path / "model.pte", example_inputs=(batch,))


class Constants(nn.Module):
    """Numbers from everywhere: constants of the forward, factories, integers that become floats, masks."""

    def __init__(self, mask=-1e9, factor=1.0):
        super().__init__()
        self.linear, self.mask, self.factor = nn.Linear(4, 4), mask, factor
        self.register_buffer("bias", torch.tensor([0.0, 0.0, 0.0, torch.finfo(torch.float32).min]))

    def forward(self, values):
        hidden = (
            torch.zeros(values.shape[0], 4) + torch.tensor([0.1, 0.2, 0.3, 0.4]) * torch.ones(4) + torch.arange(4) * 0.5
        )
        hidden = (self.linear(values) + hidden) * self.factor
        return hidden.masked_fill(hidden < 0, self.mask).softmax(-1) + (hidden + self.bias).softmax(-1)


@pytest.mark.filterwarnings("ignore:every operator must run in XNNPACK")
@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min, -math.inf])
def test_constants_and_masks_of_any_kind(tmp_path, mask):
    torch.manual_seed(0)
    net, batch = Constants(mask).eval(), torch.randn(8, 4)
    session = load_artifact(export(quantize(net, scheme="fp16"), tmp_path / "model.pte", example_inputs=(batch,)))
    torch.testing.assert_close(torch.from_numpy(session(batch.numpy())), net(batch).detach(), rtol=0.02, atol=0.005)


def test_numbers_that_float16_does_not_hold_are_named(tmp_path):
    batch = torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"numbers must be at most 65504 .* got 1e\+06 in aten\.mul"):
        export(quantize(Constants(factor=1e6), scheme="fp16"), tmp_path / "model.pte", example_inputs=(batch,))
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    with torch.no_grad():
        net[1].running_var.fill_(0)
        net[1].weight.fill_(1000)
        net[1].bias.fill_(1)
    with pytest.raises(ValueError, match=r"weights must be at most 65504 .* in 0\.\w+_folded, batch norms folded"):
        export(quantize(net, scheme="fp16"), tmp_path / "model.pte", example_inputs=(batch,))
    with torch.no_grad():
        net[0].weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"at most 65504 in magnitude .*got 100000 in 0\.weight: name its layer"):
        quantize(net, scheme="fp16")
    quantize(net, scheme="bf16")
    quantize(net, scheme="fp16", keep=["0"])
