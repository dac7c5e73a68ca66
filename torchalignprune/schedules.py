"""Schedules for numbers that change during training: sparsities, or the strength of a regularizer.

A schedule is a function from the step (an int, from 0 on) to a float. It has no state, so a resumed
run continues where it was. With ``begin`` and ``end``, the first value holds up to ``begin`` and
the last one from ``end`` on; with ``every=n`` the value changes at ``begin + n``, ``begin + 2 n``,
... and at ``end``.

    >>> sparsity = cubic(0.0, 0.7, begin=100, end=900, every=100)
    >>> [round(sparsity(step), 3) for step in (0, 100, 200, 299, 400, 900, 5000)]
    [0.0, 0.0, 0.231, 0.231, 0.529, 0.7, 0.7]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

__all__ = ["Schedule", "constant", "cubic", "exponential", "join", "linear", "one_shot", "steps"]

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """The same value at every step.

    Example:
        >>> [constant(0.5)(step) for step in (0, 1, 1000)]
        [0.5, 0.5, 0.5]
    """
    value = _number(value, "value")
    return lambda step: value


def one_shot(value: float, at: int = 0, *, before: float = 0.0) -> Schedule:
    """``before`` until step ``at``, and ``value`` from then on.

    Example:
        >>> [one_shot(0.5, at=2)(step) for step in range(4)]
        [0.0, 0.0, 0.5, 0.5]
    """
    return steps({0: before, at: value} if at > 0 else {0: value})


def linear(start: float, stop: float, *, begin: int = 0, end: int, every: int = 1) -> Schedule:
    r"""A straight line: :math:`s + (e - s)\,t` with :math:`t = (step - begin) / (end - begin)`.

    Args:
        start: the value up to ``begin``.
        stop: the value from ``end`` on.
        begin: the step up to which the value is ``start``.
        end: the step from which it is ``stop``.
        every: for how many steps each value in between is held.

    Raises:
        ValueError: not 0 <= begin < end, every < 1, or a value that is not finite.

    Example:
        >>> [linear(0.0, 1.0, begin=1, end=5)(step) for step in range(7)]
        [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return _between(start, stop, begin, end, every, lambda t: t)


def cubic(start: float, stop: float, *, begin: int = 0, end: int, every: int = 1) -> Schedule:
    r"""Fast at first, then slower and slower: :math:`e + (s - e)(1 - t)^3`.

    Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", equation 1; :math:`t = (step - begin) / (end - begin)`.

    Args:
        start: as in :func:`linear`.
        stop: as in :func:`linear`.
        begin: as in :func:`linear`.
        end: as in :func:`linear`.
        every: as in :func:`linear`.

    Raises:
        ValueError: as :func:`linear`.

    Example:
        >>> [cubic(0.0, 0.5, end=4)(step) for step in range(6)]
        [0.0, 0.2890625, 0.4375, 0.4921875, 0.5, 0.5]
    """
    return _between(start, stop, begin, end, every, lambda t: 1 - (1 - t) ** 3)


def exponential(start: float, stop: float, *, begin: int = 0, end: int, every: int = 1) -> Schedule:
    r"""The same share of what remains at each step: :math:`1 - (1 - s)^{1 - t} (1 - e)^t`.

    The share that is kept, one minus the value, falls exponentially, as it does when a fixed share
    of the remaining weights is pruned again and again (Frankle and Carbin 2019).

    Args:
        start: as in :func:`linear`, below 1.
        stop: as in :func:`linear`, below 1.
        begin: as in :func:`linear`.
        end: as in :func:`linear`.
        every: as in :func:`linear`.

    Raises:
        ValueError: as :func:`linear`, or a value that is not below 1.

    Example:
        >>> [round(exponential(0.0, 0.75, end=2)(step), 3) for step in range(4)]
        [0.0, 0.5, 0.75, 0.75]
    """
    for value, name in ((start, "start"), (stop, "stop")):
        if not value < 1:
            raise ValueError(f"{name} should be below 1, got {value}")
    if start == stop:
        return linear(start, stop, begin=begin, end=end, every=every)
    kept = (1 - stop) / (1 - start)
    return _between(
        start, stop, begin, end, every, lambda t: (1 - start) * (1 - kept**t) / (stop - start)
    )


def steps(values: dict[int, float]) -> Schedule:
    """Each value from its step on.

    Args:
        values: by the step at which they begin; the first value also holds before that step.

    Raises:
        ValueError: no values, a negative step, or a value that is not finite.

    Example:
        >>> [steps({0: 0.0, 2: 0.3, 3: 0.5})(step) for step in range(5)]
        [0.0, 0.0, 0.3, 0.5, 0.5]
    """
    if not values:
        raise ValueError("values should have at least one step, got none")
    if min(values) < 0:
        raise ValueError(f"values should have no negative steps, got {min(values)}")
    ordered = sorted((step, _number(value, "values")) for step, value in values.items())

    def schedule(step: int) -> float:
        found = ordered[0][1]
        for begin, value in ordered:
            if step < begin:
                break
            found = value
        return found

    return schedule


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another; each counts its steps from its own boundary.

    Args:
        schedules: in their order.
        boundaries: the steps at which the second and later schedules begin.

    Raises:
        ValueError: not one boundary fewer than schedules, or boundaries that do not increase.

    Example:
        >>> warm_up_and_hold = join([linear(0.0, 1.0, end=2), constant(0.5)], [3])
        >>> [warm_up_and_hold(step) for step in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.5]
    """
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"boundaries should be one fewer than the {len(schedules)} schedules, got "
            f"{len(boundaries)}"
        )
    starts = [0, *boundaries]
    if any(a >= b for a, b in itertools.pairwise(starts)):
        raise ValueError(f"boundaries should be positive and increase, got {list(boundaries)}")
    parts = list(zip(starts, schedules, strict=True))

    def schedule(step: int) -> float:
        start, current = next((part for part in reversed(parts) if step >= part[0]), parts[0])
        return current(step - start)

    return schedule


def _between(
    start: float, stop: float, begin: int, end: int, every: int, share: Callable[[float], float]
) -> Schedule:
    start, stop = _number(start, "start"), _number(stop, "stop")
    if not 0 <= begin < end:
        raise ValueError(
            f"begin and end should satisfy 0 <= begin < end, got begin={begin} and end={end}"
        )
    if every < 1:
        raise ValueError(f"every should be at least 1, got {every}")

    def schedule(step: int) -> float:
        if step < begin:
            return start
        if step >= end:
            return stop
        held = begin + (step - begin) // every * every
        done = share((held - begin) / (end - begin))
        return start * (1 - done) + stop * done

    return schedule


def _number(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} should be finite, got {value}")
    return float(value)
