"""A camera that does not wait."""

import pytest
from glip_bench.measuring.pace import follow
from hypothesis import given
from hypothesis import strategies as st


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


def paced(cost, rate, frames):
    clock, seen = Clock(), []

    def action(index):
        seen.append(index)
        clock.now += cost

    return follow(action, rate, frames, clock=clock, sleep=clock.sleep), seen


def test_who_is_fast_enough_sees_every_frame():
    pace, seen = paced(0.02, 30, 60)
    assert seen == list(range(60))
    assert pace.keeps_up and (pace.offered, pace.taken, pace.dropped) == (60, 60, 0)
    assert pace.latency.maximum == pytest.approx(20, abs=1e-3)


def test_who_is_not_drops_and_takes_the_newest():
    pace, seen = paced(0.1, 30, 60)
    assert seen == list(range(0, 61, 3))
    assert not pace.keeps_up and pace.dropped == pace.offered - pace.taken
    assert pace.taken == 21
    assert pace.latency.maximum < 100 + 1e3 / 30 + 1


def test_who_is_very_slow_still_sees_three():
    pace, seen = paced(5.0, 30, 60)
    assert pace.taken == len(seen) == 3
    assert pace.offered == 301


@given(st.floats(1e-4, 1), st.floats(1, 200), st.integers(1, 100))
def test_frames_come_in_order_and_add_up(cost, rate, frames):
    pace, seen = paced(cost, rate, frames)
    assert seen == sorted(set(seen)) and seen[0] == 0
    assert pace.offered == seen[-1] + 1 >= frames
    assert pace.taken == len(seen) >= 3 or frames < 3
    assert pace.latency.minimum >= cost * 1e3 - 1e-2
