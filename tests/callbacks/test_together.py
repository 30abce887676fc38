"""Every legal combination of the techniques with a teacher, in one fit."""

from itertools import chain, combinations

import pytest
import torch

from lightning_edge import (
    ChannelPruning,
    DistillationModule,
    DistillationTerm,
    ExportArtifacts,
    QuantizationAwareTraining,
    WeightPruning,
    WeightSharing,
    load_artifact,
    slim_channels_,
)
from lightning_edge.surgery.widths import WIDTHS_KEY

EPOCHS = 5
TECHNIQUES = {
    "channels": lambda: ChannelPruning(sparsity=0.5, start_epoch=0, end_epoch=1, remove_epoch=1, round_to=4),
    "pruning": lambda: WeightPruning(sparsity=0.5, start_epoch=1, end_epoch=2),
    "sharing": lambda: WeightSharing(clusters=8, at_epochs=[3]),
    "quantization": lambda: QuantizationAwareTraining(start_epoch=3, freeze_observers_epoch=4),
}
COMBINATIONS = list(chain.from_iterable(combinations(TECHNIQUES, count) for count in range(5)))


@pytest.fixture
def student(task_class):
    """Build a student with its teacher."""

    def build():
        torch.manual_seed(3)
        teacher = task_class()
        torch.manual_seed(0)
        terms = {
            "soft": DistillationTerm(weight=0.5, temperature=2.0),
            # Relations between examples are of one size, whatever channels are cut out; so are the logits.
            "relations": DistillationTerm("relational", weight=0.1, layers={"3": "3"}),
            "hint": DistillationTerm("hint", weight=0.1, layers={"7": "7"}),
        }
        return DistillationModule(task_class(), teacher, terms)

    return build


@pytest.fixture
def fit_all(fit, student, tmp_path):
    """Fit with some of the techniques, and export at the end."""

    def run(folder, names, **options):
        exported = ExportArtifacts(tmp_path / folder / "out", formats=["edge"], min_agreement=0.8)
        callbacks = [*(TECHNIQUES[name]() for name in names), exported]
        module, _ = fit(*callbacks, folder=folder, task=student(), epochs=EPOCHS, **options)
        return module, (tmp_path / folder / "out" / "model.edge")

    return run


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_combination_with_a_teacher_keeps_every_promise(fit_all, task_class, tmp_path, names):
    module, file = fit_all("run", names)
    weights = {name: value for name, value in module.student_state_dict().items() if name.endswith("weight")}
    layers = [weights[name] for name in ("0.weight", "3.weight", "7.weight")]

    checkpoint = torch.load(tmp_path / "run" / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)
    assert all(name.startswith("student.") for name in checkpoint["state_dict"])
    plain = task_class().model
    slim_channels_(plain, manifest=checkpoint.get(WIDTHS_KEY, {}))
    plain.load_state_dict(module.student_state_dict(), strict=True)
    assert len(layers[1]) == (8 if "channels" in names else 16)  # the first and the last layer are protected

    zeros = sum(int((layer == 0).sum()) for layer in layers)
    total = sum(layer.numel() for layer in layers)
    assert zeros == (round(0.5 * total) if "pruning" in names else 0)
    most = 8 + ("pruning" in names) if "sharing" in names else total
    assert max(len(layer.unique()) for layer in layers) <= most

    session = load_artifact(file)
    assert session(torch.zeros(2, 1, 8, 8).numpy()).shape == (2, 10)


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_the_whole_chain_resumed_gives_the_same_bytes(fit_all, tmp_path, epoch):
    _, whole = fit_all("whole", TECHNIQUES)
    _, resumed = fit_all("resumed", TECHNIQUES, ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_quantized_student_learns_from_its_inner_layers_alone(fit, task_class):
    torch.manual_seed(3)
    terms = {"hint": DistillationTerm("hint", layers={"3": "3"})}
    module = DistillationModule(task_class(), task_class(), terms, task_weight=0.0)
    before = module.student.model[0].weight.detach().clone()
    _, trainer = fit(QuantizationAwareTraining(start_epoch=0), task=module, epochs=1)
    assert float(trainer.callback_metrics["distillation/hint"]) > 0
    assert not torch.equal(module.student.model[0].weight, before)
