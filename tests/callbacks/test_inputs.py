"""What a network is called with: positions, keywords, and the module's own example."""

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


class Holder:
    """As much of a LightningModule as is asked."""

    def __init__(self, example=None):
        self.example_input_array = example


def seen(*args, example=None, **kwargs):
    network, inputs = Two(), NetworkInputs()
    inputs.watch(Holder(example), network)
    network(*args, **kwargs)
    assert not network._forward_pre_hooks
    return inputs.state()


X, Y = torch.zeros(5, 3), torch.zeros(5, 2, 2, dtype=torch.int64)
SHAPES = [([3], "float32"), ([2, 2], "int64")]


def test_calls_by_position_and_by_keyword_are_one():
    assert seen(X, Y) == seen(X, y=Y) == seen(y=Y, x=X) == seen(X, Y, mask=None) == SHAPES


@pytest.mark.parametrize("example", [(X, Y), {"y": Y, "x": X}, [X, Y]], ids=["tuple", "mapping", "list"])
def test_the_example_counts_where_a_call_has_other_things_than_tensors(example):
    assert seen(X, [1, 2], example=example) == SHAPES
    assert seen(X, Y, scale=2.0, example=example) == SHAPES
    assert seen(X, Y, X, example=example) == [*SHAPES, SHAPES[0]]


def test_without_an_example_the_error_says_to_set_one():
    with pytest.raises(ValueError, match=r"inputs must be tensors, got \['Tensor', 'list'\]: set example_input_array"):
        seen(X, [1, 2])


def test_a_mapping_with_other_names_than_the_networks_is_no_example():
    assert seen(X, Y, example={"images": X}) == SHAPES
    with pytest.raises(ValueError, match=r"got \['dict'\]: set example_input_array"):
        seen(X, [1, 2], example={"images": X})


@pytest.mark.parametrize(("example", "found"), [(None, [([4], "float32")]), (X, [([3], "float32")])])
def test_before_any_call_the_example_comes_before_the_batch(example, found):
    inputs = NetworkInputs()
    inputs.watch(Holder(example), Two())
    inputs.take_from((torch.zeros(2, 4), torch.zeros(2)))
    assert inputs.state() == found


def test_a_network_of_named_batches_loses_channels(fit, task_class, digits_loaders):
    class Named(nn.Sequential):
        def forward(self, images):
            return super().forward(images)

    class Task(task_class):
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
    task, _ = fit(pruning, task=Task(), loaders=loaders, epochs=2, num_sanity_val_steps=0)
    assert task.model[3].out_channels == 8
