"""Ranges of clips for the tasks of an array."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vidtta.engine.cluster.ranges import LEAD, STARTING, Ranges, limit_text, plan_ranges, seconds_of
from vidtta.engine.errors import UserError

DAY = 86_400.0


def plan(unfinished, seconds=20.0, limit=2 * DAY, target=4 * 3600, largest=1001, gpus=1):
    return plan_ranges(unfinished, seconds_a_clip=seconds, limit=limit, target=target, largest_array=largest, gpus=gpus)


def test_a_task_takes_what_it_can_do_in_its_time():
    ranges = plan([True] * 1941)
    assert (ranges.clips, ranges.array) == (720, "0-2")
    assert ranges.seconds == 720 * 20


def test_the_limit_goes_before_the_wish():
    ranges = plan([True] * 1941, limit=3600 + LEAD + STARTING)
    assert (ranges.clips, ranges.array) == (180, "0-10")


def test_several_cards_share_a_range():
    ranges = plan([True] * 1941, gpus=4)
    assert (ranges.clips, ranges.array, ranges.seconds) == (2880, "0", 720 * 20)


def test_the_largest_array_forces_longer_ranges():
    ranges = plan([True] * 1941, seconds=7200, largest=101)
    assert (ranges.clips, ranges.tasks[-1]) == (20, 97)


def test_finished_ranges_are_left_out():
    unfinished = [True] * 1941
    unfinished[720:1440] = [False] * 720
    assert plan(unfinished).array == "0,2"
    assert plan([False] * 1941).tasks == ()


def test_a_clip_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"a clip takes 3601 s and a time limit of 4800 s leaves 3600 s of work"):
        plan([True], seconds=3601, limit=3600 + LEAD + STARTING)


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.booleans(), min_size=1, max_size=300),
    st.floats(0.1, 1e4),
    st.floats(60, DAY),
    st.integers(1, 50),
    st.integers(1, 8),
)
def test_ranges_hold_every_unfinished_clip_once(unfinished, seconds, target, largest, gpus):
    ranges = plan(unfinished, seconds, 2 * DAY, target, largest, gpus)
    taken = [
        k for task in ranges.tasks for k in range(task * ranges.clips, (task + 1) * ranges.clips) if k < len(unfinished)
    ]
    assert len(taken) == len(set(taken))
    assert {k for k, wanted in enumerate(unfinished) if wanted} <= set(taken)
    assert all(task < largest for task in ranges.tasks)


def test_arrays_as_sbatch_writes_them():
    assert Ranges(1, (0, 1, 2, 4, 6, 7), 0).array == "0-2,4,6-7"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("48:00:00", 172_800), ("2-0", 172_800), ("1-2:03", 93_780), ("1-2:03:04", 93_784)],
)
def test_time_limits(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "-1", "1-", "1.5", "²"])
def test_no_time_limit(text):
    with pytest.raises(UserError, match="--time was"):
        seconds_of(text)


def test_limits_are_whole_minutes():
    assert limit_text(7201) == "2:01:00"
