"""What fails with other pruning callbacks, one test or more for each failure; all of it holds with ours.

``benchmarks/lightning_model_pruning.py`` shows what Lightning's own ``ModelPruning`` makes of them. The last test runs
this file as the script of its two processes.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

from lightning_edge import WeightPruning
from lightning_edge.functional.pruning import pruned_count

WEIGHTS = ("model.0.weight", "model.3.weight", "model.7.weight")
SIZE = 72 + 1152 + 1440
HERE = Path(__file__).parent


def zeros(state, names=WEIGHTS):
    return sum(int((state[name] == 0).sum()) for name in names)


def due(pruning, time):
    """Return how many weights are zero from the decision at a time on."""
    return pruned_count(pruned_count(SIZE, pruning.target.sparsity), pruning.clock.progress(time))


class Probe(Callback):
    """Notes (epoch, step, zeros) after every batch and in every validation step."""

    def __init__(self, names=WEIGHTS):
        self.names, self.after_batch, self.in_validation = names, [], []

    def note(self, trainer, pl_module):
        return trainer.current_epoch, trainer.global_step, zeros(pl_module.state_dict(), self.names)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after_batch.append(self.note(trainer, pl_module))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.in_validation.append(self.note(trainer, pl_module))


def saved_state(path):
    return torch.load(path, weights_only=True)


# Sparsity is absolute: Lightning prunes a fraction of what is left, every epoch again.


def test_half_stays_half_over_all_epochs(fit):
    probe = Probe()
    fit(WeightPruning(0.5), probe, epochs=6)
    assert len(probe.after_batch) == 6 * 8
    assert {count for *_, count in probe.after_batch} == {SIZE // 2}


def test_a_second_fit_of_the_same_callback_starts_anew(fit):
    pruning = WeightPruning(0.5)
    task, _ = fit(pruning)
    again, _ = fit(pruning, folder="again", task=task)
    assert zeros(again.state_dict()) == SIZE // 2


def test_biases_and_norms_are_untouched_by_default(fit):
    pruning = WeightPruning(0.9)
    task, _ = fit(pruning)
    assert set(pruning.state_dict()["masks"]) == {"0.weight", "3.weight", "7.weight"}
    others = {name: value for name, value in task.named_parameters() if name not in WEIGHTS}
    assert set(others) == {"model.1.weight", "model.1.bias", "model.3.bias", "model.7.bias"}
    assert zeros(others, others) == 0


# Checkpoints.


def test_a_resumed_run_keeps_its_masks_from_the_first_step_on(fit, tmp_path, task_class):
    fit(WeightPruning(0.9, end_epoch=1))
    saved = saved_state(tmp_path / "fit" / "epoch=1.ckpt")["state_dict"]
    pruning, probe = WeightPruning(0.9, end_epoch=1), Probe()
    resumed, _ = fit(pruning, probe, folder="on", task=task_class(), ckpt_path=tmp_path / "fit" / "epoch=1.ckpt")
    assert len(probe.after_batch) == 2 * 8
    assert {count for *_, count in probe.after_batch + probe.in_validation[1:]} == {int(0.9 * SIZE)}
    for name in WEIGHTS:
        assert torch.equal(resumed.state_dict()[name] == 0, saved[name] == 0)


def test_a_network_with_a_buffer_called_causal_mask_checkpoints_and_loads(fit, tmp_path, task_class):
    class Causal(task_class):
        def __init__(self):
            super().__init__()
            self.model.register_buffer("causal_mask", torch.ones(4, 4).tril())

    task, _ = fit(WeightPruning(0.5, end_epoch=1), task=Causal())
    plain = Causal()
    plain.load_state_dict(saved_state(tmp_path / "fit" / "epoch=3.ckpt")["state_dict"], strict=True)
    assert torch.equal(plain.model.causal_mask, torch.ones(4, 4).tril())
    assert zeros(plain.state_dict()) == SIZE // 2
    resumed, _ = fit(
        WeightPruning(0.5, end_epoch=1), folder="on", task=Causal(), ckpt_path=tmp_path / "fit" / "epoch=2.ckpt"
    )
    assert torch.equal(resumed.model[7].weight, task.model[7].weight)


# Averages.


@pytest.mark.parametrize("averaging_first", [True, False])
def test_the_average_is_exactly_sparse_in_validation_in_checkpoints_and_at_the_end(fit, tmp_path, averaging_first):
    pruning, average, probe = WeightPruning(0.9, end_epoch=2), EMAWeightAveraging(decay=0.9), Probe()
    pair = [average, pruning] if averaging_first else [pruning, average]
    task, _ = fit(*pair, probe, num_sanity_val_steps=0)
    wanted = [due(pruning, epoch) for epoch in range(4)]
    assert [(epoch, count) for epoch, _, count in probe.in_validation] == list(enumerate(wanted))
    for epoch, count in enumerate(wanted):
        saved = saved_state(tmp_path / "fit" / f"epoch={epoch}.ckpt")
        assert zeros(saved["state_dict"]) == zeros(saved["current_model_state"]) == count
    masks = pruning.state_dict()["masks"]
    for name, value in task.model.state_dict().items():
        assert name not in masks or torch.equal(value != 0, masks[name])


def test_a_resumed_average_is_that_of_the_uninterrupted_run(fit, tmp_path):
    def make():
        return EMAWeightAveraging(decay=0.9), WeightPruning(0.9, end_epoch=2)

    whole, _ = fit(*make())
    resumed, _ = fit(*make(), folder="on", ckpt_path=tmp_path / "fit" / "epoch=1.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert zeros(resumed.state_dict()) == int(0.9 * SIZE)


# Optimizers and what a Trainer does with them.


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, weight_decay=0.1),
    ],
    ids=["nesterov", "fused", "adamw", "rmsprop"],
)
def test_momentum_and_weight_decay_revive_no_weight_at_any_step(fit, task_class, optimizer):
    class Task(task_class):
        def configure_optimizers(self):
            return optimizer(self.parameters())

    class Revived(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            masks = pruning.state_dict()["masks"]
            weights = pl_module.model.state_dict()
            counts.append(sum(int((weights[name][~mask] != 0).sum()) for name, mask in masks.items()))

    # The first epoch is dense, so that there is momentum to revive what goes afterwards.
    counts, pruning = [], WeightPruning(0.9, start_epoch=1, end_epoch=2)
    task, _ = fit(pruning, Revived(), task=Task(), epochs=3)
    assert counts == [0] * 24
    assert zeros(task.state_dict()) == int(0.9 * SIZE)


def test_manual_optimization_with_two_optimizers_that_take_turns(fit, task_class):
    class Turns(task_class):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[batch_idx % 2]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

        def configure_optimizers(self):
            first, second = self.model[:3].parameters(), self.model[3:].parameters()
            return torch.optim.AdamW(first, 1e-2), torch.optim.SGD(second, 0.05, momentum=0.9, weight_decay=0.1)

    probe, pruning = Probe(), WeightPruning(0.8, start_epoch=1, end_epoch=2)
    fit(pruning, probe, task=Turns())
    assert [count for *_, count in probe.after_batch] == [due(pruning, epoch) for epoch in range(4) for _ in range(8)]


def test_under_gradient_accumulation_a_schedule_of_steps_counts_optimizer_steps(fit):
    probe, pruning = Probe(), WeightPruning(0.8, start_step=2, end_step=6)
    fit(pruning, probe, accumulate_grad_batches=3)
    # Three steps an epoch: after three batches, after six, and after the last two. A decision is taken before a batch.
    steps = [(3 * epoch + batch // 3) for epoch in range(4) for batch in range(8)]
    assert [count for *_, count in probe.after_batch] == [due(pruning, step) for step in steps]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_counts_the_gradients_of_kept_weights_alone(fit, task_class, algorithm):
    class Task(task_class):
        def configure_gradient_clipping(self, optimizer, **options):
            pruned = [value.grad[value == 0] for name, value in self.named_parameters() if name in WEIGHTS]
            self.clip_gradients(optimizer, **options)
            kept = [value.grad[value != 0] for value in self.parameters()]
            seen.append((float(torch.cat(pruned).norm()), float(torch.cat(kept).norm())))

    seen = []
    fit(WeightPruning(0.9), task=Task(), epochs=2, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    assert len(seen) == 16
    assert {pruned for pruned, _ in seen} == {0.0}
    if_norm = [kept == pytest.approx(1e-3, rel=1e-2) for _, kept in seen]
    assert all(if_norm) == (algorithm == "norm")


@pytest.mark.parametrize(("precision", "kind"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_zeros_hold_in_bf16(fit, precision, kind):
    probe = Probe()
    task, _ = fit(WeightPruning(0.9), probe, precision=precision, epochs=2)
    assert {count for *_, count in probe.after_batch} == {int(0.9 * SIZE)}
    assert task.model[7].weight.dtype == kind


# Networks that are not plain.


def test_names_and_globs_are_the_plain_ones_in_a_compiled_network(fit, task_class):
    class Compiled(task_class):
        def __init__(self):
            super().__init__()
            self.model = torch.compile(self.model, backend="eager")

    pruning = WeightPruning(0.8, end_epoch=1, include=["[03]", "Linear"], exclude=["0"])
    task, _ = fit(pruning, task=Compiled(), epochs=2)
    assert set(pruning.state_dict()["masks"]) == {"3.weight", "7.weight"}
    names = ("model._orig_mod.3.weight", "model._orig_mod.7.weight")
    assert zeros(task.state_dict(), names) == pruned_count(1152 + 1440, 0.8)


def test_a_run_of_a_plain_network_goes_on_with_a_compiled_one(fit, tmp_path, task_class):
    class Compiled(task_class):
        def __init__(self):
            super().__init__()
            self.model.compile(backend="eager")

    fit(WeightPruning(0.9, end_epoch=1), epochs=2)
    probe = Probe()
    fit(
        WeightPruning(0.9, end_epoch=1),
        probe,
        folder="on",
        task=Compiled(),
        epochs=3,
        ckpt_path=tmp_path / "fit" / "epoch=1.ckpt",
    )
    assert [count for *_, count in probe.after_batch] == [int(0.9 * SIZE)] * 8


def test_a_compiled_lightning_module_is_pruned_like_a_plain_one(fit, task_class):
    probe = Probe()
    compiled = from_compiled(torch.compile(task_class(), backend="eager"))  # as trainer.fit does it
    fit(WeightPruning(0.9), probe, task=compiled, epochs=1)
    assert [count for *_, count in probe.after_batch] == [int(0.9 * SIZE)] * 8


class Tied(L.LightningModule):
    """Two layers with one weight, and an embedding that is the head's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.second.weight = self.first.weight
        self.head.weight = self.embedding.weight

    def training_step(self, batch, _):
        hidden = self.second(self.first(self.embedding(batch[1])).relu())
        return F.cross_entropy(self.head(hidden), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def test_tied_weights_are_pruned_once_and_stay_tied(fit, tmp_path, digits_loaders):
    pruning, probe = WeightPruning(0.75), Probe(("first.weight", "head.weight"))
    task, _ = fit(pruning, probe, task=Tied(), loaders=digits_loaders()[:1])
    assert set(pruning.state_dict()["masks"]) == {"first.weight", "head.weight"}
    assert task.second.weight is task.first.weight
    assert task.head.weight is task.embedding.weight
    assert {count for *_, count in probe.after_batch} == {pruned_count(64 + 80, 0.75)}
    saved = saved_state(tmp_path / "fit" / "epoch=3.ckpt")["state_dict"]
    assert torch.equal(saved["second.weight"], saved["first.weight"])


def test_a_frozen_layer_is_named_with_what_to_do(fit, task_class):
    task = task_class()
    task.model[3].requires_grad_(False)
    before = task.model[3].weight.clone()
    with pytest.raises(ValueError, match=r"layer '3' must be trainable, .*frozen: unfreeze it or add it to exclude"):
        fit(WeightPruning(0.5), task=task)
    fit(WeightPruning(0.5, exclude=["3"]), folder="without", task=task)
    assert torch.equal(task.model[3].weight, before)
    assert zeros(task.state_dict(), ("model.0.weight", "model.7.weight")) == (72 + 1440) // 2


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_layer_that_is_not_built_yet_is_named_with_what_to_do(fit, task_class, digits_loaders):
    task = task_class()
    task.model[7] = nn.LazyLinear(10)
    with pytest.raises(ValueError, match=r"layer '7' must be built before .*: run one batch through the network first"):
        fit(WeightPruning(0.5), task=task)
    images, _ = next(iter(digits_loaders()[0]))
    task(images)
    fit(WeightPruning(0.5), folder="built", task=task)
    assert zeros(task.state_dict()) == SIZE // 2


# Two processes.


def fit_this_rank(folder):
    """Fit with random pruning in one of two processes, each with a seed of its own."""
    from conftest import fit_digits

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    pruning = WeightPruning(0.5, end_epoch=1, score="random")
    task, trainer = fit_digits(folder / "fit", [pruning], seed=1 + rank, epochs=2, devices=2, strategy="ddp")
    parts = {"masks": pruning.state_dict()["masks"].values(), "weights": task.parameters()}
    lines = [f"seed {torch.initial_seed()}"]
    for name, tensors in parts.items():
        together = b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)
        lines.append(f"{name} {hashlib.sha256(together).hexdigest()}")
    lines.append(f"zeros {zeros(task.state_dict())}")
    (folder / f"rank{trainer.global_rank}.txt").write_text("\n".join(lines))


@pytest.mark.dist
def test_random_pruning_agrees_on_ranks_with_different_seeds(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    first, second = (
        dict(line.split() for line in (tmp_path / f"rank{rank}.txt").read_text().splitlines()) for rank in range(2)
    )
    assert first.pop("seed") != second.pop("seed")
    assert first == second
    assert int(first["zeros"]) == SIZE // 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit_this_rank(Path(sys.argv[1]))
