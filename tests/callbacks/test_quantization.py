import copy
import hashlib
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

from lightning_edge import (
    ExactResume,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    WeightPruning,
    WeightSharing,
)
from lightning_edge.surgery.quantization import CapturedNetwork, capture_, convert

WEIGHTS = ("model.0.weight", "model.3.weight", "model.7.weight")


def captured(task):
    return vars(task.model).get("forward")


def all_state(task):
    """Everything that a forward could move: weights, statistics, counters, ranges."""
    tensors = [*task.state_dict().values()]
    if captured(task) is not None:
        tensors += captured(task).observer_state().values()
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


class Epochs(Callback):
    def __init__(self):
        self.quantized, self.ranges, self.changed = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.quantized.append((trainer.current_epoch, captured(pl_module) is not None))

    def on_validation_start(self, trainer, pl_module):
        self.before = all_state(pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.changed.append(self.before != all_state(pl_module))

    def on_train_epoch_end(self, trainer, pl_module):
        if captured(pl_module) is not None:
            self.ranges.append(captured(pl_module).observer_state())


def test_the_network_is_plain_before_start_epoch_and_quantized_from_it(fit):
    watch = Epochs()
    fit(QuantizationAwareTraining(2), watch)
    assert {epoch for epoch, quantized in watch.quantized if quantized} == {2, 3}
    assert {epoch for epoch, quantized in watch.quantized if not quantized} == {0, 1}


def test_validation_and_the_sanity_check_change_no_state(fit):
    watch = Epochs()
    fit(QuantizationAwareTraining(1), watch)
    assert watch.changed == [False] * 5


def test_it_trains_in_training_mode_after_a_validation(fit):
    """Lightning restores the flags after a validation without calling train()."""
    tracked = []

    class Counter(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            tracked.append(int(pl_module.model[1].num_batches_tracked))

    fit(QuantizationAwareTraining(0), Counter(), val_check_interval=0.5)
    assert tracked == [8, 16, 24, 32]


def test_observers_are_frozen_from_their_epoch(fit):
    watch = Epochs()
    fit(QuantizationAwareTraining(0, freeze_observers_epoch=2), watch)
    assert not same(watch.ranges[0], watch.ranges[1])
    ends = [{name: end for name, end in watch.ranges[epoch].items() if name.endswith("_val")} for epoch in (1, 2)]
    assert same(*ends)  # scales are then moved to their nearest exact ones
    assert same(watch.ranges[2], watch.ranges[3])


def test_quantization_from_the_first_batch_without_a_sanity_check(fit):
    task, _ = fit(QuantizationAwareTraining(0), num_sanity_val_steps=0, epochs=1)
    assert captured(task).calibrated


def test_the_users_batch_norm_and_dropout_are_kept(fit, task_class):
    class Odd(task_class):
        def __init__(self):
            super().__init__()
            self.model[1] = nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)
            self.model[6] = nn.Dropout(0.1)

    task, _ = fit(QuantizationAwareTraining(1), task=Odd())
    nodes = captured(task).graph_module.graph.nodes
    literals = {str(node.target): node.args for node in nodes if node.op == "call_function"}
    assert literals["aten.batch_norm.default"][6:8] == (0.01, 1e-3)
    assert literals["aten.dropout.default"][1] == 0.1


def test_the_checkpoint_is_that_of_the_plain_network(fit, tmp_path, task_class):
    task, _ = fit(QuantizationAwareTraining(1))
    saved = torch.load(tmp_path / "fit" / "epoch=3.ckpt", weights_only=True)["state_dict"]
    plain = task_class()
    plain.load_state_dict(saved, strict=True)
    assert list(saved) == list(task_class().state_dict())
    assert same(plain.state_dict(), task.state_dict())


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resumed_equals_uninterrupted(fit, tmp_path, epoch):
    def make():
        return QuantizationAwareTraining(1, freeze_observers_epoch=2)

    whole, _ = fit(make())
    resumed, _ = fit(make(), folder="resumed", ckpt_path=tmp_path / "fit" / f"epoch={epoch}.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(captured(whole).observer_state(), captured(resumed).observer_state())


def test_a_test_from_a_checkpoint_is_quantized_as_at_its_end(fit, tmp_path, task_class, digits_loaders):
    class Tested(task_class):
        def test_step(self, batch, _):
            self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    _, trainer = fit(QuantizationAwareTraining(1), task=Tested())
    loader = digits_loaders()[1]
    at_the_end = trainer.test(dataloaders=loader, verbose=False, ckpt_path=None, model=trainer.lightning_module)
    _, other = fit(QuantizationAwareTraining(1), task=Tested(), folder="other", seed=9)
    fresh = Tested()
    again = other.test(fresh, loader, ckpt_path=tmp_path / "fit" / "epoch=3.ckpt", verbose=False)
    assert again == at_the_end


@pytest.mark.parametrize("make", [lambda: QuantizationAwareTraining(2), lambda: PostTrainingQuantization(batches=2)])
def test_a_checkpoint_from_before_the_start_is_tested_in_float(make, fit, tmp_path, task_class, digits_loaders):
    class Tested(task_class):
        def test_step(self, batch, _):
            self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    task, trainer = fit(make(), task=Tested())
    assert isinstance(captured(task), CapturedNetwork)
    loader, early = digits_loaders()[1], tmp_path / "fit" / "epoch=1.ckpt"
    found = trainer.test(task, loader, ckpt_path=early, verbose=False)
    assert captured(task) is None
    plain = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", callbacks=[ExactResume()])
    assert found == plain.test(Tested(), loader, ckpt_path=early, verbose=False)


def test_hyperparameters_that_hold_the_network_are_saved(fit, task_class, tmp_path):
    class Holding(task_class):
        def __init__(self, network=None):
            super().__init__()
            with warnings.catch_warnings(action="ignore"):  # Lightning's: the network is saved twice
                self.save_hyperparameters({"network": self.model})

    with pytest.warns(UserWarning, match="holds its plain forward"):
        fit(QuantizationAwareTraining(1), task=Holding())
    saved = torch.load(tmp_path / "fit" / "epoch=3.ckpt", weights_only=False)
    assert not isinstance(vars(saved["hyper_parameters"]["network"])["forward"], CapturedNetwork)


def test_inputs_of_other_sizes_are_named(task_class):
    task = task_class().eval()
    images = torch.rand(4, 1, 8, 8)
    capture_(task.model, (images,))
    with pytest.raises(ValueError, match=r"must have the sizes, beside that of the batch, .* got \[\(4, 1, 9, 8\)\]"):
        task(torch.rand(4, 1, 9, 8))


def test_an_averaged_network_trains_and_keeps_its_zeros(fit):
    task, _ = fit(WeightPruning(0.8, end_epoch=1), QuantizationAwareTraining(1), EMAWeightAveraging(decay=0.9))
    assert sum(int((task.state_dict()[name] == 0).sum()) for name in WEIGHTS) == int(0.8 * 2664)
    assert captured(task) is not None


def test_a_copy_of_the_module_runs_its_own_graph(fit):
    task, _ = fit(QuantizationAwareTraining(1))
    images = torch.rand(4, 1, 8, 8)
    task.eval()
    twin = copy.deepcopy(task)
    expected = task(images)
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        twin.model[7].weight.zero_()
    assert torch.equal(task(images), expected)
    assert not torch.equal(twin(images), expected)


def test_all_techniques_in_one_fit_keep_zeros_and_shared_values(fit):
    """Zeros stay zeros, a layer keeps k values, and its integers are at most k per output channel."""
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = pl_module.state_dict()
            zeros = sum(int((state[name] == 0).sum()) for name in WEIGHTS)
            seen.append((trainer.current_epoch, zeros, max(len(state[name].unique()) for name in WEIGHTS)))

    task, _ = fit(
        WeightPruning(0.8, end_epoch=1),
        WeightSharing(6, at_epochs=[2]),
        QuantizationAwareTraining(3, freeze_observers_epoch=4),
        Watch(),
        epochs=5,
    )
    late = [(zeros, distinct) for epoch, zeros, distinct in seen if epoch >= 2]
    assert {zeros for zeros, _ in late} == {int(0.8 * 2664)}
    assert max(distinct for _, distinct in late) <= 7
    integers = [tensor for tensor in convert(task.model).buffers() if tensor.dtype == torch.int8 and tensor.ndim > 1]
    weights = [task.state_dict()[name] for name in WEIGHTS]
    assert len(integers) == 3
    for integer, weight in zip(integers, weights, strict=True):
        assert bool((integer[weight == 0] == 0).all())
        assert max(len(row.unique()) for row in integer) <= 7


def test_pruning_after_the_observers_are_frozen_is_refused(fit):
    with pytest.raises(ValueError, match="WeightPruning must end before QuantizationAwareTraining.*frozen observers"):
        fit(WeightPruning(0.5, end_epoch=3), QuantizationAwareTraining(1, freeze_observers_epoch=2))


def test_a_fit_that_ends_early_raises(fit):
    with pytest.raises(ValueError, match="must round from epoch 3, got a fit that ended at epoch 1"):
        fit(QuantizationAwareTraining(3), ends=8)


def test_a_network_that_cannot_be_captured_is_named(fit, task_class):
    class Branching(task_class):
        def __init__(self):
            super().__init__()

            class Branch(nn.Module):
                def forward(self, x):
                    return x * 2 if float(x.sum()) > 0 else x

            self.model.append(Branch())

        def on_before_zero_grad(self, optimizer):
            steps.append(1)

    steps = []
    for start_epoch in (0, 3):
        with pytest.raises(ValueError, match="Sequential cannot be captured as a graph in layer '8' at .*torch.where"):
            fit(QuantizationAwareTraining(start_epoch), task=Branching())
    assert steps == []  # said before the first step, whenever quantization begins


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_epoch": -1}, "start_epoch must be >= 0, got -1"),
        ({"start_epoch": "1"}, "start_epoch must be a whole number, got '1'"),
        ({"start_epoch": 1, "freeze_observers_epoch": 1.5}, "freeze_observers_epoch must be a whole number, got 1.5"),
        (
            {"start_epoch": 3, "freeze_observers_epoch": 3},
            "freeze_observers_epoch must be at least 4 with start_epoch=3, got 3",
        ),
    ],
)
def test_bad_arguments_fail_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(**arguments)


def test_layers_and_bits_that_are_not_there_fail_at_setup(fit):
    with pytest.raises(ValueError, match="keep must match a linear or convolution layer, got 'conv9'"):
        fit(QuantizationAwareTraining(0, keep=["conv9"]))
    with pytest.raises(ValueError, match=r"keep must be a list of patterns, got the string '0': write \['0'\]"):
        fit(QuantizationAwareTraining(0, keep="0"))
    with pytest.raises(ValueError, match=r"keep must be a list of patterns, got the string '0': write \['0'\]"):
        fit(PostTrainingQuantization(keep="0"))
    with pytest.raises(ValueError, match="or a mapping from globs to them, got '8'"):
        fit(QuantizationAwareTraining(0, weight_bits="8"))


def test_epochs_past_the_end_fail_at_setup(fit):
    with pytest.raises(ValueError, match="start_epoch must be below max_epochs=4"):
        fit(QuantizationAwareTraining(4))
    with pytest.raises(ValueError, match="freeze_observers_epoch must be below max_epochs=4"):
        fit(QuantizationAwareTraining(1, freeze_observers_epoch=6))


def test_the_forward_is_an_object_that_sees_the_plain_network(fit):
    task, _ = fit(QuantizationAwareTraining(0), epochs=1)
    assert isinstance(captured(task), CapturedNetwork)
    assert [name for name, _ in task.named_modules() if "fake" in name] == []
