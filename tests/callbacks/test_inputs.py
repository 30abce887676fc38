"""What a network is called with: positions, keywords, and the module's own example."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_edge import ChannelPruning
from lightning_edge.callbacks.inputs import NetworkInputs


class Two(nn.Module):
    def forward(self, x, y, mask=None, *, scale=None):
        return x


class Task(L.LightningModule):
    def __init__(self, example=None):
        super().__init__()
        self.network, self.example_input_array = Two(), example

    def forward(self, x, y):
        return self.network(x, y)

    def training_step(self, batch, _):
        return self(batch[0], Y)


def seen(*args, **kwargs):
    network, inputs = Two(), NetworkInputs()
    inputs.watch(network)
    network(*args, **kwargs)
    assert not network._forward_pre_hooks
    return inputs.state()


X, Y = torch.zeros(5, 3), torch.zeros(5, 2, 2, dtype=torch.int64)


def test_calls_by_position_and_by_keyword_are_one():
    assert seen(X, Y) == seen(X, y=Y) == seen(y=Y, x=X) == seen(X, Y, mask=None)
    assert seen(X, Y)["leaves"] == [([-1, 3], "float32"), ([-1, 2, 2], "int64")]


def test_what_is_no_tensor_is_kept_as_it_is():
    assert seen(X, Y, scale=2.0)["leaves"][-1] == 2.0
    with pytest.raises(ValueError, match=r"inputs must be tensors.*got \['Tensor', 'object'\]"):
        seen(X, object())


@pytest.mark.parametrize(
    ("example", "width"), [(None, 4), ((X, Y), 3), ({"y": Y, "x": X}, 3)], ids=["none", "tuple", "mapping"]
)
def test_before_any_call_the_example_comes_before_the_batch(example, width):
    task, inputs = Task(example), NetworkInputs()
    inputs.watch(task.network)
    inputs.take_from(task, (torch.zeros(5, 4), torch.zeros(5)))
    assert inputs.state()["leaves"] == [([-1, width], "float32"), ([-1, 2, 2], "int64")]
    assert not task.network._forward_pre_hooks


def test_a_network_of_named_batches_loses_channels(fit, task_class, digits_loaders):
    class Named(nn.Sequential):
        def forward(self, images):
            return super().forward(images)

    class NamedTask(task_class):
        def __init__(self):
            super().__init__()
            self.model = Named(*self.model)

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(images=batch["images"]), batch["labels"])

    def named(rows):
        return {"images": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}

    train, validation = digits_loaders()
    loaders = DataLoader(train.dataset, 32, collate_fn=named), validation
    pruning = ChannelPruning(sparsity=0.5, start_epoch=1, round_to=2)
    task, _ = fit(pruning, task=NamedTask(), loaders=loaders, epochs=2, num_sanity_val_steps=0)
    assert task.model[3].out_channels == 8
