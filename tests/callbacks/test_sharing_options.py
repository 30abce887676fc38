from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

import lightning_edge.callbacks.sharing as sharing_module
from lightning_edge import WeightPruning, WeightSharing, export
from lightning_edge.artifact.tensors import order0_bits
from lightning_edge.surgery.channel_scales import channel_scales

WEIGHTS = ("model.0.weight", "model.3.weight", "model.7.weight")
THROUGH = {"at_epochs": [1], "reassign_every": 3}


def distinct(state):
    return [len(state[name].unique()) for name in WEIGHTS]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


class Watch(Callback):
    """What every forward sees."""

    def __init__(self, seen=distinct):
        self.look, self.seen, self.weights = seen, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._see(trainer, pl_module)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._see(trainer, pl_module)

    def _see(self, trainer, pl_module):
        state = pl_module.state_dict()
        self.weights.append((trainer.current_epoch, trainer.global_step, state[WEIGHTS[2]].clone()))
        self.seen.append((trainer.current_epoch, self.look(state)))

    def after(self, epoch):
        return [value for at, value in self.seen if at >= epoch]


class Adam(Callback):
    """Another optimizer for the task."""

    def setup(self, trainer, pl_module, stage):
        pl_module.configure_optimizers = lambda: torch.optim.AdamW(pl_module.parameters(), 0.003, weight_decay=0.1)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=lambda options: next(iter(options), "momentum"),
)
@pytest.mark.parametrize("extra", [[], [Adam()]], ids=["sgd", "adam"])
def test_codes_are_trained_and_every_forward_sees_shared_values(fit, options, extra):
    watch = Watch()
    sharing = WeightSharing(6, **THROUGH)
    fit(*extra, WeightPruning(0.5), sharing, watch, epochs=3, **options)
    assert all(max(values) <= 7 for values in watch.after(1))
    assert all(int((sharing._hidden[name[6:]] == 0).sum()) > 0 for name in WEIGHTS)


def test_hidden_weights_take_in_the_steps_and_choose_every_few_steps(fit):
    watch, sharing = Watch(), WeightSharing(6, at_epochs=[1], reassign_every=3)
    task, _ = fit(sharing, watch, epochs=3)
    weights = [(step, weight) for epoch, step, weight in watch.weights if epoch >= 1]
    changed = sorted({step for (_, old), (step, new) in pairwise(weights) if (old != new).any()})
    assert changed == [11, 14, 17, 20, 23]
    final = task.state_dict()["model.7.weight"]
    hidden, codes = sharing.state_dict()["hidden"]["7.weight"], sharing.state_dict()["codes"]["7.weight"]
    assert len(hidden.unique()) > 1000
    assert codes.unique().tolist() == list(range(1, 7))
    assert float((hidden - final).square().mean().sqrt()) < 0.5 * float(hidden.std())


def test_steps_through_shared_values_match_a_loop():
    """One weight, plain SGD: hidden weights follow their gradients, seen at the shared values."""
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
    sharing = WeightSharing(1, at_epochs=[0], reassign_every=2)
    sharing._weights = {"weight": layer.weight}
    sharing._codes = {"weight": torch.ones(1, 2, dtype=torch.int32)}
    sharing._hidden = {"weight": layer.weight.detach().clone()}
    with torch.no_grad():
        layer.weight.fill_(1.5)
    sharing._keep_shared()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.5)
    optimizer.register_step_post_hook(sharing._after_step)
    expected, velocity = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    for _ in range(3):
        layer.weight.grad = torch.tensor([[1.0, -4.0]])
        optimizer.step()
        velocity = 0.5 * velocity + layer.weight.grad
        expected = expected - 0.1 * velocity
        assert torch.equal(layer.weight.detach(), torch.full((1, 2), 1.5))
    torch.testing.assert_close(sharing._hidden["weight"], expected)


def test_zeros_of_pruning_stay_while_codes_are_trained(fit):
    def zeros(state):
        return sum(int((state[name] == 0).sum()) for name in WEIGHTS)

    watch = Watch(zeros)
    fit(WeightPruning(0.8, end_epoch=1), WeightSharing(bits=2, at_epochs=[2], reassign_every=1, rate=0.05), watch)
    assert set(watch.after(2)) == {int(0.8 * 2664)}


def test_from_freeze_epoch_on_the_values_are_trained_and_the_codes_are_not(fit, tmp_path):
    watch, sharing = Watch(), WeightSharing(6, **THROUGH, freeze_epoch=2)
    fit(sharing, watch)
    second, last = (
        torch.load(tmp_path / "fit" / f"epoch={epoch}.ckpt", weights_only=True)["callbacks"][sharing.state_key]
        for epoch in (2, 3)
    )
    assert equal(second["codes"], last["codes"])
    assert last["hidden"] == {}
    assert all(max(values) <= 6 for values in watch.after(1))
    steps = [weight for epoch, _, weight in watch.weights if epoch == 3]
    assert not torch.equal(steps[0], steps[1])


@pytest.mark.parametrize("averaging_first", [True, False])
def test_an_averaged_network_is_shared_while_codes_are_trained(fit, averaging_first):
    watch, average = Watch(), EMAWeightAveraging(decay=0.9)
    callbacks = [WeightPruning(0.5), WeightSharing(4, **THROUGH), average]
    task, _ = fit(*(callbacks[::-1] if averaging_first else callbacks), watch)
    assert all(max(values) <= 5 for values in watch.after(1))
    assert max(distinct(task.state_dict())) <= 5


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"reassign_every": 3, "freeze_epoch": 3},
        {"reassign_every": 5, "channel_scale": True, "rate": 0.02},
        {"channel_scale": True},
        {"importance": "gradients", "reassign_every": 3, "rate": 0.02},
        {"group_channels": 4, "at_epochs": [1, 3]},
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted(fit, tmp_path, epoch, options):
    def make():
        return WeightPruning(0.5), WeightSharing(6, **{"at_epochs": [1], **options})

    whole, _ = fit(*make())
    resumed, _ = fit(*make(), folder="resumed", ckpt_path=tmp_path / "fit" / f"epoch={epoch}.ckpt")
    assert equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("options", [{}, {"reassign_every": 2}, {"reassign_every": 2, "freeze_epoch": 3}], ids=str)
def test_products_of_scale_and_value_are_kept_at_every_forward(fit, options):
    def values(state):
        """Return the largest codebook of a layer that is found from the weights alone."""
        found = [channel_scales(state[name]) for name in WEIGHTS[1:]]
        return max(1000 if one is None else len(one[2]) for one in found)

    watch = Watch(values)
    task, _ = fit(WeightSharing(5, at_epochs=[1], channel_scale=True, **options), watch)
    assert set(watch.after(1)) <= {4, 5, 6}
    assert values(task.state_dict()) <= 6
    assert len(task.model[7].weight.unique()) > 6


def test_scales_are_trained(fit):
    sharing = WeightSharing(5, at_epochs=[1], channel_scale=True)
    fit(sharing, epochs=2)
    before = {name: scales.clone() for name, scales in sharing.state_dict()["scales"].items()}
    sharing = WeightSharing(5, at_epochs=[1], channel_scale=True)
    fit(sharing, epochs=4)
    after = sharing.state_dict()["scales"]
    assert all(
        float((after[name] / before[name]).max() / (after[name] / before[name]).min()) > 1.001 for name in before
    )


def test_groups_of_channels_have_values_of_their_own(fit):
    task, _ = fit(WeightSharing(3, at_epochs=[1], group_channels=4, exclude=["7"]), epochs=2)
    groups = task.model[3].weight.detach().split(4)
    assert [len(group.unique()) for group in groups] == [3, 3, 3, 3]


def test_vectors_are_kept_while_they_are_trained(fit):
    task, _ = fit(WeightPruning(0.5), WeightSharing(8, at_epochs=[1], block=2, include=["Linear"]), epochs=3)
    weight = task.model[7].weight.detach().view(-1, 2)
    assert len(weight[(weight != 0).all(1)].unique(dim=0)) <= 8


def test_squared_gradients_weigh_the_clustering(fit):
    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.sum = getattr(self, "sum", 0.0) + pl_module.model[7].weight.grad.square() * (
                trainer.current_epoch == 1
            )

        def on_train_epoch_end(self, trainer, pl_module):
            self.gathered = sharing.state_dict()["gathered"].get("7.weight")
            self.seen = [*getattr(self, "seen", []), self.gathered is not None]

    sharing, look = WeightSharing(6, at_epochs=[2], importance="gradients", reassign_every=4), Look()
    fit(sharing, look, epochs=3)
    assert look.seen == [False, True, False]
    torch.testing.assert_close(sharing.state_dict()["importance"]["7.weight"], look.sum)


def test_a_layer_that_was_clustered_by_rate_keeps_its_zeros(fit):
    def zeros(state):
        return [int((state[name] == 0).sum()) for name in WEIGHTS]

    watch = Watch(zeros)
    fit(WeightSharing(32, at_epochs=[1], rate=0.3), watch)
    assert watch.after(1)[0][2] > 300
    assert all(counts == watch.after(1)[0] for counts in watch.after(1))


@pytest.mark.slow
def test_the_file_fits_the_budget(fit, tmp_path):
    sharing = WeightSharing(64, at_epochs=[0], max_bytes=2500)
    task, _ = fit(sharing, epochs=1, num_sanity_val_steps=0)
    path = export(task.model.eval(), tmp_path / "model.edge", example_inputs=(torch.zeros(2, 1, 8, 8),))
    assert 2300 < path.stat().st_size <= 2500
    assert sharing.state_dict()["rate"] > 0


@pytest.fixture
def entropies(monkeypatch):
    """Take the entropy of all tensors for the file: the real one takes seconds."""

    def file_bytes(network, example_inputs):
        assert [tuple(value.shape) for value in example_inputs] == [(2, 1, 8, 8)]
        tensors = [value.detach().numpy() for value in network.parameters()]
        return sum(int(order0_bits(array) * array.size / 8) + 2 * len(set(array.flat)) for array in tensors)

    monkeypatch.setattr(sharing_module, "file_bytes", file_bytes)
    monkeypatch.setattr(sharing_module, "record_bytes", lambda _, report: int(report.entropy_bits / 8))
    return file_bytes


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_budget_is_met_again_when_the_codes_freeze(fit, tmp_path, entropies, epoch):
    def make():
        return WeightSharing(64, at_epochs=[1], max_bytes=1500, reassign_every=3, freeze_epoch=2)

    whole, _ = fit(make(), epochs=3)
    assert 1420 < entropies(whole.model, (torch.zeros(2, 1, 8, 8),)) <= 1500
    resumed, _ = fit(make(), epochs=3, folder="resumed", ckpt_path=tmp_path / "fit" / f"epoch={epoch}.ckpt")
    assert equal(whole.state_dict(), resumed.state_dict())


def test_a_budget_out_of_reach_is_refused_when_it_is_tried(fit, entropies):
    with pytest.raises(ValueError, match="max_bytes must be at least .*, got 30: the smallest file"):
        fit(WeightSharing(8, at_epochs=[1], max_bytes=30))


def test_a_file_that_has_grown_above_the_budget_raises_at_the_end(fit, monkeypatch):
    sizes = iter([900, 1001])
    monkeypatch.setattr(sharing_module, "file_bytes", lambda *_: next(sizes))
    with pytest.raises(ValueError, match="max_bytes must hold at the end of the fit, got a file of 1,001 bytes"):
        fit(WeightSharing(8, at_epochs=[1], max_bytes=1000), epochs=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": -0.1}, "rate must be a finite number >= 0"),
        ({"block": 5}, r"block must be one of \[1, 2, 4\]"),
        ({"clusters": 300, "channel_scale": True}, "clusters must be at most 256 with channel_scale, got 300"),
        ({"channel_scale": True, "gradient": "sum"}, "gradient must be 'mean' with channel_scale, got 'sum'"),
        ({"importance": "fisher"}, r"importance must be one of \['none', 'gradients'\], got 'fisher'"),
        ({"importance": "gradients", "at_epochs": [0, 2]}, r"importance must be 'none' .* take at_epochs=\[1, 2\]"),
        ({"reassign_every": 0}, "reassign_every must be a whole number >= 1 of optimizer steps, or None, got 0"),
        ({"reassign_every": 2, "block": 2}, "reassign_every must be None with block=2, got 2"),
        ({"reassign_every": 2, "gradient": "sum"}, "gradient must be 'mean' with reassign_every and no freeze_epoch"),
        ({"freeze_epoch": 3}, "freeze_epoch must be None without reassign_every, got 3"),
        (
            {"reassign_every": 2, "freeze_epoch": 1},
            "freeze_epoch must be a whole number above the last of at_epochs, 1, got 1",
        ),
        ({"max_bytes": 0}, "max_bytes must be a whole number >= 1, got 0"),
        ({"max_bytes": 100, "rate": 0.1}, "rate must be 0 with max_bytes, got 0.1"),
        ({"max_bytes": 100, "block": 2}, "max_bytes must be None with block=2, got 100"),
        ({"max_bytes": 100, "reassign_every": 2}, "max_bytes must be None with reassign_every and no freeze_epoch"),
    ],
)
def test_options_that_do_not_go_together_fail_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightSharing(**{"clusters": 4, "at_epochs": [1], **arguments})


def test_what_does_not_fit_the_network_or_the_trainer_fails_at_setup(fit):
    with pytest.raises(ValueError, match=r"freeze_epoch must lie below max_epochs=4 \(zero-based\), got 7"):
        fit(WeightSharing(4, **THROUGH, freeze_epoch=7))
    with pytest.raises(ValueError, match="block must be 1 for a convolution"):
        fit(WeightSharing(4, at_epochs=[1], block=2))
    with pytest.raises(ValueError, match="channel_scale must be False beside a WeightAveraging callback"):
        fit(WeightSharing(4, at_epochs=[1], channel_scale=True), EMAWeightAveraging(decay=0.9))


def test_a_fit_that_ends_before_the_freeze_raises(fit):
    with pytest.raises(ValueError, match="got a fit that ended at epoch 2 with the last clustering at 1"):
        fit(WeightSharing(4, **THROUGH, freeze_epoch=3), ends=16)
