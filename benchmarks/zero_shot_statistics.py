"""The statistics of benchmarks/zero_shot.py: paired differences over seeds and test sentences."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats

from torchalignprune.crosslingual.bootstrap import resampled_sums

Array = np.ndarray[Any, np.dtype[Any]]

RESAMPLES = 1000
LEVEL = 0.95
# A share of fewer points above chance than these says nothing.
LEAST_ABOVE_CHANCE = 0.05

# A setting of the grid: a method, a regularizer and a seed.
Key = tuple[str, str, int]


def pack(misses: Array) -> str:
    """Whole numbers from 0 to 255, shape ``(stages, languages, sentences)``, as a short text.

    From one stage to the next little changes, so the differences are what is compressed.

    >>> unpack(pack(np.array([[[1, 2]], [[3, 0]]])), (2, 1, 2)).tolist()
    [[[1, 2]], [[3, 0]]]
    """
    if misses.min() < 0 or misses.max() > 255:
        raise ValueError(f"misses should be from 0 to 255, got up to {misses.max()}")
    small = misses.astype(np.uint8)
    small[1:] -= small[:-1].copy()
    return base64.b85encode(zlib.compress(small.tobytes(), 9)).decode()


def unpack(text: str, shape: tuple[int, ...]) -> Array:
    """What :func:`pack` was given."""
    flat = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    return np.cumsum(flat.reshape(shape), axis=0, dtype=np.uint8).astype(np.int64)


@dataclass(frozen=True)
class Difference:
    """A mean over seeds, with its interval and the two-sided p-value of its being 0."""

    value: float
    half: float
    p: float
    seeds: int

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half


def difference(values: Sequence[float], draws: Array, sentences: int) -> Difference:
    """The mean of ``values``, uncertain by the seeds and by the test sentences.

    The variance of the mean is the sum of the one over seeds and of the one over resampled
    sentences, and has the degrees of freedom of Welch and Satterthwaite. What seeds and sentences
    have in common is in both, so that intervals are rather too wide. Of a single seed the interval
    is over sentences alone, which shows nothing of the method: its p-value is 1.

    Args:
        values: one for each seed, over the sentences as they are.
        draws: the same over resampled sentences; shape ``(seeds, resamples)``.
        sentences: how many there are.
    """
    count = len(values)
    mean = float(np.mean(values))
    of_seeds = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    of_sentences = float(np.var(draws.mean(axis=0), ddof=1))
    whole = of_seeds + of_sentences
    if whole <= 1e-24:
        return Difference(mean, 0.0, 1.0 if abs(mean) < 1e-12 else 0.0, count)
    freedom = of_sentences**2 / (sentences - 1)
    if count > 1:
        freedom += of_seeds**2 / (count - 1)
    freedom = whole**2 / freedom
    error = math.sqrt(whole)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom)) if count > 1 else 1.0
    return Difference(mean, half, p, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for as many tests as there are p-values (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def friedman(blocks: Array) -> float | None:
    """The p-value of Friedman's test that all columns are alike, over the rows; None if too few.

    Args:
        blocks: shape ``(seeds, languages)``.
    """
    if blocks.shape[0] < 3 or blocks.shape[1] < 3:
        return None
    if np.ptp(blocks, axis=1).max() == 0:
        return 1.0
    return float(stats.friedmanchisquare(*blocks.T).pvalue)


class Results:
    """The runs of one task.

    Attributes:
        languages: English first.
        sparsities: from 0 on.
        chance: for each language, the score of its most frequent label.
        keys: the runs that there are.
    """

    def __init__(self, settings: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
        self.languages: list[str] = settings["settings"]["languages"]
        self.sparsities: list[float] = [0.0, *settings["settings"]["sparsities"]]
        self.chance = np.array([settings["chance"][code] for code in self.languages])
        self._out_of = np.array(
            [[int(n) for n in settings["out_of"][code].split()] for code in self.languages]
        )
        self._runs: dict[Key, Mapping[str, Any]] = {}
        for run in runs:
            key = (run["method"], run["regularizer"], run["seed"])
            self._runs.setdefault(key, run)
        self._points: dict[Key, Array] = {}
        self._draws: dict[Key, Array] = {}

    @property
    def keys(self) -> list[Key]:
        return list(self._runs)

    @property
    def sentences(self) -> int:
        return int(self._out_of.shape[1])

    @cached_property
    def _drawn_out_of(self) -> Array:
        return resampled_sums(self._out_of.T, RESAMPLES, seed=0)

    def point(self, key: Key) -> Array:
        """The scores of a run; shape ``(stages, languages)``."""
        self._read(key)
        return self._points[key]

    def draws(self, key: Key) -> Array:
        """Those over resampled sentences; shape ``(resamples, stages, languages)``."""
        self._read(key)
        return self._draws[key]

    def _read(self, key: Key) -> None:
        if key in self._points:
            return
        shape = (len(self.sparsities), *self._out_of.shape)
        hits = self._out_of - unpack(self._runs[key]["misses"], shape)
        self._points[key] = hits.sum(axis=2) / self._out_of.sum(axis=1)
        columns = hits.transpose(2, 0, 1).reshape(self.sentences, -1)
        # The same sentences are drawn in every run, and for all languages.
        sums = resampled_sums(columns, RESAMPLES, seed=0).reshape(RESAMPLES, *shape[:2])
        self._draws[key] = (sums / self._drawn_out_of[:, None]).astype(np.float32)

    def seeds(self, *settings: tuple[str, str]) -> list[int]:
        """Those that all of the settings, methods with regularizers, have run with."""
        own = [{s for m, r, s in self._runs if (m, r) == setting} for setting in settings]
        return sorted(set.intersection(*own))

    def compare(
        self, settings: Sequence[tuple[str, str]], figure: Callable[..., Array]
    ) -> list[Difference] | None:
        """A figure of one or several settings for each stage, paired by seed.

        Args:
            settings: methods with regularizers.
            figure: makes numbers of shape ``(..., stages)`` from the scores of each setting, of
                shape ``(..., stages, languages)``.

        Returns:
            None where no seed has them all.
        """
        seeds = self.seeds(*settings)
        if not seeds:
            return None
        values = [figure(*[self.point((*s, seed)) for s in settings]) for seed in seeds]
        draws = np.array(
            [figure(*[self.draws((*s, seed)) for s in settings]) for seed in seeds], np.float64
        )
        return [
            difference([value[stage] for value in values], draws[..., stage], self.sentences)
            for stage in range(len(self.sparsities))
        ]

    def zero_shot(self, scores: Array) -> Array:
        """The mean over all languages but English."""
        return scores[..., 1:].mean(axis=-1)

    def excess(self, dense: Array, pruned: Array) -> Array:
        """How much more the zero-shot mean drops than English does."""
        drop = dense - pruned
        return self.zero_shot(drop) - drop[..., 0]

    def relative_excess(self, dense: Array, pruned: Array) -> Array:
        """The same of the drops as shares of what the dense model has above chance.

        Of the zero-shot mean, not the mean of the languages' shares. What is above chance counts as
        :data:`LEAST_ABOVE_CHANCE` at least.
        """
        drop, above = dense - pruned, dense - self.chance
        of_zero_shot = np.maximum(self.zero_shot(above), LEAST_ABOVE_CHANCE)
        of_english = np.maximum(above[..., 0], LEAST_ABOVE_CHANCE)
        return self.zero_shot(drop) / of_zero_shot - drop[..., 0] / of_english
