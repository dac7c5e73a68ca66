"""Each schedule on its whole sequence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchalignprune import schedules
from torchalignprune.schedules import Schedule


def sequence(schedule: Schedule, length: int) -> list[float]:
    return [round(schedule(step), 6) for step in range(length)]


def test_constant() -> None:
    assert sequence(schedules.constant(0.3), 3) == [0.3, 0.3, 0.3]


def test_one_shot() -> None:
    assert sequence(schedules.one_shot(0.5), 2) == [0.5, 0.5]
    assert sequence(schedules.one_shot(0.5, at=2, before=0.1), 4) == [0.1, 0.1, 0.5, 0.5]


def test_linear() -> None:
    assert sequence(schedules.linear(0.2, 0.6, begin=1, end=5), 7) == [
        0.2,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.6,
    ]


def test_a_value_is_held_for_every_steps_and_the_last_one_comes_at_the_end() -> None:
    found = sequence(schedules.linear(0.0, 1.0, end=5, every=2), 7)
    assert found == [0.0, 0.0, 0.4, 0.4, 0.8, 1.0, 1.0]


def test_cubic_is_the_formula_of_zhu_and_gupta() -> None:
    schedule = schedules.cubic(0.1, 0.9, begin=10, end=30)
    for step in range(10, 31):
        expected = 0.9 + (0.1 - 0.9) * (1 - (step - 10) / 20) ** 3
        assert math.isclose(schedule(step), expected, rel_tol=1e-12)
    assert schedule(9) == 0.1
    assert schedule(31) == 0.9


def test_exponential_prunes_the_same_share_of_what_remains() -> None:
    schedule = schedules.exponential(0.2, 0.9, begin=5, end=15)
    kept = [1 - schedule(step) for step in range(5, 16)]
    ratios = [b / a for a, b in itertools.pairwise(kept)]
    assert all(math.isclose(ratio, (0.1 / 0.8) ** 0.1, rel_tol=1e-12) for ratio in ratios)
    assert sequence(schedules.exponential(0.5, 0.5, end=3), 5) == [0.5] * 5


def test_steps() -> None:
    for values in ({1: 0.3, 3: 0.6}, {3: 0.6, 1: 0.3}):
        assert sequence(schedules.steps(values), 5) == [0.3, 0.3, 0.3, 0.6, 0.6]


def test_join_counts_from_each_boundary() -> None:
    parts = [schedules.linear(0.0, 1.0, end=2), schedules.linear(1.0, 0.0, end=2)]
    assert sequence(schedules.join(parts, [4]), 8) == [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert sequence(schedules.join(parts[:1], []), 3) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("kind", [schedules.linear, schedules.cubic, schedules.exponential])
@given(
    start=st.floats(0, 0.99),
    stop=st.floats(0, 0.99),
    begin=st.integers(0, 50),
    length=st.integers(1, 100),
    every=st.integers(1, 30),
)
def test_ends_are_exact_and_the_way_is_monotone(
    kind: Callable[..., Schedule], start: float, stop: float, begin: int, length: int, every: int
) -> None:
    schedule = kind(start, stop, begin=begin, end=begin + length, every=every)
    values = [schedule(step) for step in range(begin + length + 3)]
    assert set(values[: begin + 1]) <= {start} | {values[begin]}
    assert math.isclose(values[begin], start, abs_tol=1e-12)
    assert values[-3:] == [stop] * 3
    rising = sorted(values, reverse=stop < start)
    assert all(math.isclose(a, b, abs_tol=1e-12) for a, b in zip(values, rising, strict=True))
    assert len(set(values)) <= 2 + -(-length // every)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.constant(math.nan), "value should be finite, got nan"),
        (lambda: schedules.linear(0.0, 0.5, begin=3, end=3), "begin=3 and end=3"),
        (lambda: schedules.linear(0.0, 0.5, begin=-1, end=3), "begin=-1 and end=3"),
        (lambda: schedules.cubic(0.0, 0.5, end=3, every=0), "every should be at least 1, got 0"),
        (lambda: schedules.cubic(0.0, math.inf, end=3), "stop should be finite, got inf"),
        (lambda: schedules.exponential(0.0, 1.0, end=3), "stop should be below 1, got 1.0"),
        (lambda: schedules.exponential(0.5, 0.5, begin=3, end=3), "begin=3 and end=3"),
        (lambda: schedules.steps({}), "at least one step, got none"),
        (lambda: schedules.steps({-1: 0.0}), "no negative steps, got -1"),
        (lambda: schedules.join([], []), "one fewer than the 0 schedules, got 0"),
        (
            lambda: schedules.join([schedules.constant(0.0)] * 3, [4, 4]),
            r"should be positive and increase, got \[4, 4\]",
        ),
    ],
)
def test_bad_input(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
