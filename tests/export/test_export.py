import pytest
import torch
from torch import nn

from lightning_edge import export, share_weights_
from lightning_edge.artifact import inspect


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_packed_file_has_adaptive_contexts_unless_told_not_to(tmp_path, adaptive):
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    with torch.no_grad():
        layer.weight.mul_(torch.arange(1.0, 49.0)[:, None])
    share_weights_(layer, clusters=16)
    path = export(layer, tmp_path / "net.edge", example_inputs=(torch.zeros(2, 64),), adaptive=adaptive)
    codec = next(row.codec for row in inspect(path).tensors if row.name == "weight")
    assert (codec == "context") == adaptive
