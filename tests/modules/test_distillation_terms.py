import pytest
from students import Task, fit, network

from lightning_edge import DistillationModule, DistillationTerm
from lightning_edge.modules.distillation_terms import checked_terms


def test_weights_follow_their_schedule():
    term = DistillationTerm(weight=1.0, end_weight=0.0, start_epoch=2, end_epoch=6)
    assert [term.weight_at(epoch, last_epoch=9) for epoch in (0, 2, 3, 6, 9)] == [1.0, 1.0, 0.75, 0.0, 0.0]
    assert DistillationTerm(weight=2.0).weight_at(5, last_epoch=9) == 2.0
    assert DistillationTerm(weight=0.0, end_weight=2.0, schedule="cubic").weight_at(5, last_epoch=10) == 1.75


@pytest.mark.parametrize("schedule", ["one_shot", "multi_step", "linear"])
def test_until_its_start_a_weight_is_the_first_one_whatever_the_schedule(schedule):
    term = DistillationTerm(weight=2.0, end_weight=0.0, start_epoch=5, end_epoch=8, schedule=schedule)
    weights = [term.weight_at(epoch, last_epoch=9) for epoch in range(10)]
    assert weights[:6] == [2.0] * 6
    assert weights[8:] == [0.0] * 2


def test_terms_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="loss must be one of .* got 'kd'"):
        DistillationTerm("kd")
    with pytest.raises(ValueError, match="weight must be positive, got 0"):
        DistillationTerm(weight=0)
    with pytest.raises(ValueError, match="weight must be a finite number >= 0, got -1"):
        DistillationTerm(weight=-1)
    with pytest.raises(ValueError, match="temperature must be left out"):
        DistillationTerm("hint", temperature=2.0, layers={"a": "b"})
    with pytest.raises(ValueError, match="layers must name at least one pair"):
        DistillationTerm("hint", layers={})
    with pytest.raises(ValueError, match="end_epoch must be above start_epoch=3"):
        DistillationTerm(end_weight=0.0, start_epoch=3, end_epoch=3)
    with pytest.raises(ValueError, match="schedule must be one of"):
        DistillationTerm(schedule="fast")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        DistillationTerm(temperature=0)
    with pytest.raises(ValueError, match="end_weight must be given with start_epoch=2"):
        DistillationTerm(start_epoch=2)
    with pytest.raises(ValueError, match="start_epoch must leave an epoch for end_weight=0.0, got 0.0 in a fit of 1"):
        DistillationTerm(end_weight=0.0).check(epochs=1)


@pytest.mark.parametrize("options", [{"weight": "1"}, {"temperature": "4"}, {"weight": float("inf")}, {"loss": 3}])
def test_what_is_no_number_or_loss_is_named_with_its_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
        DistillationTerm(**options)
    with pytest.raises(ValueError, match=r"layers must be layers of the student .* got 'conv': write"):
        DistillationTerm("hint", layers="conv")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "losses must hold at least one term"),
        (["soft_targets"], r"losses must be terms by name, got a list: write \{\"soft\": DistillationTerm"),
        ({"s": "soft_targets"}, r"losses\['s'\] must be a DistillationTerm, got 'soft_targets'"),
        ({"task": DistillationTerm()}, "losses must have names without dots, other than 'task', .* got 'task'"),
        ({"soft.targets": DistillationTerm()}, "names without dots, .* got 'soft.targets'"),
    ],
)
def test_losses_that_are_no_terms_by_name_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        checked_terms(losses)
    with pytest.raises(ValueError, match=message):
        DistillationModule(Task(), network(), losses)


def fading(**options):
    return DistillationModule(Task(network()), network(1), {"soft": DistillationTerm(end_weight=0.0, **options)})


class Weights(DistillationTerm):
    """Remembers what it was asked."""

    def weight_at(self, epoch, *, last_epoch):
        weight = super().weight_at(epoch, last_epoch=last_epoch)
        type(self).seen.append((epoch, weight))
        return weight


@pytest.mark.parametrize("limit", [{"epochs": -1, "max_steps": 9}, {"epochs": 50, "max_steps": 9}, {"epochs": 3}])
def test_a_weight_reaches_its_end_in_the_last_epoch_whatever_ends_the_fit(tmp_path, limit):
    Weights.seen = []
    fit(DistillationModule(Task(network()), network(1), {"soft": Weights(end_weight=0.0)}), tmp_path, **limit)
    assert Weights.seen == [(epoch, weight) for epoch, weight in ((0, 1.0), (1, 0.5), (2, 0.0)) for _ in range(3)]


def test_schedules_past_the_end_of_the_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="end_epoch must be below the 3 epochs of the fit .* got 4"):
        fit(fading(end_epoch=4), tmp_path, epochs=-1, max_steps=9)
    module = fading(end_epoch=1)
    fit(module, tmp_path, epochs=2)
    with pytest.raises(ValueError, match="end_epoch must be below the 1 epochs of the fit .* got 1"):
        fit(module, tmp_path, epochs=1)


def test_a_fit_without_an_end_needs_an_end_epoch(tmp_path):
    with pytest.raises(ValueError, match="end_epoch must be given for an end_weight"):
        fit(fading(), tmp_path, epochs=-1, max_time={"seconds": 5})
