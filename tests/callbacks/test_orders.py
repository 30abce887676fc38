"""The table of legal orders in README.md, "Together": what undoes a technique is refused before any training."""

import pytest

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
