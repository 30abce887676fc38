from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from lightning_edge import (
    ChannelPruning,
    ExactResume,
    ExportArtifacts,
    QuantizationAwareTraining,
    WeightPruning,
    WeightSharing,
    load_artifact,
    load_widths_,
    slim_channels_,
)
from lightning_edge.models import DigitsNet
from lightning_edge.modules import ClassificationModule
from lightning_edge.surgery.widths import WIDTHS_KEY


def shapes(task):
    return {name: tuple(value.shape) for name, value in task.state_dict().items()}


class Zeros(Callback):
    """How many output channels of the second convolution are zero after every step, and before every validation."""

    def __init__(self):
        self.seen = []

    def look(self, trainer, pl_module, *_):
        layer = pl_module.model[3]
        zero = (layer.weight.flatten(1) == 0).all(1) & (layer.bias == 0)
        consumers = (pl_module.model[7].weight.view(10, layer.out_channels, 9) == 0).all(2).all(0)
        assert torch.equal(zero, consumers)
        self.seen.append((trainer.current_epoch, int(zero.sum())))

    on_train_batch_end = on_validation_start = look


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"num_sanity_val_steps": 0},
    ],
)
def test_units_are_zero_at_every_step_and_gone_at_the_end(fit, options):
    zeros = Zeros()
    pruning = ChannelPruning(sparsity=0.5, start_epoch=1, end_epoch=2, schedule="linear", round_to=2)
    task, _ = fit(pruning, zeros, **options)
    by_epoch = {epoch: {count for at, count in zeros.seen if at == epoch} for epoch in range(4)}
    assert by_epoch == {0: {0}, 1: {0}, 2: {8}, 3: {8}}
    assert shapes(task)["model.3.weight"] == (8, 8, 3, 3)
    assert shapes(task)["model.7.weight"] == (10, 72)
    assert pruning.report.manifest == {"3": {"out_channels": 8}, "7": {"in_features": 72}}
    assert pruning.report.difference <= 1e-5
    assert pruning.report.protected == {
        "0": "the first layer is among them (protect_ends)",
        "7": "its channels are outputs of the network",
    }


@pytest.mark.parametrize(("kind", "left"), [("macs", 7), ("parameters", 9), ("sparsity", 6)])
def test_the_target_is_reached(fit, kind, left):
    pruning = ChannelPruning(**{kind: 0.6}, end_epoch=2, round_to=1)
    fit(pruning)
    assert pruning.report.manifest["3"]["out_channels"] == left
    # One channel more would be above the target: 9 x 8 + 1 weights and a column of 9 x 10 behind it.
    assert pruning.report.macs == (16416, 4608 + left * (8 * 9 * 9 + 90))
    assert pruning.report.parameters == (2706, 98 + left * (8 * 9 + 1 + 90))


SCHEDULES = {
    "l2": {"sparsity": 0.5, "start_epoch": 0, "end_epoch": 2},
    "taylor": {"sparsity": 0.5, "start_epoch": 1, "end_epoch": 2, "score": "taylor"},
    "steps": {"sparsity": 0.5, "start_step": 3, "end_step": 17, "every": 3, "score": "taylor"},
    "random": {"sparsity": 0.5, "start_epoch": 0, "end_epoch": 2, "score": "random", "seed": 3},
    "removed": {"sparsity": 0.5, "start_epoch": 0, "end_epoch": 1, "remove_epoch": 2},
}


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_resumed_equals_uninterrupted(fit, tmp_path, options):
    whole, _ = fit(ChannelPruning(**options, round_to=2), folder="whole")
    for epoch in range(4):
        checkpoint = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        resumed, _ = fit(ChannelPruning(**options, round_to=2), folder="resumed", ckpt_path=checkpoint, seed=epoch + 50)
        assert shapes(resumed) == shapes(whole)
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("score", ["l2", "taylor", "random"])
def test_no_unit_ever_comes_back(fit, score):
    """A unit that is zero on both sides has no gradient: counted among those that stay, it would be dead."""

    class Kept(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, *_):
            self.seen.append({name: mask.clone() for name, mask in pruning.state_dict()["kept"].items()})

    kept = Kept()
    pruning = ChannelPruning(
        macs=0.4, start_step=2, end_step=20, score=score, round_to=8, schedule="linear", protect_ends=False
    )
    task, _ = fit(kept, pruning, task=ClassificationModule(DigitsNet()))
    steps = [step for step in kept.seen if step]
    for before, after in pairwise(steps):
        assert not any(bool((after[name] & ~mask).any()) for name, mask in before.items())
    assert all(bool((layer.weight.flatten(1) != 0).any(1).all()) for layer in (task.network.conv2, task.network.fc1))


def test_before_the_removal_a_checkpoint_is_that_of_the_plain_network(fit, tmp_path, task_class):
    fit(ChannelPruning(sparsity=0.5, round_to=2))
    checkpoint = torch.load(tmp_path / "fit" / "epoch=3.ckpt", weights_only=True)
    assert WIDTHS_KEY not in checkpoint
    task_class().load_state_dict(checkpoint["state_dict"], strict=True)


def test_after_the_removal_a_checkpoint_carries_its_widths(fit, tmp_path, task_class, digits_loaders):
    options = {"sparsity": 0.5, "round_to": 2, "remove_epoch": 1}
    task, _ = fit(ChannelPruning(**options))
    path = tmp_path / "fit" / "epoch=3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint[WIDTHS_KEY] == {"3": {"out_channels": 8}, "7": {"in_features": 72}}
    # By hand, without a trainer:
    plain = task_class()
    slim_channels_(plain.model, checkpoint[WIDTHS_KEY])
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    # By the trainer, validating a checkpoint with a plain module:
    settings = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1}
    trainer = L.Trainer(**settings, callbacks=[ExactResume(), ChannelPruning(**options)])
    other = task_class()
    (found,) = trainer.validate(other, digits_loaders()[1], ckpt_path=path)
    (expected,) = L.Trainer(**settings).validate(task, digits_loaders()[1])
    assert found == expected
    assert shapes(other) == shapes(task)
    assert "on_load_checkpoint" not in vars(other)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_one_line_in_a_hook_reloads_without_the_callback(fit, tmp_path, task_class, digits_loaders):
    class Reloading(task_class):
        def on_load_checkpoint(self, checkpoint):
            load_widths_(self.model, checkpoint)

    fit(ChannelPruning(sparsity=0.5, round_to=2, remove_epoch=1), task=Reloading())
    task = Reloading.load_from_checkpoint(tmp_path / "fit" / "epoch=3.ckpt")
    assert task.model[3].out_channels == 8
    assert Reloading.load_from_checkpoint(tmp_path / "fit" / "epoch=0.ckpt").model[3].out_channels == 16
    settings = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1}
    plain = L.Trainer(**settings)
    plain.validate(Reloading(), digits_loaders()[1], ckpt_path=tmp_path / "fit" / "epoch=3.ckpt", verbose=False)
    plain.validate(task, digits_loaders()[1], ckpt_path=tmp_path / "fit" / "epoch=3.ckpt", verbose=False)


def test_a_wide_checkpoint_needs_a_module_that_is_wide(fit, tmp_path, task_class, digits_loaders):
    task, trainer = fit(ChannelPruning(sparsity=0.5, round_to=2, remove_epoch=1))
    wide = tmp_path / "fit" / "epoch=0.ckpt"
    with pytest.raises(ValueError, match="got one of the wide network: load it into a new DigitsTask"):
        trainer.validate(task, digits_loaders()[1], ckpt_path=wide, verbose=False)
    other = task_class()
    trainer.validate(other, digits_loaders()[1], ckpt_path=wide, verbose=False)
    assert other.model[3].out_channels == 16


def test_our_own_module_reloads_by_itself(fit, tmp_path):
    task, _ = fit(ChannelPruning(sparsity=0.5, remove_epoch=1), task=ClassificationModule(DigitsNet()))
    path = tmp_path / "fit" / "epoch=3.ckpt"
    again = ClassificationModule.load_from_checkpoint(path, network=DigitsNet())
    assert shapes(again) == shapes(task)
    assert again.network.conv3.out_channels < 64


def test_removal_in_the_middle_equals_zeros_all_along(fit, task_class):
    tasks = []
    for remove_epoch in (1, None):
        torch.manual_seed(0)
        task = task_class()
        task.model[6].p = 0.0  # dropout draws other numbers for other shapes
        fit(ChannelPruning(sparsity=0.5, round_to=2, remove_epoch=remove_epoch), task=task)
        tasks.append(task)
    early, late = tasks
    for name, value in late.state_dict().items():
        torch.testing.assert_close(early.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_an_averaged_network_is_narrow_too(fit):
    average = EMAWeightAveraging(decay=0.9)
    task, _ = fit(ChannelPruning(sparsity=0.5, round_to=2), average)
    assert task.model[3].out_channels == 8
    with pytest.raises(ValueError, match="remove_epoch must be None with WeightAveraging"):
        fit(ChannelPruning(sparsity=0.5, round_to=2, remove_epoch=2), EMAWeightAveraging(decay=0.9))


def test_the_other_techniques_work_on_the_narrow_network(fit, tmp_path):
    export = ExportArtifacts(tmp_path / "out", formats=["edge", "onnx"], min_agreement=0.9)
    task, _ = fit(
        ChannelPruning(sparsity=0.5, round_to=2, remove_epoch=1),
        WeightPruning(0.5, start_epoch=1),
        WeightSharing(8, at_epochs=[2]),
        QuantizationAwareTraining(2, freeze_observers_epoch=3),
        export,
    )
    assert task.model[3].out_channels == 8
    assert len(torch.unique(task.model[3].weight)) <= 9
    assert load_artifact(tmp_path / "out" / "model.onnx")(torch.rand(3, 1, 8, 8).numpy()).shape == (3, 10)


@pytest.mark.parametrize(
    ("other", "first"),
    [
        (WeightPruning(0.5, start_epoch=1), 1),
        (WeightSharing(8, at_epochs=[2]), 2),
        (QuantizationAwareTraining(0), 0),
    ],
)
def test_callbacks_that_hold_the_wide_shapes_are_refused(fit, other, first):
    with pytest.raises(ValueError, match=rf"remove_epoch must be at most {first}, where {type(other).__name__} begins"):
        fit(ChannelPruning(sparsity=0.5), other)


def test_channels_that_go_after_sharing_are_refused(fit):
    with pytest.raises(ValueError, match="ChannelPruning must end before WeightSharing fixes"):
        fit(ChannelPruning(sparsity=0.5, end_epoch=2, remove_epoch=2), WeightSharing(8, at_epochs=[1]))


def test_a_fit_that_ends_early_raises(fit):
    with pytest.raises(
        ValueError, match="ChannelPruning must reach its target at epoch 3, got a fit that ended at epoch"
    ):
        fit(ChannelPruning(sparsity=0.5, end_epoch=3, round_to=2), ends=10)


def test_a_trial_run_of_one_batch_is_no_error(fit):
    task, _ = fit(ChannelPruning(sparsity=0.5, end_epoch=30, round_to=2), fast_dev_run=True)
    assert task.model[3].out_channels == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of sparsity=, macs= and parameters="),
        ({"macs": 0.5, "end_epoch": 3, "remove_epoch": 2}, "remove_epoch must be at least end_epoch=3, got 2"),
        ({"macs": 0.5, "score": "taylor"}, "score 'taylor' must see gradients before the first decision"),
        ({"macs": 0.5, "start_step": 3, "end_epoch": 2}, "start_step and end_step must not be mixed with epochs"),
        ({"macs": 0.5, "every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"macs": 0.5, "round_to": 1.5}, "round_to must be a whole number"),
    ],
)
def test_bad_arguments_fail_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        ChannelPruning(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end_epoch": 4}, r"end_epoch must be below max_epochs=4 \(zero-based\), got 4"),
        ({"remove_epoch": 4}, r"remove_epoch must be below max_epochs=4 \(zero-based\), got 4"),
        ({"include": ["9"]}, "include must be a list of patterns that match"),
        ({"end_step": 32}, "end_step must be below the 32 optimizer steps of the fit, got 32"),
        ({"include": ["7"]}, "network must have channels that can be removed, got none"),
    ],
)
def test_what_cannot_work_fails_before_training(fit, options, message):
    with pytest.raises(ValueError, match=message):
        fit(ChannelPruning(sparsity=0.5, **options))


def test_an_optimizer_whose_states_cannot_be_cut_is_refused_after_the_first_epoch(fit, task_class):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter] = {"rows": torch.ones(2)}
            return super().step(closure)

    class Task(task_class):
        def configure_optimizers(self):
            return Odd(self.parameters(), 0.05)

    task = Task()
    with pytest.raises(ValueError, match="got Odd with 'rows' of another shape"):
        fit(ChannelPruning(sparsity=0.5, round_to=2), task=task)
    assert task.current_epoch == 0
