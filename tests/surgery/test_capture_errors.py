import pytest
import torch
from torch import nn

from lightning_edge.surgery.capture import export_graph


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Fixed(nn.Module):
    def forward(self, x):
        return x.view(4, 3)


class Two(nn.Module):
    def forward(self, x, mask):
        return x * mask


def refusal_of(module, capfd):
    network = nn.Sequential(nn.Linear(3, 3), module) if not isinstance(module, Two) else module
    with pytest.raises(ValueError, match="cannot be captured as a graph|must be what Two takes") as caught:
        export_graph(network, (torch.ones(4, 3),), training=False)
    assert "def forward" not in capfd.readouterr().err
    return str(caught.value)


def test_control_flow_that_depends_on_values_is_named_with_its_layer_and_line(capfd):
    said = refusal_of(Branch(), capfd)
    assert "in layer '1' at test_capture_errors.py:" in said
    assert "(if x.sum() > 0:)" in said
    assert "torch.where" in said


def test_a_fixed_batch_is_told_apart(capfd):
    assert "It must take a batch of any size, not 4 rows alone: " in refusal_of(Fixed(), capfd)


def test_a_missing_input_is_named(capfd):
    assert "mask" in refusal_of(Two(), capfd)
