"""Milestones, few bits, learned steps, and what the trainer may do meanwhile."""

from typing import ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

from lightning_edge import QuantizationAwareTraining, WeightPruning, load_artifact
from lightning_edge.callbacks.quantization import _schedule
from lightning_edge.export import export
from lightning_edge.surgery.quantization import CapturedNetwork, capture_, convert


def captured(task):
    return vars(task.model).get("forward")


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def weights_of(network):
    """The integers of each layer of the converted network."""
    graph = convert(network)
    return {name: value for name, value in graph.named_buffers() if name.endswith("int8")}


class Watch(Callback):
    """What each epoch trains with."""

    def __init__(self):
        self.rounding, self.clips, self.means = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        network = captured(pl_module)
        self.rounding.append(None if network is None else network.rounding)
        self.means.append(pl_module.model[1].running_mean.clone())
        if network is not None:
            state = network.observer_state()
            self.clips.append({name: value for name, value in state.items() if name.endswith("log_clip")})


def test_observers_watch_the_float_network_until_numbers_are_rounded(fit):
    class Ranges(Callback):
        """Whether a forward in training rounds the activations of the last layer."""

        def __init__(self):
            self.levels = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if captured(pl_module) is not None and batch_idx == 7:
                self.levels.append(len(torch.unique(pl_module(batch[0]))))

    watch, ranges = Watch(), Ranges()
    task, _ = fit(QuantizationAwareTraining(1, quantize_epoch=2, freeze_observers_epoch=3), watch, ranges)
    assert watch.rounding == [None, False, True, True]
    assert ranges.levels[0] > 256 >= max(ranges.levels[1:])
    assert captured(task).observers_frozen


def test_batch_norms_keep_their_statistics_from_their_epoch(fit):
    watch = Watch()
    task, _ = fit(QuantizationAwareTraining(0, freeze_batch_norm_epoch=2), watch)
    assert not torch.equal(watch.means[0], watch.means[1])
    assert torch.equal(watch.means[1], watch.means[2])
    assert torch.equal(watch.means[2], watch.means[3])
    assert int(task.model[1].num_batches_tracked) == 16


@pytest.mark.parametrize("weight_bits", [4, {"7": 8, "*": 4}])
def test_four_bits_are_fifteen_integers_in_the_file(fit, weight_bits, tmp_path, digits_loaders):
    task, _ = fit(QuantizationAwareTraining(1, freeze_observers_epoch=3, weight_bits=weight_bits))
    integers = weights_of(task.model)
    fine = isinstance(weight_bits, dict)
    assert [int(value.abs().max()) for value in integers.values()] == [7, 7, 127 if fine else 7]
    images = next(iter(digits_loaders()[1]))[0]
    expected = convert(task.model)(images).detach().numpy()
    for suffix in ("onnx", "pte", "edge"):
        path = tmp_path / f"model.{suffix}"
        export(task.model, path, example_inputs=(images[:2],))
        found = load_artifact(path)(images.numpy())
        assert abs(found - expected).max() < 1e-5


def test_a_clipped_range_has_the_smallest_squared_error():
    torch.manual_seed(0)
    layer = nn.Linear(256, 3)
    nn.init.normal_(layer.weight)  # few weights are far out: seven steps to them would leave little for the rest
    quantizer = capture_(layer, (torch.zeros(2, 256),), weight_bits=4).observers["weight"]
    weight = layer.weight.detach()

    def error(step):
        return ((weight[0] / step).round().clamp(-7, 7) * step - weight[0]).square().sum()

    steps = quantizer.steps_of(weight)
    assert steps[0] < weight[0].abs().max() / 7
    assert all(error(steps[0]) <= error(weight[0].abs().max() / 7 * c) + 1e-6 for c in torch.linspace(0.3, 1.0, 71))


def test_learned_steps_have_the_gradient_of_the_paper():
    torch.manual_seed(0)
    layer = nn.Linear(8, 2, bias=False)
    quantizer = capture_(layer, (torch.zeros(2, 8),), weight_bits=4, learned_steps=True).observers["weight"]
    layer(torch.zeros(2, 8))
    weight = layer.weight.detach()
    step = quantizer.steps_of(weight)[:, None]
    incoming = torch.randn(2, 8)
    (quantizer(layer.weight) * incoming).sum().backward()
    scaled = weight / step
    inside = torch.where(scaled.round().abs() <= 7, scaled.round() - scaled, 7 * scaled.sign())  # equation 3
    factor = 1 / (8 * 7) ** 0.5  # section 2.2, for each channel
    expected = (incoming * inside).sum(1) * step[:, 0] * factor  # in the log domain: d step / d log_clip = step
    torch.testing.assert_close(quantizer.log_clip.grad, expected)


def test_steps_are_learned_until_observers_freeze_and_only_when_asked(fit):
    learned, fixed = Watch(), Watch()
    fit(QuantizationAwareTraining(0, freeze_observers_epoch=2, weight_bits=4, learned_steps=True), learned)
    fit(QuantizationAwareTraining(0, freeze_observers_epoch=2, weight_bits=4), fixed)
    assert all(not torch.equal(a, b) for a, b in zip(learned.clips[0].values(), learned.clips[1].values(), strict=True))
    assert same(learned.clips[2], learned.clips[3])
    assert same(fixed.clips[0], fixed.clips[3])


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_every_milestone_resumes_exactly(fit, tmp_path, epoch):
    def make():
        return QuantizationAwareTraining(
            1,
            quantize_epoch=2,
            freeze_observers_epoch=4,
            freeze_batch_norm_epoch=3,
            weight_bits={"7": 8, "*": 4},
            learned_steps=True,
        )

    whole, _ = fit(make(), epochs=5)
    resumed, _ = fit(make(), epochs=5, folder="resumed", ckpt_path=tmp_path / "fit" / f"epoch={epoch}.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(captured(whole).observer_state(), captured(resumed).observer_state())
    assert same(weights_of(whole.model), weights_of(resumed.model))


@pytest.mark.parametrize(
    ("groups", "factor"),
    [
        ([{"lr": 0.05, "initial_lr": 0.1}], 0.5),
        ([{"lr": 1.0, "initial_lr": 0.04}], 1.0),  # one that begins low, as OneCycleLR does
        ([{"lr": 0.0}, {"lr": 0.1, "initial_lr": 0.4}], 0.25),  # a group that stands still
        ([{"lr": 0.0}], 1.0),
    ],
)
def test_steps_follow_the_schedule_down_and_never_up(groups, factor):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], **group} for group in groups])
    assert _schedule(optimizer) == factor


def test_accumulated_gradients_step_the_steps_with_the_weights(fit):
    class Steps(Callback):
        def __init__(self):
            self.moved = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = captured(pl_module).observer_state()["7.weight.log_clip"]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            after = captured(pl_module).observer_state()["7.weight.log_clip"]
            self.moved.append(not torch.equal(self.before, after))

    steps = Steps()
    fit(QuantizationAwareTraining(0, learned_steps=True), steps, epochs=1, accumulate_grad_batches=4)
    assert steps.moved == 2 * [False, False, False, True]


def test_an_optimizer_of_a_later_fit_steps_no_steps(fit, task_class):
    class Kept(task_class):
        def configure_optimizers(self):
            self.kept = getattr(self, "kept", None) or super().configure_optimizers()
            return self.kept

    task, _ = fit(QuantizationAwareTraining(0, learned_steps=True), task=Kept(), epochs=1)
    assert not task.kept._optimizer_step_post_hooks


def test_evaluation_under_autocast_is_that_of_float32(fit, tmp_path, digits_loaders):
    class Outputs(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            self.images, self.outputs = batch[0], pl_module(batch[0])

    watch = Outputs()
    task, _ = fit(QuantizationAwareTraining(1, freeze_observers_epoch=3), watch, precision="bf16-mixed")
    assert torch.equal(watch.outputs, task.eval().model(watch.images))
    export(task.model, tmp_path / "model.onnx", example_inputs=(watch.images[:2],))
    found = torch.from_numpy(load_artifact(tmp_path / "model.onnx")(watch.images.numpy()))
    assert bool((found.argmax(1) == watch.outputs.argmax(1)).all())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_that_are_not_in_float32_are_refused_at_setup(fit, precision):
    with pytest.raises(ValueError, match=rf"precision must keep weights in float32.*'{precision}': take '32-true'"):
        fit(QuantizationAwareTraining(1), precision=precision)


def test_averaged_weights_are_rounded_in_their_own_ranges(fit):
    """The average lies inside of the ranges of the weights that it is an average of."""
    task, _ = fit(QuantizationAwareTraining(1), EMAWeightAveraging(decay=0.95))
    integers = weights_of(task.model)["7.weight_int8"]
    assert integers.abs().amax(1).tolist() == [127] * 10


def test_layers_to_keep_stay_in_float(fit):
    task, _ = fit(QuantizationAwareTraining(1, keep=["7"]))
    assert "7.weight" not in captured(task).observers
    with pytest.raises(
        ValueError, match="keep must match a linear or convolution layer, got 'head'|exclude must match"
    ):
        fit(QuantizationAwareTraining(1, keep=["head"]))


def test_the_first_ranges_can_come_from_a_calibration(fit):
    class First(Callback):
        def __init__(self):
            self.ranges = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.ranges.append(captured(pl_module).observer_state()["linear.max_val"].clone())

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.ranges.append(captured(pl_module).observer_state()["linear.max_val"].clone())

    calibrated, plain = First(), First()
    fit(QuantizationAwareTraining(0, calibration_batches=4), calibrated, epochs=1)
    fit(QuantizationAwareTraining(0), plain, epochs=1, folder="plain")
    assert torch.isinf(plain.ranges[0])
    assert torch.isfinite(calibrated.ranges[0])
    seen = plain.ranges[1]  # of the same first batch
    torch.testing.assert_close(calibrated.ranges[1], torch.lerp(calibrated.ranges[0], seen, 0.01), rtol=0.1, atol=0.1)


def test_the_ranges_of_a_calibration_can_stay(fit, tmp_path, digits_loaders):
    class Ranges(Callback):
        seen: ClassVar = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(captured(pl_module).observer_state()["linear.max_val"].clone())

    task, _ = fit(QuantizationAwareTraining(0, calibration_batches=4, freeze_observers_epoch=0), Ranges(), epochs=1)
    assert torch.isfinite(Ranges.seen[0])
    assert same(dict(enumerate(Ranges.seen)), dict.fromkeys(range(len(Ranges.seen)), Ranges.seen[0]))
    images = digits_loaders()[1].dataset.tensors[0]
    export(task.model, tmp_path / "model.onnx", example_inputs=(images[:2],))
    with torch.no_grad():
        expected = convert(task.model)(images)
    found = torch.from_numpy(load_artifact(tmp_path / "model.onnx")(images.numpy()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # no integer differs


@pytest.mark.parametrize("several", [list, lambda loaders: dict(zip("ab", loaders, strict=True))], ids=["list", "dict"])
def test_a_calibration_takes_several_loaders_as_the_fit_does(fit, task_class, digits_loaders, several):
    class Pairs(task_class):
        def training_step(self, batch, batch_idx):
            first, second = batch.values() if isinstance(batch, dict) else batch
            return super().training_step([torch.cat(both) for both in zip(first, second, strict=True)], batch_idx)

    train, validation = digits_loaders()
    callback = QuantizationAwareTraining(0, calibration_batches=2)
    task, _ = fit(callback, task=Pairs(), loaders=(several([train, train]), validation), epochs=1)
    assert torch.isfinite(captured(task).observer_state()["linear.max_val"])


@pytest.mark.parametrize("combined", [False, True])
def test_a_calibration_leaves_the_epoch_as_it_is(fit, digits_loaders, combined):
    class Seen(Callback):
        def __init__(self):
            self.batches = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batches.append((batch_idx, batch[0].sum().item()))

    seen = {0: Seen(), 2: Seen(), 20: Seen()}
    for batches, watch in seen.items():
        train, validation = digits_loaders()
        kept = DataLoader(train.dataset, 32, shuffle=True, num_workers=1, persistent_workers=True)
        loaders = (CombinedLoader(train, "min_size") if combined else kept, validation)
        callback = QuantizationAwareTraining(1, calibration_batches=batches)
        fit(callback, watch, loaders=loaders, epochs=2, folder=f"{combined}{batches}")
    assert len(seen[0].batches) == 16
    assert seen[0].batches == seen[2].batches == seen[20].batches


def test_steps_are_learned_beside_averaged_weights(fit, tmp_path, digits_loaders):
    """The average of the weights is rounded with the steps as they are at the end, in the file too."""
    options = {"weight_bits": 4, "learned_steps": True, "freeze_observers_epoch": 3}
    task, _ = fit(QuantizationAwareTraining(1, **options), EMAWeightAveraging(decay=0.95))
    state = captured(task).observer_state()
    assert any(bool(state[name].any()) for name in state if name.endswith("log_clip"))
    assert 5 <= weights_of(task.model)["7.weight_int8"].abs().max() <= 7
    images = digits_loaders()[1].dataset.tensors[0]
    export(task.model, tmp_path / "model.onnx", example_inputs=(images[:2],))
    found = torch.from_numpy(load_artifact(tmp_path / "model.onnx")(images.numpy()))
    with torch.no_grad():
        expected = task.eval().model(images)
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_a_second_fit_begins_with_the_plain_network_and_live_observers(fit):
    watch = Watch()
    task, _ = fit(QuantizationAwareTraining(0, freeze_observers_epoch=1), epochs=2)
    fit(QuantizationAwareTraining(1), watch, task=task, epochs=2, folder="second")
    assert watch.rounding == [None, True]
    assert isinstance(captured(task), CapturedNetwork)
    assert not captured(task).observers_frozen
    fit(QuantizationAwareTraining(0), task=task, epochs=1, folder="third")
    assert not captured(task).observers_frozen


def test_zeros_stay_zeros_in_four_bits(fit):
    task, _ = fit(WeightPruning(0.8, end_epoch=1), QuantizationAwareTraining(2, weight_bits=4, learned_steps=True))
    for layer, integers in zip((0, 3, 7), weights_of(task.model).values(), strict=True):
        assert bool((integers[task.model[layer].weight == 0] == 0).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_batches": -1}, "calibration_batches must be a whole number >= 0, got -1"),
        ({"calibration_batches": 2.5}, "calibration_batches must be a whole number >= 0, got 2.5"),
        ({"quantize_epoch": 1}, "quantize_epoch must be at least start_epoch=2, got 1"),
        ({"freeze_batch_norm_epoch": 1}, "freeze_batch_norm_epoch must be at least start_epoch=2, got 1"),
    ],
)
def test_milestones_before_the_start_fail_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(2, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize_epoch": 4}, "quantize_epoch must be below max_epochs=4"),
        ({"freeze_batch_norm_epoch": 4}, "freeze_batch_norm_epoch must be below max_epochs=4"),
        ({"weight_bits": 3}, r"weight_bits must be one of \(8, 4\), got 3"),
        ({"weight_bits": {"head": 4}}, "weight_bits must match a linear or convolution layer, got 'head'"),
    ],
)
def test_what_does_not_fit_the_fit_fails_at_setup(fit, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(QuantizationAwareTraining(2, **arguments))
