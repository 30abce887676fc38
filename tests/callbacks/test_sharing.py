import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from lightning_edge import WeightPruning, WeightSharing

WEIGHTS = ("model.0.weight", "model.3.weight", "model.7.weight")


def distinct(state):
    return [len(state[name].unique()) for name in WEIGHTS]


class Watch(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, distinct(pl_module.state_dict())))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.seen.append((trainer.current_epoch, distinct(pl_module.state_dict())))


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_a_shared_layer_has_at_most_k_values_at_every_forward(fit, gradient):
    watch = Watch()
    task, _ = fit(WeightSharing(6, at_epochs=[1, 3], gradient=gradient), watch)
    assert all(max(values) <= 6 for epoch, values in watch.seen if epoch >= 1)
    assert min(min(values) for epoch, values in watch.seen if epoch == 0) > 6
    assert task.model[7].weight.isfinite().all()


def test_shared_values_are_trained(fit, tmp_path):
    fit(WeightSharing(6, at_epochs=[1]))
    first, last = (torch.load(tmp_path / "fit" / f"epoch={e}.ckpt", weights_only=True)["state_dict"] for e in (1, 3))
    assert not any(torch.equal(first[name], last[name]) for name in WEIGHTS)


def test_zeros_of_pruning_stay_and_come_on_top(fit):
    watch = Watch()
    task, _ = fit(WeightPruning(0.8, end_epoch=1), WeightSharing(bits=2, at_epochs=[2]), watch)
    state = task.state_dict()
    assert sum(int((state[name] == 0).sum()) for name in WEIGHTS) == int(0.8 * 2664)
    assert all(max(values) <= 5 for epoch, values in watch.seen if epoch >= 2)
    assert distinct(state) == [5, 5, 5]


@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=lambda options: next(iter(options)),
)
def test_sharing_holds_under_what_a_trainer_does(fit, options):
    watch = Watch()
    fit(WeightSharing(4, at_epochs=[1]), watch, epochs=3, **options)
    assert all(max(values) <= 4 for epoch, values in watch.seen if epoch >= 1)


@pytest.mark.parametrize("averaging_first", [True, False])
def test_an_averaged_network_is_shared_too(fit, averaging_first):
    watch, average = Watch(), EMAWeightAveraging(decay=0.9)
    callbacks = [WeightPruning(0.5), WeightSharing(4, at_epochs=[1, 2]), average]
    task, _ = fit(*(callbacks[::-1] if averaging_first else callbacks), watch)
    assert all(max(values) <= 5 for epoch, values in watch.seen if epoch >= 1)
    assert max(distinct(task.state_dict())) <= 5


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("init", ["optimal", "random"])
def test_resumed_equals_uninterrupted(fit, tmp_path, epoch, init):
    def make():
        return WeightPruning(0.7, end_epoch=1), WeightSharing(5, at_epochs=[1, 3], init=init)

    whole, _ = fit(*make())
    resumed, _ = fit(*make(), folder="resumed", ckpt_path=tmp_path / "fit" / f"epoch={epoch}.ckpt")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_a_mapping_leaves_the_other_layers_free(fit):
    task, _ = fit(WeightSharing({"7": 4}, at_epochs=[1]), epochs=2)
    assert distinct(task.state_dict())[2] == 4
    assert min(distinct(task.state_dict())[:2]) > 60


def test_a_fit_that_ends_early_raises(fit):
    with pytest.raises(
        ValueError,
        match=r"must cluster at epochs \[1, 3\], got a fit that ended at epoch 3 with the last clustering at 1",
    ):
        fit(WeightSharing(4, at_epochs=[3, 1]), ends=24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clusters": 4, "at_epochs": []}, "at_epochs must name at least one epoch >= 0"),
        ({"clusters": 4, "at_epochs": [-1]}, "at_epochs must name at least one epoch >= 0"),
        (
            {"clusters": 4, "at_epochs": [0.5]},
            r"at_epochs must name at least one epoch >= 0, a whole number, got \[0.5\]",
        ),
        ({"clusters": 4, "at_epochs": 5}, r"at_epochs must be a list of epochs, got 5: write \[5\]"),
        (
            {"clusters": 4, "at_epochs": [1], "reassign_every": 1, "freeze_epoch": 2.5},
            "freeze_epoch must be a whole number above the last of at_epochs, 1, got 2.5",
        ),
        ({"at_epochs": [1]}, "clusters or bits must be given"),
        ({"clusters": 4, "at_epochs": [1], "gradient": "max"}, r"gradient must be one of \['mean', 'sum'\], got 'max'"),
        ({"clusters": 4, "at_epochs": [1], "init": "max"}, "init must be one of"),
    ],
)
def test_bad_arguments_fail_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightSharing(**arguments)


def test_an_epoch_past_the_end_fails_at_setup(fit):
    with pytest.raises(ValueError, match=r"at_epochs must lie below max_epochs=4 \(zero-based\), got 9"):
        fit(WeightSharing(4, at_epochs=[1, 9]))


def test_pruning_after_sharing_is_refused_with_the_legal_order(fit):
    with pytest.raises(ValueError, match="WeightPruning must end before WeightSharing.*pruning, then sharing"):
        fit(WeightPruning(0.5, end_epoch=3), WeightSharing(4, at_epochs=[1]))
    with pytest.raises(ValueError, match="at the start of an epoch the list of callbacks is the order"):
        fit(WeightSharing(4, at_epochs=[1]), WeightPruning(0.5, end_epoch=1))
