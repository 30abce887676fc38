import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_edge.functional.schedules import (
    SCHEDULES,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    MultiStep,
    OneShot,
    Ramp,
    Timeline,
    find_schedule,
    progress_at,
)

unit_interval = st.floats(0.0, 1.0)
schedules = st.one_of(
    st.sampled_from([OneShot(), MultiStep()]),
    st.one_of(*(st.builds(schedule, st.floats(0.0, 1.0, exclude_max=True)) for schedule in (Linear, Cubic, Cosine))),
    st.builds(
        Exponential,
        st.floats(0.0, exclude_min=True, allow_infinity=False),
        initial=st.sampled_from([0.0, 0.1, 0.7]),
    ),
    st.builds(Ramp, st.floats(0.0, 1.0, exclude_max=True), unit_interval),
)


def test_cubic_is_equation_1_of_zhu_and_gupta():
    final, start, end = 0.9, 2, 10
    for epoch in range(start, end + 1):
        paper = final + (0.0 - final) * (1 - (epoch - start) / (end - start)) ** 3
        assert final * Cubic()(progress_at(epoch, start=start, end=end)) == pytest.approx(paper, abs=1e-15)


def test_initial_is_the_initial_sparsity_of_the_paper_over_the_final_one():
    initial, final, start, end = 0.3, 0.9, 2, 10
    schedule = Cubic(initial=initial / final)
    for epoch in range(start, end + 1):
        paper = final + (initial - final) * (1 - (epoch - start) / (end - start)) ** 3
        assert final * schedule(progress_at(epoch, start=start, end=end)) == pytest.approx(paper, abs=1e-15)


@pytest.mark.parametrize("schedule", [Linear, Cubic, Exponential, Cosine])
def test_an_initial_fraction_is_where_a_schedule_starts(schedule):
    plain, raised = schedule(), schedule(initial=0.25)
    assert [raised(step / 8) for step in range(9)] == pytest.approx([0.25 + 0.75 * plain(s / 8) for s in range(9)])
    assert (raised(0.0), raised(1.0)) == (0.25, 1.0)
    for initial in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"initial must lie in \[0, 1\), the fraction of the target at the start"):
            schedule(initial=initial)


@pytest.mark.parametrize(
    ("make", "name"), [(lambda: MultiStep((0, 10, 20), (0.5, 0.7, 1.0)), "milestones"), (lambda: Ramp(20), "hold")]
)
def test_epochs_in_place_of_fractions_are_refused_with_the_division(make, name):
    with pytest.raises(
        ValueError, match=rf"{name} must be fractions .* got 20: .* 20 of a schedule from 0 to 40 as 0.5"
    ):
        make()


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (OneShot(), [1.0, 1.0, 1.0, 1.0, 1.0]),
        (Linear(), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (Cubic(), [0.0, 0.578125, 0.875, 0.984375, 1.0]),
        (Exponential(steepness=4 * math.log(2)), [0.0, 8 / 15, 12 / 15, 14 / 15, 1.0]),
        (Cosine(), [0.0, 0.5 - math.sqrt(0.125), 0.5, 0.5 + math.sqrt(0.125), 1.0]),
        (MultiStep(), [0.4, 0.4, 0.7, 0.9, 1.0]),
        (MultiStep(milestones=(0.5, 0.75), fractions=(0.6, 1.0)), [0.0, 0.0, 0.6, 1.0, 1.0]),
        (Ramp(), [0.0, 0.0, 0.0, 0.5, 1.0]),
        (Ramp(hold=0.25, level=0.4), [0.4, 0.4, 0.6, 0.8, 1.0]),
        (Ramp(hold=0.0), [0.0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_schedules_have_the_values_computed_by_hand(schedule, values):
    assert [schedule(quarter / 4) for quarter in range(5)] == pytest.approx(values, abs=1e-15)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_named_schedule_ends_at_one_and_never_falls(name):
    values = [SCHEDULES[name](step / 1000) for step in range(1001)]
    assert values[-1] == 1.0
    assert values == sorted(values)


@given(schedules, unit_interval, unit_interval)
def test_every_schedule_stays_in_the_unit_interval_ends_exactly_at_one_and_never_falls(schedule, a, b):
    early, late = sorted((a, b))
    assert 0.0 <= schedule(early) <= 1.0
    assert schedule(early) <= schedule(late) + 1e-15
    assert schedule(1.0) == 1.0
    assert find_schedule(schedule) is schedule


def test_a_milestone_is_reached_at_the_epoch_that_stands_for_it():
    # Thirds have no exact double, so the quotient of the epochs has to be the double that the default holds.
    reached = [MultiStep()(progress_at(epoch, start=3, end=24)) for epoch in (9, 10, 16, 17, 23, 24)]
    assert reached == [0.4, 0.7, 0.7, 0.9, 0.9, 1.0]


def test_lists_from_a_yaml_file_become_tuples():
    assert MultiStep(milestones=[0, 0.5], fractions=[0.5, 1]) == MultiStep((0.0, 0.5), (0.5, 1.0))
    assert len({MultiStep(milestones=[0, 0.5], fractions=[0.5, 1]), MultiStep((0.0, 0.5), (0.5, 1.0))}) == 1


@pytest.mark.parametrize("steepness", [0.0, -1.0, math.inf, math.nan])
def test_a_steepness_out_of_range_is_refused(steepness):
    with pytest.raises(ValueError, match="steepness must be a finite number above 0, got"):
        Exponential(steepness)


@pytest.mark.parametrize(
    ("milestones", "fractions", "message"),
    [
        ((), (), r"milestones must be numbers in \[0, 1\].*got \(\)"),
        ((0.5, 0.2), (0.5, 1.0), r"milestones must be .*none smaller than the one before, got \(0\.5, 0\.2\)"),
        ((0.5, 1.5), (0.5, 1.0), r"milestones must be fractions of the way from start to end"),
        ((0.0, math.nan, 1.0), (0.1, 0.5, 1.0), r"milestones must be numbers in \[0, 1\]"),
        ((0.5, 0.5), (0.5, 1.0), "milestones must differ"),
        ((0.0, 0.5), (-0.5, 1.0), r"fractions must be numbers in \[0, 1\]"),
        ((0.0, 0.5), (1.0, 0.5), "fractions must be .*none smaller"),
        ((0.0, 0.5), (0.5, 0.9), r"fractions must end at 1\.0.*target would be missed"),
        ((0.0, 0.5), (1.0,), r"fractions must be as many as milestones \(2\), got 1"),
    ],
)
def test_steps_out_of_order_or_out_of_range_are_refused(milestones, fractions, message):
    with pytest.raises(ValueError, match=message):
        MultiStep(milestones, fractions)


@pytest.mark.parametrize(
    ("hold", "level", "message"),
    [(1.0, 0.0, r"hold must lie in \[0, 1\)"), (-0.1, 0.0, "hold must"), (0.5, 1.1, r"level must lie in \[0, 1\]")],
)
def test_a_ramp_out_of_range_is_refused(hold, level, message):
    with pytest.raises(ValueError, match=message):
        Ramp(hold, level)


def test_progress_is_clamped_and_an_empty_span_is_over_at_once():
    assert progress_at(-5, start=0, end=4) == 0.0
    assert progress_at(9, start=0, end=4) == 1.0
    assert [progress_at(time, start=3, end=3) for time in (2, 3, 4)] == [0.0, 1.0, 1.0]


def test_names_find_the_default_schedules():
    defaults = [OneShot(), Linear(), Cubic(), Exponential(), Cosine(), MultiStep(), Ramp()]
    names = ["one_shot", "linear", "cubic", "exponential", "cosine", "multi_step", "ramp"]
    assert list(SCHEDULES) == names
    assert [find_schedule(name) for name in names] == defaults


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"schedule must be one of \['cosine', 'cubic', .*'ramp'\].*'cubik'"):
        find_schedule("cubik")
    with pytest.raises(ValueError, match=r"schedule must be one of .*or a callable, got 0\.5"):
        find_schedule(0.5)


def test_a_class_in_place_of_an_object_is_refused():
    with pytest.raises(ValueError, match=r"schedule must be an object, got the class: write Cubic\(\)"):
        find_schedule(Cubic)


def test_a_callable_that_misses_the_target_is_refused():
    with pytest.raises(ValueError, match=r"must return 1\.0 at progress 1\.0, got 0\.5"):
        find_schedule(lambda progress: progress / 2)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda progress: 2 * progress - 1, r"must stay in \[0, 1\], got -1\.0 at progress 0\.0"),
        (lambda progress: 1.5 if progress == 0.5 else progress, r"must stay in \[0, 1\], got 1\.5 at progress 0\.5"),
        (lambda progress: math.nan, r"must stay in \[0, 1\], got nan"),
    ],
)
def test_a_callable_that_leaves_the_unit_interval_is_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        find_schedule(schedule)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 12))
def test_decisions_are_those_of_a_loop_over_time(start, length, every):
    timeline = Timeline(start, start + length, every)
    times, time = [], start
    while time < timeline.end:
        times.append(time)
        time += every
    times.append(timeline.end)
    horizon = range(-2, timeline.end + every + 2)
    assert [time for time in horizon if timeline.due(time)] == times
    assert [timeline.decision_number(time) for time in horizon] == [sum(t < time for t in times) for time in horizon]
    assert [timeline.progress(time) for time in horizon] == [
        progress_at(time, start=start, end=start + length) for time in horizon
    ]


def test_the_last_decision_is_at_the_end_even_off_the_grid():
    timeline = Timeline(start=100, end=1000, every=400, unit="step")
    assert [time for time in range(2000) if timeline.due(time)] == [100, 500, 900, 1000]
    assert [timeline.decision_number(time) for time in (99, 100, 101, 500, 1000, 1001)] == [0, 0, 1, 1, 3, 4]
    assert timeline.progress(1000) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -1, "end": 3}, r"start must be a whole number of at least 0, got -1, in Timeline\(start=-1, end=3"),
        ({"start": 4, "end": 3}, "end must be a whole number of at least 4, got 3"),
        ({"start": 0, "end": 3, "every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"start": 0, "end": 1e3}, r"end must be a whole number of at least 0, got 1000\.0"),
        ({"start": 0, "end": 3, "unit": "batch"}, "unit must be 'epoch' or 'step', got 'batch'"),
    ],
)
def test_a_timeline_out_of_order_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Timeline(**arguments)
