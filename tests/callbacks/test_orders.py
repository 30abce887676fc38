"""The table of legal orders in README.md, "Together": what undoes a technique is refused before any training."""

import lightning as L
import pytest
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_edge import (
    ChannelPruning,
    ExportArtifacts,
    QuantizationAwareTraining,
    WeightPruning,
    WeightSharing,
)
from lightning_edge.callbacks import PostTrainingQuantization
from lightning_edge.functional.regrowth import RigL

STEPS_PER_EPOCH = 8


def channels(epoch):
    return ChannelPruning(sparsity=0.5, end_epoch=epoch, remove_epoch=epoch)


def pruning(epoch):
    return WeightPruning(0.5, end_epoch=epoch)


def pruning_in_steps(step):
    return WeightPruning(0.5, start_step=0, end_step=step)


def regrown(step):
    return WeightPruning(0.5, regrowth=RigL(every_n_steps=2, end_step=step))


def sharing(epoch):
    return WeightSharing(4, at_epochs=[epoch])


def quantization(start, freeze):
    return QuantizationAwareTraining(start, freeze_observers_epoch=freeze)


AFTER_SHARING = "must end before WeightSharing fixes what it changes"
AFTER_FREEZING = "must end before QuantizationAwareTraining fixes what it changes"
CASES = {
    "pruned after sharing": ([pruning(2), sharing(1)], f"WeightPruning {AFTER_SHARING}"),
    "pruned after sharing, one epoch": ([sharing(1), pruning(1)], f"WeightPruning {AFTER_SHARING}"),
    "pruned in the middle of the epoch": ([pruning_in_steps(12), sharing(1)], f"WeightPruning {AFTER_SHARING}"),
    "pruned at the first step of the epoch": ([pruning_in_steps(8), sharing(1)], f"WeightPruning {AFTER_SHARING}"),
    "pruned in the first epoch, shared at its start": ([pruning_in_steps(3), sharing(0)], f"Pruning {AFTER_SHARING}"),
    "regrown after sharing": ([regrown(12), sharing(1)], f"WeightPruning {AFTER_SHARING}"),
    "channels after sharing": ([channels(2), sharing(1)], f"ChannelPruning {AFTER_SHARING}"),
    "pruned after freezing": ([pruning(2), quantization(0, 1)], f"WeightPruning {AFTER_FREEZING}"),
    "shared after freezing": ([sharing(2), quantization(0, 1)], f"WeightSharing {AFTER_FREEZING}"),
    "channels after freezing": ([channels(2), quantization(0, 1)], f"ChannelPruning {AFTER_FREEZING}"),
    "channels after pruning began": ([channels(2), pruning(3)], "remove_epoch must be at most 0, where WeightPruning"),
    "channels in the middle of quantization": (
        [channels(2), quantization(1, 3)],
        "remove_epoch must be at most 1, where QuantizationAwareTraining begins",
    ),
    "channels at the end": ([ChannelPruning(sparsity=0.5), pruning(1)], "remove_epoch must be at most 0"),
    "quantized twice": ([PostTrainingQuantization(), quantization(1, 2)], "callbacks must quantize once"),
    "exported before it is quantized": (
        [ExportArtifacts("unused", formats=["onnx"]), PostTrainingQuantization()],
        "before ExportArtifacts, got the other order",
    ),
}


@pytest.mark.parametrize(("callbacks", "message"), CASES.values(), ids=CASES)
def test_an_order_that_undoes_a_technique_is_refused(fit, callbacks, message):
    with pytest.raises(ValueError, match=message):
        fit(*callbacks)


@pytest.mark.parametrize(
    "callbacks",
    [
        [pruning_in_steps(STEPS_PER_EPOCH - 1), sharing(1)],
        [sharing(1), pruning_in_steps(STEPS_PER_EPOCH - 1)],
        [pruning(1), sharing(1)],
        [regrown(STEPS_PER_EPOCH - 1), sharing(1)],
    ],
)
def test_what_ends_just_before_sharing_begins_is_legal(fit, callbacks):
    task, _ = fit(*callbacks, epochs=2)
    weights = [parameter for name, parameter in task.model.named_parameters() if name in ("0.weight", "7.weight")]
    assert all(len(weight.unique()) <= 5 for weight in weights)
    assert all(bool((weight == 0).any()) for weight in weights)


def test_channels_go_before_masks_of_the_same_epoch(fit):
    late = WeightPruning(0.5, start_epoch=1, end_epoch=2)
    with pytest.raises(ValueError, match="at most 1, where WeightPruning .* and ChannelPruning before it"):
        fit(late, channels(1))
    fit(channels(1), late)


def test_a_schedule_of_steps_is_said_to_come_after_the_start_of_its_epoch(fit):
    with pytest.raises(ValueError, match="got end_step at a step after the start of epoch 1, and at_epochs"):
        fit(pruning_in_steps(8), sharing(1))


@pytest.mark.parametrize("late", [pruning(3), sharing(3), quantization(3, 4)])
def test_a_schedule_past_max_steps_is_refused_before_the_first_step(fit, late, task_class):
    task = task_class()
    with pytest.raises(ValueError, match=r"must .* max_steps=17 ends the fit within 3 epochs"):
        fit(late, task=task, max_steps=17, epochs=9, num_sanity_val_steps=0)
    assert task.trainer.global_step == 0


@pytest.mark.parametrize(
    "callbacks",
    [
        [WeightSharing(4, at_epochs=[1], include=["0", "7"]), WeightSharing(8, at_epochs=[2], include=["7"])],
        [WeightPruning(0.5, include=["0", "7"]), WeightPruning(0.9, include=["7"])],
    ],
)
def test_two_callbacks_of_one_technique_share_no_weight(fit, callbacks):
    with pytest.raises(ValueError, match="include must select a weight in one Weight.* alone, got '7.weight' in two"):
        fit(*callbacks)


def test_what_stochastic_averaging_puts_in_place_is_pruned_and_shared(fit):
    seen = []

    class Counts(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.current_epoch > 1:
                weight = pl_module.model[7].weight
                seen.append((float((weight == 0).float().mean()), len(weight.unique())))

    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=2)
    fit(WeightPruning(0.5, end_epoch=1), WeightSharing(4, at_epochs=[1]), averaging, Counts(), epochs=4)
    assert all(zeros > 0.3 and distinct <= 5 for zeros, distinct in seen), seen


def test_channels_and_quantization_need_no_sanity_check(fit):
    fit(channels(1), quantization(2, 3), num_sanity_val_steps=0)
    fit(quantization(2, 3), channels(1), num_sanity_val_steps=0, folder="other")
    fit(quantization(4, 5), channels(3), fast_dev_run=True, folder="trial")
