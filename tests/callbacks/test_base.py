import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from lightning_edge import WeightPruning


def test_early_stopping_is_warned_of(fit):
    with pytest.warns(UserWarning, match="EarlyStopping may end the fit before epoch 2"):
        fit(WeightPruning(0.5, end_epoch=2), EarlyStopping("val/loss", patience=9))


def test_a_best_checkpoint_that_may_be_dense_is_warned_of(fit, tmp_path):
    with pytest.warns(UserWarning, match=r"ModelCheckpoint\(monitor='val/loss'\) may choose an epoch before 2"):
        fit(WeightPruning(0.5, end_epoch=2), ModelCheckpoint(tmp_path / "best", monitor="val/loss"))


def test_a_strategy_that_shards_is_refused(fit, monkeypatch):
    pruning = WeightPruning(0.5)

    class Sharding:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    with pytest.raises(ValueError, match="strategy must keep whole parameters on every device, got FSDPStrategy"):
        pruning.setup(Sharding(), nn.Module(), "fit")


def test_a_network_built_in_configure_model_is_found(fit, task_class):
    class Late(task_class):
        def __init__(self):
            super().__init__()
            del self.model

        def configure_model(self):
            if not hasattr(self, "model"):
                self.model = task_class().model

    task, _ = fit(WeightPruning(0.5), task=Late(), epochs=1)
    assert int((task.model[7].weight == 0).sum()) > 0


def test_tests_with_a_checkpoint_need_no_fit(fit, tmp_path, task_class, digits_loaders):
    class Tested(task_class):
        def test_step(self, batch, _):
            self.log("zeros", (self.model[7].weight == 0).float().mean())

    fit(WeightPruning(0.5, scope="layer"), task=Tested(), epochs=1)
    _, trainer = fit(WeightPruning(0.5), task=Tested(), epochs=1, folder="other")
    checkpoint = tmp_path / "fit" / "epoch=0.ckpt"
    result = trainer.test(Tested(), digits_loaders()[1], ckpt_path=checkpoint, verbose=False)
    assert result == [{"zeros": 0.5}]
    assert torch.load(checkpoint, weights_only=True)["state_dict"]["model.7.weight"].eq(0).float().mean() == 0.5


def test_a_second_fit_that_has_nothing_left_to_train_is_no_failure(fit, digits_loaders):
    task, trainer = fit(WeightPruning(0.5, end_epoch=1), epochs=2)
    before = task.model[7].weight.detach().clone()
    trainer.fit(task, *digits_loaders())
    assert torch.equal(task.model[7].weight, before)
