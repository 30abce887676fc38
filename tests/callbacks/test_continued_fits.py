"""A trainer that is told to go on, optimizers that are used again, and layers that freeze on the way."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from lightning_edge import ChannelPruning, QuantizationAwareTraining, WeightPruning, WeightSharing
from lightning_edge.functional.regrowth import RigL

WEIGHTS = ("model.0.weight", "model.3.weight", "model.7.weight")
SIZE = 72 + 1152 + 1440


def zeros(task):
    return [int((task.state_dict()[name] == 0).sum()) for name in WEIGHTS]


def go_on(trainer, task, loaders, epochs):
    trainer.fit_loop.max_epochs = epochs
    trainer.fit(task, *loaders)


@pytest.mark.parametrize("score", ["taylor", "movement", "magnitude", "random"])
def test_a_fit_that_goes_on_keeps_its_masks(fit, digits_loaders, score):
    pruning = WeightPruning(0.5, start_epoch=1, score=score)
    task, trainer = fit(pruning, epochs=2)
    before = zeros(task)
    go_on(trainer, task, digits_loaders(), 4)
    assert trainer.global_step == 32
    assert zeros(task) == before
    assert sum(before) == SIZE // 2


def test_a_fit_that_goes_on_ends_the_schedule_that_an_interrupted_one_began(fit, digits_loaders):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1 and trainer.max_epochs == 4:
                raise RuntimeError("stop")

    class Keep(Callback):
        def setup(self, trainer, pl_module, stage):
            self.trainer, self.task = trainer, pl_module

    keep, pruning = Keep(), WeightPruning(0.8, end_epoch=3, score="random")
    with pytest.raises(RuntimeError, match="stop"):
        fit(keep, pruning, Stop())
    masks = pruning.state_dict()["masks"]
    go_on(keep.trainer, keep.task, digits_loaders(), 6)
    task = keep.task
    assert sum(zeros(task)) == int(0.8 * SIZE)
    assert not any(bool((pruning.state_dict()["masks"][name] & ~mask).any()) for name, mask in masks.items())


def test_another_network_in_the_same_trainer_starts_anew(fit, task_class, digits_loaders):
    pruning = WeightPruning(0.5, start_epoch=1)
    first, trainer = fit(pruning, epochs=2)
    other = task_class()
    go_on(trainer, other, digits_loaders(), 4)
    assert sum(zeros(other)) == SIZE // 2
    assert zeros(other) != zeros(first)


def test_a_decision_without_any_gradient_is_refused(fit, task_class, digits_loaders):
    _, trainer = fit(WeightPruning(0.5, start_epoch=1, score="taylor"), epochs=2)
    with pytest.raises(ValueError, match="score 'taylor' must see gradients before a decision, got none"):
        go_on(trainer, task_class(), digits_loaders(), 4)


@pytest.mark.parametrize(
    "options", [{"remove_epoch": 1}, {}, {"start_epoch": 1, "score": "taylor"}], ids=["removed", "at the end", "taylor"]
)
def test_a_fit_that_goes_on_removes_no_more_channels(fit, digits_loaders, options):
    pruning = ChannelPruning(sparsity=0.5, round_to=2, **options)
    task, trainer = fit(pruning, epochs=2)
    assert task.model[3].out_channels == 8
    go_on(trainer, task, digits_loaders(), 4)
    assert task.model[3].out_channels == 8
    assert pruning.report.manifest == {"3": {"out_channels": 8}, "7": {"in_features": 72}}


def test_a_fit_that_goes_on_keeps_its_codes_and_observers(fit, digits_loaders):
    sharing, quantization = WeightSharing(4, at_epochs=[0]), QuantizationAwareTraining(0)
    task, trainer = fit(sharing, quantization, epochs=1)
    codes = {name: value.clone() for name, value in sharing.state_dict()["codes"].items()}
    go_on(trainer, task, digits_loaders(), 2)
    assert all(torch.equal(value, codes[name]) for name, value in sharing.state_dict()["codes"].items())
    assert max(len(torch.unique(task.state_dict()[name])) for name in WEIGHTS) <= 4
    assert quantization.state_dict()["observers"]


def test_a_checkpoint_wins_over_what_the_callback_kept(fit, tmp_path, digits_loaders):
    pruning = WeightPruning(0.8, end_epoch=3, schedule="linear", score="random")
    whole, trainer = fit(pruning)
    trainer.fit(whole, *digits_loaders(), ckpt_path=tmp_path / "fit" / "epoch=0.ckpt")
    again, _ = fit(WeightPruning(0.8, end_epoch=3, schedule="linear", score="random"), folder="again")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightPruning(0.9),
        lambda: ChannelPruning(sparsity=0.5, round_to=2),
        lambda: WeightSharing(4, at_epochs=[0]),
    ],
    ids=["pruning", "channels", "sharing"],
)
def test_an_optimizer_that_is_used_again_has_no_hook_left(fit, task_class, make, fails):
    class Own(task_class):
        def configure_optimizers(self):
            return optimizer

    class Fail(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert optimizer._optimizer_step_post_hooks
            if fails:
                raise RuntimeError("stop")

    task = Own()
    optimizer = torch.optim.SGD(task.parameters(), 0.05)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            fit(make(), Fail(), task=task, epochs=1)
    else:
        fit(make(), Fail(), task=task, epochs=1)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    "options",
    [
        {"score": "taylor", "start_epoch": 1},
        {"score": "movement", "start_epoch": 1},
        {"score": "snip"},
        {"regrowth": RigL(every_n_steps=3, end_step=16)},
    ],
    ids=["taylor", "movement", "snip", "rigl"],
)
def test_optimizers_that_are_toggled_freeze_each_others_weights_for_a_moment(fit, task_class, options):
    class Toggled(task_class):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()
                self.untoggle_optimizer(optimizer)
            for optimizer in self.optimizers():
                optimizer.zero_grad()

        def configure_optimizers(self):
            first, second = self.model[:3].parameters(), self.model[3:].parameters()
            return torch.optim.SGD(first, 0.05), torch.optim.SGD(second, 0.05)

    task, _ = fit(WeightPruning(0.5, **options), task=Toggled(), epochs=2)
    assert sum(zeros(task)) == SIZE // 2


def test_a_layer_that_freezes_after_the_last_decision_stays_pruned(fit, tmp_path, digits_loaders):
    class Freeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                pl_module.model[3].requires_grad_(False)

    pruning = WeightPruning(0.5, start_epoch=1, score="taylor")
    task, trainer = fit(pruning, Freeze())
    frozen = task.model[3].weight.clone()
    assert sum(zeros(task)) == SIZE // 2
    go_on(trainer, task, digits_loaders(), 5)
    assert torch.equal(task.model[3].weight, frozen)
