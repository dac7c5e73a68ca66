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

RESAMPLES = 10_000
LEVEL = 0.95
# For 84 tests Holm's correction needs p-values down to 0.05 / 84; the least is 1 / (FLIPS + 1).
FLIPS = 10_000
# A share of less than this above chance says nothing.
LEAST_ABOVE_CHANCE = 0.05

# A run of the grid: method, regularizer and seed.
Key = tuple[str, str, int]

# The fields that tell lines of the same kind and ``settings_id`` apart.
_KEYS = {
    "settings": (),
    "strength": ("regularizer",),
    "tuning": ("method", "regularizer", "strength", "seed"),
    "run": ("method", "regularizer", "seed"),
}


def distinct(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines without repetitions; of lines with the same keys the first is kept.

    Two processes that work on one task may both write a line.
    """
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for line in lines:
        own = tuple(line[name] for name in _KEYS[line["kind"]])
        found.setdefault((line["kind"], line["settings_id"], *own), line)
    return list(found.values())


def pack(misses: Array) -> str:
    """Packs integers from 0 to 255, shape ``(stages, languages, sentences)``, into a short text.

    Little changes from one stage to the next, so the differences are compressed.

    >>> unpack(pack(np.array([[[1, 2]], [[3, 0]]])), (2, 1, 2)).tolist()
    [[[1, 2]], [[3, 0]]]
    """
    if misses.min() < 0 or misses.max() > 255:
        raise ValueError(f"misses should be from 0 to 255, got up to {misses.max()}")
    small = misses.astype(np.uint8)
    small[1:] -= small[:-1].copy()
    return base64.b85encode(zlib.compress(small.tobytes(), 9)).decode()


def unpack(text: str, shape: tuple[int, ...]) -> Array:
    """The integers that :func:`pack` was given, int64, in the given shape."""
    flat = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
    return np.cumsum(flat.reshape(shape), axis=0, dtype=np.uint8).astype(np.int64)


@dataclass(frozen=True)
class Difference:
    """A mean over seeds, half of its interval, and the two-sided p-value against 0."""

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
    """The mean of ``values``, with the uncertainty from both seeds and test sentences.

    The variance of the mean is the variance over seeds plus that over resampled sentences, with the
    degrees of freedom of Welch and Satterthwaite. What the two have in common is counted twice, so
    intervals are rather too wide. With a single seed the interval is over sentences alone, which
    shows nothing about the method: the p-value is 1.

    Args:
        values: one for each seed, over the test sentences.
        draws: the same over resampled sentences; shape ``(seeds, resamples)``.
        sentences: how many test sentences there are.
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
    """The p-value of Friedman's test that all languages drop alike, over the seeds.

    All seeds are scored on the same sentences, so what these happen to cost a language is in every
    row. A small p-value alone does therefore not show that languages differ: :func:`sentence_test`
    tests over the sentences.

    Args:
        blocks: drops, shape ``(seeds, languages)``.

    Returns:
        None for fewer than three seeds or languages.
    """
    if blocks.shape[0] < 3 or blocks.shape[1] < 3:
        return None
    # Equal drops may differ in their last digits, by rounding, and should still be ties.
    blocks = np.round(blocks, 9)
    if np.ptp(blocks, axis=1).max() == 0:
        return 1.0
    return float(stats.friedmanchisquare(*blocks.T).pvalue)


def sentence_test(lost: Array, out_of: Array, *, flips: int = FLIPS, seed: int = 0) -> float:
    """The p-value of a randomisation test that all languages drop alike, over the sentences.

    The sentences are the same in all languages. The contribution of a sentence to the drop of a
    language, in excess of the mean drop ``common`` of all languages, is ``(lost - common * out_of)
    / (all words of the language)``. Over all sentences these sum to the language's drop minus the
    common one, however long the sentences are in each language, and in expectation to 0 if all
    languages drop alike. The statistic is the variance of the languages' drops. It is compared with
    its values under random signs: for each sentence one sign, the same for all languages, of its
    differences between languages.

    This does not take languages to be exchangeable: related languages stay as similar, and
    languages with few words as noisy, as they are. Permuting the languages within each sentence
    would treat them as exchangeable, and make p-values somewhat too small.

    Args:
        lost: hits of the dense model minus those of the pruned one, means over seeds; shape
            ``(languages, sentences)``.
        out_of: the number of words of each sentence, or 1 for a text; the same shape.
        flips: how many times signs are drawn.
        seed: of the random signs.

    Returns:
        At least ``1 / (flips + 1)``.
    """
    words = out_of.sum(axis=1, keepdims=True)
    common = (lost.sum(axis=1, keepdims=True) / words).mean()
    parts = (lost - common * out_of) / words
    parts = parts - parts.mean(axis=0)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, lost.shape[1]))
    flipped = np.square(signs @ parts.T).sum(axis=1)
    own = np.square(parts.sum(axis=1)).sum()
    # Equal values may differ in their last digits.
    as_large = int((flipped >= own * (1 - 1e-9) - 1e-15).sum())
    return (1 + as_large) / (flips + 1)


class Results:
    """The runs of one task.

    Attributes:
        languages: their codes, English first.
        sparsities: in rising order, beginning with 0.
        chance: for each language, the score of its most frequent label.
        keys: of all runs.
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

    @property
    def out_of(self) -> Array:
        """How many words each sentence has; shape ``(languages, sentences)``."""
        return self._out_of

    def hits(self, key: Key) -> Array:
        """How many words of each a run got right; shape ``(stages, languages, sentences)``."""
        shape = (len(self.sparsities), *self._out_of.shape)
        hits: Array = self._out_of - unpack(self._runs[key]["misses"], shape)
        return hits

    def point(self, key: Key) -> Array:
        """The scores of a run; shape ``(stages, languages)``."""
        self._read(key)
        return self._points[key]

    def draws(self, key: Key) -> Array:
        """The scores over resampled sentences; shape ``(resamples, stages, languages)``."""
        self._read(key)
        return self._draws[key]

    def _read(self, key: Key) -> None:
        if key in self._points:
            return
        hits = self.hits(key)
        self._points[key] = hits.sum(axis=2) / self._out_of.sum(axis=1)
        columns = hits.transpose(2, 0, 1).reshape(self.sentences, -1)
        # The same sentences are drawn in every run, and for all languages.
        sums = resampled_sums(columns, RESAMPLES, seed=0).reshape(RESAMPLES, *hits.shape[:2])
        self._draws[key] = (sums / self._drawn_out_of[:, None]).astype(np.float32)

    def seeds(self, *settings: tuple[str, str]) -> list[int]:
        """The seeds that all given settings (method, regularizer) have run with."""
        own = [{s for m, r, s in self._runs if (m, r) == setting} for setting in settings]
        return sorted(set.intersection(*own))

    def compare(
        self, settings: Sequence[tuple[str, str]], figure: Callable[..., Array]
    ) -> list[Difference] | None:
        """A figure computed from one or several settings, for each stage, paired by seed.

        Args:
            settings: pairs of method and regularizer.
            figure: called with the scores of each setting, of shape ``(..., stages, languages)``;
                returns numbers of shape ``(..., stages)``.

        Returns:
            None if no seed has run with all settings.
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
        """How much more the zero-shot mean drops than English."""
        drop = dense - pruned
        return self.zero_shot(drop) - drop[..., 0]

    def relative_excess(self, dense: Array, pruned: Array) -> Array:
        """The same for drops as shares of what the dense model has above chance.

        This is the share of the zero-shot mean, not the mean of the languages' shares. What is
        above chance counts as :data:`LEAST_ABOVE_CHANCE` at least.
        """
        drop, above = dense - pruned, dense - self.chance
        of_zero_shot = np.maximum(self.zero_shot(above), LEAST_ABOVE_CHANCE)
        of_english = np.maximum(above[..., 0], LEAST_ABOVE_CHANCE)
        return self.zero_shot(drop) / of_zero_shot - drop[..., 0] / of_english
