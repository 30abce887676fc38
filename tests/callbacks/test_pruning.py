import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

from lightning_edge import WeightPruning
from lightning_edge.functional.pruning import pruned_count

WEIGHTS = ("model.0.weight", "model.3.weight", "model.7.weight")
SIZE = 72 + 1152 + 1440


def zeros(state):
    return sum(int((state[name] == 0).sum()) for name in WEIGHTS)


class Watch(Callback):
    """Counts the zeros of the live network at every forward that a user could see."""

    def __init__(self):
        self.after_batch, self.in_validation = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.after_batch.append((trainer.current_epoch, zeros(pl_module.state_dict())))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.in_validation.append((trainer.current_epoch, zeros(pl_module.state_dict())))


@pytest.mark.parametrize("schedule", ["cubic", "linear", "one_shot"])
def test_the_count_is_exact_at_every_step_and_never_above_the_schedule(fit, schedule):
    watch, pruning = Watch(), WeightPruning(0.87, start_epoch=1, end_epoch=3, schedule=schedule)
    fit(pruning, watch)
    for epoch, count in watch.after_batch + watch.in_validation:
        expected = pruned_count(SIZE, pruning.sparsity_at(epoch)) if epoch >= 1 else 0
        assert count == expected
    assert watch.in_validation[-1] == (3, int(0.87 * SIZE))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_each_scope_reaches_its_count(fit, scope):
    task, _ = fit(WeightPruning(0.8, end_epoch=2, scope=scope))
    counts = [int((task.state_dict()[name] == 0).sum()) for name in WEIGHTS]
    if_layer = [pruned_count(task.state_dict()[name].numel(), 0.8) for name in WEIGHTS]
    assert sum(counts) == (pruned_count(SIZE, 0.8) if scope == "global" else sum(if_layer))
    assert (counts == if_layer) == (scope == "layer")


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_zeros_hold_under_what_a_trainer_does(fit, options):
    watch = Watch()
    fit(WeightPruning(0.9, end_epoch=1), watch, **options)
    assert {count for epoch, count in watch.after_batch + watch.in_validation if epoch >= 1} == {int(0.9 * SIZE)}


def test_clipping_sees_no_gradient_of_pruned_weights(fit):
    seen = []

    class Norm(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            weight = pl_module.model[7].weight
            seen.append(float(weight.grad[weight == 0].abs().sum()))

    fit(WeightPruning(0.9), Norm(), gradient_clip_val=1.0, epochs=1)
    assert len(seen) == 8
    assert set(seen) == {0.0}


@pytest.mark.parametrize("averaging_first", [True, False])
def test_an_averaged_network_is_exactly_sparse_too(fit, tmp_path, averaging_first):
    watch, average = Watch(), EMAWeightAveraging(decay=0.9)
    callbacks = [WeightPruning(0.9, end_epoch=2), average]
    task, _ = fit(*(callbacks[::-1] if averaging_first else callbacks), watch)
    assert watch.in_validation[-1] == (3, int(0.9 * SIZE))
    assert zeros(task.state_dict()) == int(0.9 * SIZE)
    saved = torch.load(tmp_path / "fit" / "epoch=3.ckpt", weights_only=True)
    assert zeros(saved["state_dict"]) == int(0.9 * SIZE)


def test_manual_optimization_with_two_optimizers(fit, task_class):
    class Manual(task_class):
        automatic_optimization = False

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            first, second = self.model[:3].parameters(), self.model[3:].parameters()
            return torch.optim.Adam(first, 1e-3), torch.optim.SGD(second, 0.05, momentum=0.9)

    watch = Watch()
    fit(WeightPruning(0.8, end_epoch=1), watch, task=Manual())
    assert {count for epoch, count in watch.after_batch if epoch >= 1} == {int(0.8 * SIZE)}


def test_the_checkpoint_is_that_of_the_plain_network(fit, tmp_path, task_class):
    task, _ = fit(WeightPruning(0.9, end_epoch=1))
    saved = torch.load(tmp_path / "fit" / "epoch=3.ckpt", weights_only=True)["state_dict"]
    plain = task_class()
    plain.load_state_dict(saved, strict=True)
    assert list(saved) == list(task_class().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), task.state_dict().values(), strict=True))


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resumed_equals_uninterrupted(fit, tmp_path, epoch):
    whole, _ = fit(WeightPruning(0.9, end_epoch=2))
    checkpoint = tmp_path / "fit" / f"epoch={epoch}.ckpt"
    resumed, _ = fit(WeightPruning(0.9, end_epoch=2), folder="resumed", ckpt_path=checkpoint)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_two_callbacks_keep_their_states_apart(fit, tmp_path):
    def make():
        return WeightPruning(0.5, include=["0", "3"]), WeightPruning(0.9, end_epoch=1, include=["7"])

    whole, _ = fit(*make())
    resumed, _ = fit(*make(), folder="resumed", ckpt_path=tmp_path / "fit" / "epoch=2.ckpt")
    assert int((resumed.model[7].weight == 0).sum()) == 1296
    assert torch.equal(whole.model[7].weight, resumed.model[7].weight)


def test_a_checkpoint_of_another_selection_is_refused(fit, tmp_path):
    fit(WeightPruning(0.5))
    saved = torch.load(tmp_path / "fit" / "epoch=0.ckpt", weights_only=True)
    del saved["callbacks"][WeightPruning(0.5).state_key]["masks"]["7.weight"]
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"must select the layers that the checkpoint was made with.*'7\.weight'"):
        fit(WeightPruning(0.5), folder="other", ckpt_path=tmp_path / "other.ckpt")


def test_a_fit_that_ends_early_raises_with_target_and_value(fit):
    with pytest.raises(
        ValueError, match=r"must reach sparsity 0\.9 at epoch 3, got 0\.5995 when the fit ended at epoch 3"
    ):
        fit(WeightPruning(0.9, end_epoch=3, schedule="linear"), ends=24)


def test_a_trial_run_of_one_batch_is_no_error(tmp_path, fit):
    fit(WeightPruning(0.9, end_epoch=30), fast_dev_run=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.0}, "sparsity must be above 0"),
        ({"sparsity": 95}, r"for 95 percent write 0\.95"),
        (
            {"sparsity": 0.5, "start_epoch": 4, "end_epoch": 2},
            "end_epoch must be a whole number of at least 4, got 2",
        ),
        ({"sparsity": 0.5, "scope": "net"}, "scope must be one of"),
        ({"sparsity": 0.5, "schedule": "quick"}, "schedule must be one of"),
    ],
)
def test_bad_arguments_fail_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightPruning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end_epoch": 4}, r"end_epoch must be below max_epochs=4 \(zero-based\), got 4"),
        ({"include": ["fc*"]}, r"include must match .* got 'fc\*'"),
        ({"network": "net"}, "network must be a dotted path inside DigitsTask, got 'net'"),
    ],
)
def test_what_cannot_work_fails_at_setup(fit, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(WeightPruning(0.5, **arguments))
