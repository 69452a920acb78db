"""Timing and what is said of it."""

import pytest
from glip_bench.measuring.timing import Timing, measure_interleaved
from hypothesis import given
from hypothesis import strategies as st


def test_summary_is_in_milliseconds():
    timing = Timing.of([0.001, 0.002, 0.009])
    assert (timing.runs, timing.median, timing.mean) == (3, pytest.approx(2.0), pytest.approx(4.0))
    assert (timing.minimum, timing.maximum) == (pytest.approx(1.0), pytest.approx(9.0))


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30))
def test_summary_is_ordered(seconds):
    timing = Timing.of(seconds)
    slack = 1e-9 * timing.maximum
    assert timing.minimum <= timing.median + slack
    assert timing.median <= timing.p95 + slack
    assert timing.p95 <= timing.maximum + slack


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="no durations"):
        Timing.of([])


def test_actions_take_turns_after_an_untimed_round():
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in "AB"}
    timings = measure_interleaved(actions, runs=3, warmup=1)
    assert "".join(calls) == "ABABABAB"
    assert {name: timing.runs for name, timing in timings.items()} == {"A": 3, "B": 3}
