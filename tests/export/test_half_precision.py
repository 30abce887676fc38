"""Networks of scheme "fp16" in ExecuTorch: float16 inside, float32 outside, all of it in XNNPACK."""

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
