"""Schedules of steps, scores, budgets, patterns, regrowth and rewinding of ``WeightPruning``."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from lightning_edge import WeightPruning
from lightning_edge.functional.regrowth import RigL, Splicing

WEIGHTS = ("model.0.weight", "model.3.weight", "model.7.weight")


def zeros(task):
    return [int((task.state_dict()[name] == 0).sum()) for name in WEIGHTS]


class Watch(Callback):
    """The zeros of every layer after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(zeros(pl_module))


SIZE = 72 + 1152 + 1440
OPTIONS = {
    "steps": {"start_step": 2, "end_step": 21, "every": 3},
    "exponential": {"end_epoch": 2, "schedule": "exponential"},
    "cosine": {"end_epoch": 2, "schedule": "cosine"},
    "multi_step": {"end_epoch": 2, "schedule": "multi_step"},
    "ramp": {"end_epoch": 2, "schedule": "ramp"},
    "every": {"end_epoch": 3, "every": 2},
    "lamp": {"end_epoch": 2, "score": "lamp"},
    "lamp splicing": {"end_epoch": 3, "score": "lamp", "regrowth": Splicing()},
    "taylor": {"start_epoch": 1, "end_epoch": 2, "score": "taylor"},
    "movement": {"start_epoch": 1, "end_epoch": 2, "score": "movement"},
    "snip": {"score": "snip"},
    "synflow": {"score": "synflow"},
    "random": {"end_epoch": 2, "score": "random", "seed": 7},
    "callable": {"end_epoch": 2, "score": lambda weight: weight.square()},
    "erk": {"end_epoch": 2, "scope": "erk"},
    "floor": {"end_epoch": 2, "min_kept": 0.05},
    "splicing": {"end_epoch": 3, "regrowth": Splicing()},
    "rigl": {"scope": "erk", "score": "random", "regrowth": RigL(every_n_steps=3, end_step=24)},
    "rewinding": {"end_epoch": 2, "rewind_step": 3},
    "rewound splicing": {"start_epoch": 1, "end_epoch": 3, "regrowth": Splicing(), "rewind_step": 10},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_count_is_exact_at_the_end_and_never_above_before(fit, options):
    watch = Watch()
    task, _ = fit(WeightPruning(0.8, **options), watch)
    assert sum(zeros(task)) == int(0.8 * SIZE)
    assert max(sum(layers) for layers in watch.seen) <= int(0.8 * SIZE)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resumed_equals_uninterrupted(fit, tmp_path, options):
    whole, _ = fit(WeightPruning(0.8, **options), folder="whole")
    for epoch in (0, 1, 2):
        checkpoint = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        resumed, _ = fit(WeightPruning(0.8, **options), folder="resumed", ckpt_path=checkpoint, seed=epoch + 50)
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_schedule_of_steps_decides_at_its_steps(fit):
    watch = Watch()
    fit(WeightPruning(0.8, start_step=2, end_step=10, every=4, schedule="linear"), watch)
    counts = [sum(layers) for layers in watch.seen]
    final = int(0.8 * SIZE)
    assert counts[:10] == [0, 0, 0, 0, 0, 0, *[final // 2] * 4]
    assert set(counts[10:]) == {final}


def test_steps_are_optimizer_steps_under_accumulation(fit):
    watch = Watch()
    fit(WeightPruning(0.8, start_step=3), watch, accumulate_grad_batches=2)
    assert [sum(layers) > 0 for layers in watch.seen[:8]] == [False] * 6 + [True] * 2


def test_each_layer_has_the_sparsity_of_the_first_pattern_that_matches(fit):
    task, _ = fit(WeightPruning({"7": 0.95, "[03]": 0.25}, end_epoch=1))
    assert zeros(task) == [18, 288, 1368]
    task, _ = fit(WeightPruning({"7": 0.95}, end_epoch=1))
    assert zeros(task)[:2] == [0, 0]


def test_a_floor_keeps_every_layer_alive(fit):
    class Tiny(Callback):
        """The first layer is far smaller than the others: a global threshold takes all of it."""

        def on_fit_start(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.model[0].weight.mul_(1e-6)

    task, _ = fit(WeightPruning(0.5, min_kept=0.5), Tiny(), epochs=1)
    assert zeros(task)[0] == 36
    task, _ = fit(WeightPruning(0.5, min_kept=1), Tiny(), epochs=1)
    assert zeros(task)[0] == 71
    assert sum(zeros(task)) == SIZE // 2


def test_two_of_four_along_the_inputs(fit):
    task, _ = fit(WeightPruning(0.5, pattern="2:4", end_epoch=2))
    conv = task.model[3].weight.detach()
    assert int((conv.view(16, 2, 4, 9) != 0).sum(2).max()) == 2
    assert int((task.model[7].weight.detach().view(10, 36, 4) != 0).sum(2).max()) == 2
    assert zeros(task) == [0, 576, 720]  # a single input channel has no group to prune


def test_blocks_go_as_a_whole(fit):
    task, _ = fit(WeightPruning(0.75, pattern="1x4", end_epoch=2, scope="layer", exclude=["0"]))
    blocks = (task.model[7].weight.detach().view(10, 36, 4) == 0).sum(2)
    assert set(blocks.flatten().tolist()) == {0, 4}
    assert zeros(task)[1:] == [864, 1080]


def test_snip_scores_the_initial_weights_by_the_first_gradient(fit):
    class First(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 0:
                layers = [pl_module.get_parameter(name) for name in WEIGHTS]
                self.scores = torch.cat([(w.detach() * w.grad).abs().flatten() for w in layers])

    first, pruning = First(), WeightPruning(0.8, score="snip")
    fit(first, pruning, epochs=1)
    masks = torch.cat([mask.flatten() for mask in pruning.state_dict()["masks"].values()])
    assert float(first.scores[masks].min()) >= float(first.scores[~masks].max())


def test_taylor_adds_up_over_the_steps_since_the_last_decision(fit):
    class Sums(Callback):
        def __init__(self):
            self.total = 0.0

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            layers = [pl_module.get_parameter(name) for name in WEIGHTS]
            self.total = self.total + torch.cat([(w.detach() * w.grad).abs().flatten() for w in layers])

        def on_train_epoch_start(self, trainer, pl_module):
            self.before = self.total

    sums, pruning = Sums(), WeightPruning(0.5, start_epoch=1, score="taylor")
    fit(sums, pruning, epochs=2)
    masks = torch.cat([mask.flatten() for mask in pruning.state_dict()["masks"].values()])
    assert float(sums.before[masks].min()) >= float(sums.before[~masks].max())


def test_random_masks_grow_and_do_not_wander(fit):
    class Masks(Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            masks = pruning.state_dict()["masks"].values()
            self.seen.append(torch.cat([mask.flatten() for mask in masks]))

    masks, pruning = Masks(), WeightPruning(0.8, end_epoch=3, schedule="linear", score="random")
    fit(pruning, masks)
    for before, after in zip(masks.seen[1:], masks.seen[2:], strict=False):
        assert not bool((after & ~before).any())


def test_rigl_exchanges_connections_and_keeps_their_number_in_every_layer(fit):
    class Masks(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, *_):
            self.seen.append({name: mask.clone() for name, mask in pruning.state_dict()["masks"].items()})

    masks = Masks()
    pruning = WeightPruning(0.8, scope="erk", score="random", regrowth=RigL(every_n_steps=3, end_step=24))
    fit(pruning, masks)
    counts = {tuple(int(mask.sum()) for mask in step.values()) for step in masks.seen}
    assert len(counts) == 1
    changed = [
        any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(masks.seen, masks.seen[1:], strict=False)
    ]
    assert [place + 1 for place, change in enumerate(changed) if change] == [3, 6, 9, 12, 15, 18, 21]


def test_splicing_brings_back_what_has_grown_out_of_sight(fit):
    class Pull(Callback):
        """A gradient that pulls one pruned weight far up."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.current_epoch == 1:
                pl_module.model[7].weight.grad[0, 0] = -50.0

    def mask(regrowth):
        class Small(Callback):
            def on_fit_start(self, trainer, pl_module):
                with torch.no_grad():
                    pl_module.model[7].weight[0, 0] = 1e-7

        pruning = WeightPruning(0.5, end_epoch=3, schedule="one_shot", regrowth=regrowth)
        task, _ = fit(Pull(), Small(), pruning)
        return bool(pruning.state_dict()["masks"]["7.weight"][0, 0]), task.model[7].weight[0, 0].item()

    assert mask(None) == (False, 0.0)
    kept, value = mask(Splicing())
    assert kept
    assert value > 1.0


def test_splicing_learns_out_of_sight_under_clipping_too(fit):
    pruning = WeightPruning(0.5, end_epoch=3, regrowth=Splicing())
    fit(pruning, gradient_clip_val=0.5)
    assert all(bool(hidden.any()) for hidden in pruning.state_dict()["hidden"].values())


def test_rewinding_puts_the_early_weights_back_under_the_masks(fit):
    class States(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                self.early = {name: value.clone() for name, value in pl_module.state_dict().items()}

        def on_train_epoch_start(self, trainer, pl_module):
            self.last = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.momenta = len(trainer.optimizers[0].state)

    states = States()
    fit(WeightPruning(0.8, start_epoch=2, end_epoch=3, rewind_step=3), states)
    for name, value in states.last.items():
        kept = value != 0 if name in WEIGHTS else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], states.early[name][kept])
    assert states.momenta == 0


def test_hidden_weights_are_rewound_too(fit):
    class States(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 10:
                hidden = pruning.state_dict()["hidden"]
                self.whole = {name: w + hidden[name.removeprefix("model.")] for name, w in weights(pl_module)}

        def on_train_epoch_start(self, trainer, pl_module):
            hidden = pruning.state_dict()["hidden"]
            self.last = {name: w + hidden.get(name.removeprefix("model."), 0) for name, w in weights(pl_module)}

    def weights(pl_module):
        return [(name, pl_module.state_dict()[name].clone()) for name in WEIGHTS]

    pruning = WeightPruning(0.8, start_epoch=1, end_epoch=3, regrowth=Splicing(), rewind_step=10)
    states = States()
    fit(pruning, states)
    assert all(bool(hidden.any()) for hidden in pruning.state_dict()["hidden"].values())
    assert all(torch.equal(value, states.whole[name]) for name, value in states.last.items())


@pytest.mark.parametrize("averaging_first", [True, False])
def test_an_average_starts_anew_from_the_rewound_weights(fit, averaging_first):
    class States(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                self.early = pl_module.model[7].weight.clone()
            if trainer.global_step == 24:
                self.averaged = average._average_model.module.model[7].weight.clone()
                self.count = int(average._average_model.n_averaged)

    average, states = EMAWeightAveraging(decay=0.9), States()
    pruning = WeightPruning(0.8, start_epoch=2, end_epoch=3, rewind_step=3)
    task, _ = fit(*([average, pruning] if averaging_first else [pruning, average]), states)
    kept = pruning.state_dict()["masks"]["7.weight"]
    assert torch.equal(states.averaged, states.early * kept)
    assert states.count == 0
    assert sum(zeros(task)) == int(0.8 * SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5, "start_step": 3, "end_epoch": 3}, "start_step and end_step must not be mixed with epochs"),
        ({"sparsity": 0.5, "end_step": -1}, "end_step must be a whole number of at least 0, got -1"),
        ({"sparsity": 0.5, "score": "taylor"}, "score 'taylor' must see gradients before the first decision"),
        ({"sparsity": 0.5, "score": "snip", "end_epoch": 2}, "score 'snip' must be used once, got 3 decisions"),
        ({"sparsity": 0.5, "regrowth": "rigl"}, r"regrowth must be RigL\(...\), Splicing\(\) or None, got 'rigl'"),
        ({"sparsity": 0.5, "regrowth": Splicing(), "pattern": "2:4"}, "regrowth must be None with pattern '2:4'"),
        ({"sparsity": 0.5, "rewind_step": -1}, "rewind_step must be at least 0, got -1"),
        ({"sparsity": {"*": 0.0}}, "sparsity must be above 0 for a callback that prunes"),
        ({"sparsity": 0.5, "pattern": 124}, "in a YAML file write the quotes"),
    ],
)
def test_bad_arguments_fail_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        WeightPruning(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": {"9": 0.5}}, "sparsity must name selected layers, got '9'"),
        ({"sparsity": 0.5, "end_step": 32}, "end_step must be below the 32 optimizer steps of the fit, got 32"),
        (
            {"sparsity": 0.5, "regrowth": RigL(every_n_steps=2, end_step=33)},
            "end_step of RigL must be at most 32, the steps of the fit",
        ),
        (
            {"sparsity": 0.5, "end_epoch": 2, "rewind_step": 16},
            "rewind_step must be below 16, the optimizer step of the last decision, got 16: nothing would be rewound",
        ),
        ({"sparsity": 0.5, "end_step": 9, "rewind_step": 40}, "rewind_step must be below 9, the optimizer step of"),
    ],
)
def test_what_cannot_work_fails_before_training(fit, options, message):
    with pytest.raises(ValueError, match=message):
        fit(WeightPruning(**options))


def test_a_schedule_that_leaves_its_range_is_refused_where_it_does(fit):
    def wild(progress):
        return 1.2 if 0.33 < progress < 0.34 else progress

    with pytest.raises(ValueError, match="schedule must stay in"):
        fit(WeightPruning(0.5, end_epoch=3, schedule=wild))


def test_the_checkpoint_holds_tensors_numbers_and_strings_alone(fit, tmp_path):
    for options in (
        {"regrowth": Splicing(), "end_epoch": 3},
        {"score": "movement", "start_epoch": 1, "rewind_step": 0},
    ):
        fit(WeightPruning(0.5, **options))
        torch.load(tmp_path / "fit" / "epoch=3.ckpt", weights_only=True)
