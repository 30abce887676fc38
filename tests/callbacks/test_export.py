import json
import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_edge import ExportArtifacts, QuantizationAwareTraining, WeightPruning, WeightSharing, load_artifact
from lightning_edge.artifact import inspect
from lightning_edge.callbacks import PostTrainingQuantization
from lightning_edge.callbacks import export as module
from lightning_edge.export.verification import ArtifactMismatchError


def test_each_file_computes_what_the_trained_module_computes(fit, tmp_path, digits_loaders):
    export = ExportArtifacts(tmp_path / "out", formats=["edge", "onnx"], name="net", recipe_hash="abc")
    task, _ = fit(WeightPruning(0.8, end_epoch=1), WeightSharing(6, at_epochs=[2]), export)
    images = next(iter(digits_loaders()[1]))[0]
    expected = task.eval()(images).detach().numpy()
    for suffix, tolerance in (("edge", 2e-2), ("onnx", 1e-4)):  # small tensors of the packed file are float16
        np.testing.assert_allclose(
            load_artifact(tmp_path / "out" / f"net.{suffix}")(images.numpy()), expected, atol=tolerance
        )
        assert (export.verifications[suffix].agreeing, export.verifications[suffix].rows) == (64, 64)
    found = inspect(tmp_path / "out" / "net.edge")
    assert found.recipe_hash == "abc"
    weights = {row.name: row for row in found.tensors if row.name.endswith("weight")}
    assert max(row.distinct for row in weights.values()) <= 7
    # What is not zero is all there, and dead units are not.
    assert sum(math.prod(row.shape) - row.zeros for row in weights.values()) <= 2664 - int(0.8 * 2664)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["net.edge", "net.onnx"]


@pytest.mark.parametrize("remove", [True, False])
def test_dead_units_are_not_in_the_files_but_stay_in_the_module(fit, tmp_path, remove):
    export = ExportArtifacts(tmp_path / "out", formats=["onnx"], remove_dead_units=remove)
    task, _ = fit(WeightPruning(0.97), export, epochs=2)
    assert task.model[3].out_channels == 16
    exported = sum(parameter.numel() for parameter in export.exported.parameters())
    if remove:
        assert export.dead_units.count > 0
        assert exported < 2706
        assert export.exported[3].out_channels == 16 - export.dead_units.removed["3"]
    else:
        assert export.dead_units is None
        assert exported == 2706
    assert export.verifications["onnx"].agreeing == 64


def test_a_quantized_network_is_exported_in_integers(fit, tmp_path):
    export = ExportArtifacts(tmp_path / "out", formats=["edge"], min_agreement=0.95)
    fit(QuantizationAwareTraining(1), export)
    kinds = [row.dtype for row in inspect(tmp_path / "out" / "model.edge").tensors if len(row.shape) > 1]
    assert set(kinds) == {"int8"}


def test_the_training_mode_of_the_network_is_put_back(fit, tmp_path):
    modes = []

    class Mode(Callback):
        def on_fit_end(self, trainer, pl_module):
            modes.append(pl_module.model.training)

    fit(Mode(), ExportArtifacts(tmp_path / "out", formats=["onnx"]), Mode(), epochs=1)
    assert modes[0] == modes[1]


def test_a_file_that_disagrees_is_kept_aside_and_named(fit, tmp_path, monkeypatch):
    load = module.load_artifact
    monkeypatch.setattr(module, "load_artifact", lambda path: lambda images: -load(path)(images))
    with pytest.raises(ArtifactMismatchError, match=r"model\.onnx must compute what the trained network computes"):
        fit(ExportArtifacts(tmp_path / "out", formats=["onnx"]), epochs=1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.rejected.onnx", "model.rejected.onnx.json"}
    report = json.loads((tmp_path / "out" / "model.rejected.onnx.json").read_text())
    assert report["rows"] == 64
    assert report["agreeing"] < 64
    assert "must compute what the trained network computes" in report["reason"]


def test_a_file_that_cannot_be_loaded_is_kept_aside_too(fit, tmp_path, monkeypatch):
    def refuses(path):
        raise ValueError(f"onnxruntime must be able to load {path}")

    monkeypatch.setattr(module, "load_artifact", refuses)
    with pytest.raises(ValueError, match="onnxruntime must be able to load"):
        fit(ExportArtifacts(tmp_path / "out", formats=["onnx"]), epochs=1)
    assert "able to load" in json.loads((tmp_path / "out" / "model.rejected.onnx.json").read_text())["reason"]


def test_a_drop_beyond_the_tolerance_is_refused_and_both_accuracies_are_kept(fit, tmp_path, monkeypatch):
    load = module.load_artifact
    monkeypatch.setattr(module, "load_artifact", lambda path: lambda images: np.roll(load(path)(images), 1, axis=1))
    with pytest.raises(ArtifactMismatchError, match=r"at most 0\.5 of the labels more wrong than the trained network"):
        fit(ExportArtifacts(tmp_path / "out", formats=["onnx"], min_agreement=0.0, tolerance=0.5))
    report = json.loads((tmp_path / "out" / "model.rejected.onnx.json").read_text())
    assert report["right_as_trained"] - report["right"] > 32


def test_an_integer_file_is_compared_with_the_converted_graph(fit, tmp_path):
    export = ExportArtifacts(tmp_path / "out", formats=["onnx"])
    fit(QuantizationAwareTraining(1, freeze_observers_epoch=2), export)
    assert export.verifications["onnx"].largest_difference == 0.0
    assert export.verifications["onnx"].right == export.verifications["onnx"].right_as_trained > 32


def test_a_run_resumed_from_its_finished_checkpoint_exports_the_same_bytes(fit, tmp_path):
    def make(name):
        pruning = WeightPruning(0.8, end_epoch=1)
        return (
            pruning,
            QuantizationAwareTraining(1),
            ExportArtifacts(tmp_path / name, formats=["edge"], min_agreement=0.9),
        )

    fit(*make("first"))
    fit(*make("second"), folder="resumed", ckpt_path=tmp_path / "fit" / "epoch=3.ckpt")
    first, second = ((tmp_path / name / "model.edge").read_bytes() for name in ("first", "second"))
    assert first == second


def test_what_the_packed_file_is_like_is_passed_on(fit, tmp_path, monkeypatch):
    told, write = [], module.export

    def watched(network, path, **options):
        told.append({name: options[name] for name in ("round_small", "adaptive")})
        return write(network, path, **options)

    monkeypatch.setattr(module, "export", watched)
    fit(ExportArtifacts(tmp_path / "out", formats=["onnx"], adaptive=False, round_small=False), epochs=1)
    assert told == [{"round_small": False, "adaptive": False}]


def test_a_trial_run_of_one_batch_exports_nothing(fit, tmp_path):
    fit(ExportArtifacts(tmp_path / "out"), fast_dev_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_no_validation_data_is_said_before_any_training(fit, tmp_path, digits_loaders):
    with pytest.raises(ValueError, match="fit must have validation data, on which ExportArtifacts checks the files"):
        fit(ExportArtifacts(tmp_path / "out"), loaders=digits_loaders()[:1])


def test_a_missing_executorch_is_said_before_any_training(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'formats must not hold "pte" without ExecuTorch: pip install'):
        fit(ExportArtifacts(tmp_path / "out", formats=["pte"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": ["tflite"]}, r"formats must be a list of some of \['edge', 'onnx', 'pte'\], got \['tflite'\]"),
        ({"formats": []}, "formats must be a list of some of"),
        ({"formats": "onnx"}, "formats must be a list of some of"),
        ({"min_agreement": 99}, r"min_agreement must lie in \[0, 1\]"),
        ({"tolerance": -0.1}, r"tolerance must lie in \[0, 1\], a fraction of the rows, got -0.1"),
    ],
)
def test_bad_arguments_fail_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExportArtifacts("out", **arguments)


class Pair(nn.Module):
    """Takes images in a dict, an optional mask, a flag by name alone; returns a dict."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, batch, scale=None, mask=None, *, centred=False):
        x = batch["image"].flatten(1) - 0.5 * centred
        x = x if mask is None else x * mask
        return {"logits": self.fc(x if scale is None else x * scale), "energy": x.square().mean(1)}


def pair_task(task_class):
    class Task(task_class):
        def __init__(self):
            super().__init__()
            self.model = Pair()

        def forward(self, images):
            mask = torch.linspace(0, 1, 64).expand(len(images), 64)
            return self.model({"image": images, "unread": images}, mask=mask, centred=True)["logits"]

    return Task()


@pytest.mark.parametrize("technique", [None, QuantizationAwareTraining, PostTrainingQuantization])
@pytest.mark.parametrize("sanity", [0, 2])
def test_files_get_what_the_network_was_called_with_by_name_and_nested(fit, tmp_path, task_class, technique, sanity):
    if technique is QuantizationAwareTraining:
        callbacks = [QuantizationAwareTraining(0, freeze_observers_epoch=1)]
    else:
        callbacks = [] if technique is None else [technique()]
    export = ExportArtifacts(tmp_path / "out", formats=["onnx"])
    fit(*callbacks, export, task=pair_task(task_class), epochs=2, num_sanity_val_steps=sanity)
    session = load_artifact(tmp_path / "out" / "model.onnx")
    assert [item.name for item in session.inputs] == ["batch_image", "batch_unread", "mask"]
    assert session.outputs == ("logits", "energy")
    assert export.verifications["onnx"].agreement == 1.0
    images, mask = np.random.default_rng(0).random((3, 1, 8, 8), np.float32), np.ones((3, 64), np.float32)
    by_name = session(images, batch_unread=images, mask=mask)
    assert all(np.array_equal(*both) for both in zip(by_name, session(images, images, mask), strict=True))


def test_a_step_that_does_not_call_the_network_is_told_so(fit, tmp_path, task_class):
    class Around(task_class):
        def forward(self, x):
            for layer in self.model:
                x = layer(x)
            return x

    with pytest.raises(ValueError, match="validation_step of Around must call the network, a Sequential, got no call"):
        fit(ExportArtifacts(tmp_path / "out", formats=["onnx"]), task=Around(), epochs=1)


@pytest.mark.parametrize("callback", [PostTrainingQuantization, lambda: ExportArtifacts("out")])
def test_children_without_a_forward_are_named_before_any_training(fit, callback):
    class Parts(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(64, 8), nn.Linear(8, 10)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.head(self.encoder(batch[0].flatten(1))), batch[1])

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(ValueError, match=r"network must have a forward, got Parts.*one of \['encoder', 'head'\]"):
        fit(callback(), task=Parts())
