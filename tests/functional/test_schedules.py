import pytest

from lightning_edge.functional.schedules import SCHEDULES, cubic, find_schedule, progress_at


def test_cubic_is_equation_1_of_zhu_and_gupta():
    final, start, end = 0.9, 2, 10
    for epoch in range(start, end + 1):
        paper = final + (0.0 - final) * (1 - (epoch - start) / (end - start)) ** 3
        assert final * cubic(progress_at(epoch, start=start, end=end)) == pytest.approx(paper, abs=1e-15)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_ends_at_one_and_never_falls(name):
    values = [SCHEDULES[name](step / 100) for step in range(101)]
    assert values[-1] == 1.0
    assert values == sorted(values)


def test_progress_is_clamped_and_an_empty_span_is_over_at_once():
    assert progress_at(-5, start=0, end=4) == 0.0
    assert progress_at(9, start=0, end=4) == 1.0
    assert progress_at(3, start=3, end=3) == 1.0


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"schedule must be one of \['cubic', 'linear', 'one_shot'\].*'cubik'"):
        find_schedule("cubik")


def test_a_callable_that_misses_the_target_is_refused():
    with pytest.raises(ValueError, match=r"must return 1\.0 at progress 1\.0, got 0\.5"):
        find_schedule(lambda progress: progress / 2)
