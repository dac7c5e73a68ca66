"""Resamples sentences, for bootstrap intervals."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

__all__ = ["quantiles", "resampled_sums"]

Array = np.ndarray[Any, np.dtype[Any]]

_DRAWN_AT_A_TIME = 1 << 20


def resampled_sums(counts: Array, resamples: int, seed: int, group: str = "") -> Array:
    """The column sums of ``counts`` over bootstrap resamples of its rows.

    All columns are summed over the same rows, so whatever is computed from them is paired.

    Args:
        counts: shape ``(sentences, columns)``; whole numbers.
        resamples: how many times to draw as many rows as there are, with replacement.
        seed: of the draws.
        group: a name; the draws for different groups are independent.

    Returns:
        Shape ``(resamples, columns)``; float64, exact below 2 ** 53.

    Example:
        >>> import numpy as np
        >>> resampled_sums(np.array([[1, 2], [1, 2], [1, 2]]), 2, seed=0)
        array([[3., 6.],
               [3., 6.]])
    """
    n = len(counts)
    generator = np.random.default_rng([seed, zlib.crc32(group.encode())])
    values = counts.astype(np.float64)
    sums = np.empty((resamples, values.shape[1]))
    step = max(1, _DRAWN_AT_A_TIME // n)
    for start in range(0, resamples, step):
        part = sums[start : start + step]
        drawn = generator.integers(n, size=(len(part), n))
        drawn += n * np.arange(len(part))[:, None]
        times = np.bincount(drawn.ravel(), minlength=len(part) * n).reshape(len(part), n)
        np.matmul(times.astype(np.float64), values, out=part)
    return sums


def quantiles(values: Array, level: float) -> tuple[float, float]:
    """The bounds of the percentile interval that holds a share ``level`` of the values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
