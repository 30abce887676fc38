"""Every legal combination of the techniques with a teacher, in one fit."""

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

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
from lightning_edge.artifact import inspect, read_tensors
from lightning_edge.surgery.quantization import CapturedNetwork, convert
from lightning_edge.surgery.selection import find_network
from lightning_edge.surgery.widths import WIDTHS_KEY

EPOCHS = 5
TECHNIQUES = {
    "channels": lambda: ChannelPruning(sparsity=0.5, start_epoch=0, end_epoch=1, remove_epoch=1, round_to=4),
    "pruning": lambda: WeightPruning(sparsity=0.5, start_epoch=1, end_epoch=2),
    "sharing": lambda: WeightSharing(clusters=8, at_epochs=[3]),
    "quantization": lambda: QuantizationAwareTraining(start_epoch=3, freeze_observers_epoch=4),
}
COMBINATIONS = list(chain.from_iterable(combinations(TECHNIQUES, count) for count in range(5)))
LAYERS = ("0.weight", "3.weight", "7.weight")
PRUNED_FROM, SHARED_FROM = 2, 3  # the epochs from whose start the targets hold


def broken_promises(names, weights, epoch):
    """Return what the weights of the three layers do not keep at a forward of this epoch."""
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    most = 8 + ("pruning" in names)
    broken = {
        "width": len(weights[1]) != (8 if "channels" in names and epoch >= 1 else 16),
        "zeros": "pruning" in names and epoch >= PRUNED_FROM and zeros != round(0.5 * total),
        "values": "sharing" in names and epoch >= SHARED_FROM and max(len(w.unique()) for w in weights) > most,
    }
    return [name for name, is_broken in broken.items() if is_broken]


class Promises(Callback):
    """Looks at the weights in front of every forward, in training and in validation, and after every step."""

    def __init__(self, names):
        self.names, self.seen, self.broken, self.quantized = names, 0, [], set()

    def look(self, trainer, pl_module, *_):
        network, epoch = find_network(pl_module), trainer.current_epoch
        broken = broken_promises(self.names, [network.get_parameter(name) for name in LAYERS], epoch)
        self.broken += [(epoch, trainer.global_step, name) for name in broken]
        self.seen += 1
        if isinstance(vars(network).get("forward"), CapturedNetwork):
            self.quantized.add(epoch)

    on_train_batch_start = on_train_batch_end = on_validation_batch_start = look


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
        promises = Promises(names)
        callbacks = [*(TECHNIQUES[name]() for name in names), promises, exported]
        module, _ = fit(*callbacks, folder=folder, task=student(), epochs=EPOCHS, **options)
        return module, (tmp_path / folder / "out" / "model.edge"), promises

    return run


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_combination_with_a_teacher_keeps_every_promise(fit_all, task_class, digits_loaders, tmp_path, names):
    module, file, promises = fit_all("run", names)
    assert promises.broken == []
    assert promises.seen == EPOCHS * (2 * 8 + 1) + 1  # training, validation, and the sanity check
    assert promises.quantized == ({3, 4} if "quantization" in names else set())

    for epoch in range(EPOCHS):
        checkpoint = torch.load(tmp_path / "run" / f"epoch={epoch}.ckpt", weights_only=True)
        state = checkpoint["state_dict"]
        assert all(name.startswith("student.") for name in state)
        assert broken_promises(names, [state[f"student.model.{name}"] for name in LAYERS], epoch) == []
        plain = task_class().model
        slim_channels_(plain, manifest=checkpoint.get(WIDTHS_KEY, {}))
        plain.load_state_dict({name.removeprefix("student.model."): value for name, value in state.items()})
    plain.load_state_dict(module.student_state_dict(), strict=True)

    kinds = {tensor.dtype for tensor in inspect(file).tensors if tensor.name.endswith(("weight", "weight_quantized"))}
    images, _ = next(iter(digits_loaders()[1]))
    network = find_network(module).eval()
    with torch.no_grad():
        expected = network(images)
    found = torch.from_numpy(load_artifact(file)(images.numpy()))
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)
    assert kinds == ({"int8"} if "quantization" in names else {"float32"})


@pytest.mark.parametrize("names", [names for names in COMBINATIONS if len(names) == 2], ids="+".join)
def test_every_pair_resumed_gives_the_same_bytes(fit_all, tmp_path, names):
    _, whole, _ = fit_all("whole", names)
    _, resumed, _ = fit_all("resumed", names, ckpt_path=tmp_path / "whole" / "epoch=2.ckpt")
    assert resumed.read_bytes() == whole.read_bytes()


def test_the_whole_chain_resumed_after_any_epoch_gives_the_same_bytes(fit_all, tmp_path):
    _, whole, _ = fit_all("whole", TECHNIQUES)
    for epoch in range(EPOCHS - 1):
        _, resumed, _ = fit_all(f"resumed_{epoch}", TECHNIQUES, ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert resumed.read_bytes() == whole.read_bytes()


def test_a_quantized_student_learns_from_its_inner_layers_alone(fit, task_class):
    torch.manual_seed(3)
    terms = {"hint": DistillationTerm("hint", layers={"3": "3"})}
    module = DistillationModule(task_class(), task_class(), terms, task_weight=0.0)
    before = module.student.model[0].weight.detach().clone()
    _, trainer = fit(QuantizationAwareTraining(start_epoch=0), task=module, epochs=1)
    assert float(trainer.callback_metrics["distillation/hint"]) > 0
    assert not torch.equal(module.student.model[0].weight, before)


class Rows(nn.Module):
    """A transformer over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        return self.head(self.encoder(self.embed(images.squeeze(1))).mean(1))


def test_the_whole_chain_compresses_a_transformer_in_all_its_projections(fit, task_class, digits_loaders, tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        student, teacher = task_class(), task_class()
        student.model = Rows()
        exported = ExportArtifacts(tmp_path / folder / "out", formats=["edge"], min_agreement=0.8)
        callbacks = [*(build() for build in TECHNIQUES.values()), exported]
        module, _ = fit(*callbacks, folder=folder, task=DistillationModule(student, teacher), epochs=EPOCHS, **options)
        return module, tmp_path / folder / "out" / "model.edge"

    module, file = run("whole")
    _, resumed = run("resumed", ckpt_path=tmp_path / "whole" / "epoch=3.ckpt")
    assert resumed.read_bytes() == file.read_bytes()
    network = find_network(module).eval()
    weights = [weight for name, weight in network.named_parameters() if name.endswith("weight") and weight.ndim == 2]
    assert len(weights) == 6
    assert len(network.encoder.self_attn.in_proj_weight) < 48  # heads went
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.5 * sum(weight.numel() for weight in weights))
    assert all(len(weight.unique()) <= 9 for weight in weights)
    images, _ = next(iter(digits_loaders()[1]))
    with torch.no_grad():
        expected = convert(network)(images)
    assert torch.equal(torch.from_numpy(load_artifact(file)(images.numpy())), expected)


class Shades(nn.Module):
    """A transformer whose tokens are the shades of an image's pixels."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        return self.head(self.encoder(self.embed((16 * images).long().flatten(1))).mean(1))


def test_an_embedding_is_shared_beside_quantized_layers_and_resumed_to_the_same_bytes(fit, task_class, tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        task = task_class()
        task.model = Shades()
        exported = ExportArtifacts(tmp_path / folder / "out", formats=["edge"], min_agreement=0.8)
        callbacks = [TECHNIQUES["sharing"](), TECHNIQUES["quantization"](), exported]
        module, _ = fit(*callbacks, folder=folder, task=task, epochs=EPOCHS, **options)
        return module, tmp_path / folder / "out" / "model.edge"

    module, file = run("whole")
    _, resumed = run("resumed", ckpt_path=tmp_path / "whole" / "epoch=3.ckpt")
    assert resumed.read_bytes() == file.read_bytes()
    table = find_network(module).embed.weight
    assert len(table.unique()) <= 8
    assert len(np.unique(read_tensors(file)["embed.weight"])) == len(table.unique())
