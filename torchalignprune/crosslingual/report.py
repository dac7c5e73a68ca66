"""A model's scores in every language, and what they lost against another model's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchalignprune.crosslingual import figures
from torchalignprune.crosslingual.bootstrap import Array, quantiles, resampled_sums

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["Comparison", "Estimate", "LanguageScore", "ZeroShotReport"]

_METRICS = {"accuracy": "accuracy", "span_f1": "span F1"}


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class LanguageScore:
    """How a model did in one language.

    The score is ``sum(hits) / sum(out_of)``, or 0 if ``out_of`` is 0 throughout. For accuracy they
    count the correct labels and all labels of a sentence; for span F1, twice the entities that were
    found, and the entities of the data and of the model together.

    Attributes:
        hits: int64, for each sentence.
        out_of: int64, for each sentence.
        cut_off: words that the model never saw because their sentence was too long; they count as
            wrong (for entities, as outside of any). For texts and pairs: how many were cut.
        unmapped: words to which the tokenizer gives no subword; they count likewise.
        digest: a hash of the sentences and their labels.
        ids: a hash of the sentences' ids, in their order.
    """

    hits: Array
    out_of: Array
    cut_off: int
    unmapped: int
    digest: str
    ids: str

    def __post_init__(self) -> None:
        if self.hits.shape != self.out_of.shape or self.hits.ndim != 1 or not len(self.hits):
            raise ValueError(
                "hits and out_of should have one number for each sentence, got shapes "
                f"{self.hits.shape} and {self.out_of.shape}"
            )
        if (self.hits < 0).any() or (self.hits > self.out_of).any():
            raise ValueError("hits should be from 0 to out_of in every sentence")

    @property
    def sentences(self) -> int:
        """How many sentences there are."""
        return len(self.hits)


class ZeroShotReport:
    """The score of a model in each language of a task, with bootstrap intervals.

    ``print(report)`` shows a table, and so does ``rich.print``. Scores are from 0 to 1; tables and
    figures show them in percent.

    The intervals are percentile bootstrap intervals over sentences. In a parallel task the same
    sentences are drawn for all languages, otherwise they are drawn independently for each. The
    intervals thus cover other sentences of the same kind, but not other languages or models.

    Attributes:
        task: the name of the task.
        metric: ``"accuracy"`` or ``"span_f1"``.
        split: the split that the model was evaluated on.
        supervised: the language that the model was fine-tuned on, or None: all are zero-shot.
        parallel: whether the languages have the same sentences, so that comparisons are paired.
        languages: the counts of each language.
        level: the coverage of the intervals.
        resamples: the number of bootstrap resamples.
        seed: of the resamples.

    Example:
        >>> import numpy as np
        >>> def counted(*hits):  # of ten words in each sentence
        ...     return LanguageScore(np.array(hits), np.full(4, 10), 0, 0, "", "")
        >>> dense = {"en": counted(9, 10, 9, 10), "de": counted(8, 9, 7, 8)}
        >>> dense = ZeroShotReport("pos", "accuracy", "test", dense)
        >>> dense
        ZeroShotReport(pos, 2 languages: en 95.0, zero-shot mean 80.0)
        >>> pruned = {"en": counted(9, 9, 9, 9), "de": counted(5, 6, 5, 4)}
        >>> pruned = ZeroShotReport("pos", "accuracy", "test", pruned)
        >>> pruned.compare(dense)
        Comparison(pos (test), drop in points: en +5.0, zero-shot mean +30.0)
        >>> excess = pruned.compare(dense).excess_drop
        >>> round(excess.value, 6), excess.low > 0
        (0.25, True)
    """

    def __init__(
        self,
        task: str,
        metric: str,
        split: str,
        languages: Mapping[str, LanguageScore],
        *,
        supervised: str | None = "en",
        parallel: bool = False,
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        if not languages:
            raise ValueError("languages should have at least one language, got none")
        if supervised is not None and supervised not in languages:
            raise ValueError(
                f"supervised should be one of the languages, {', '.join(languages)}, or None, got "
                f"{supervised!r}"
            )
        check_drawing(level, resamples, seed)
        if parallel and len({score.ids for score in languages.values()}) > 1:
            raise ValueError("languages should have the same sentence ids in a parallel task")
        self.task = task
        self.metric = metric
        self.split = split
        self.supervised = supervised
        self.parallel = parallel
        self.languages = dict(languages)
        self.level = level
        self.resamples = resamples
        self.seed = seed

    @property
    def zero_shot(self) -> list[str]:
        """The languages that the model was not fine-tuned on."""
        return [language for language in self.languages if language != self.supervised]

    @cached_property
    def scores(self) -> dict[str, Estimate]:
        """The score in each language."""
        return {language: self._estimate([language]) for language in self.languages}

    @property
    def supervised_score(self) -> Estimate | None:
        """The score in the training language, if it is among the languages."""
        return None if self.supervised is None else self.scores[self.supervised]

    @cached_property
    def zero_shot_mean(self) -> Estimate | None:
        """The mean of the scores in the other languages, all with the same weight."""
        return self._estimate(self.zero_shot) if self.zero_shot else None

    @cached_property
    def gap(self) -> Estimate | None:
        """The supervised score minus the zero-shot mean."""
        if self.supervised is None or not self.zero_shot:
            return None
        point, drawn = (
            values[self.supervised] - _mean(values, self.zero_shot)
            for values in (self._point_scores, self._drawn)
        )
        return Estimate(float(point), *quantiles(drawn, self.level))

    def compare(self, dense: ZeroShotReport) -> Comparison:
        """What this pruned model lost against the dense one.

        Both must have been evaluated on the same sentences, which is checked. Resampling is paired:
        the same sentences are drawn for both models, and in a parallel task for all languages.

        Args:
            dense: the report of the dense model.

        Raises:
            ValueError: the two differ in task, split, training language, set of languages or
                sentences.
        """
        return Comparison(dense, self)

    def to_json(self) -> str:
        """The report as JSON, for :meth:`from_json`.

        ``hits`` and ``out_of`` of each language are strings of numbers, one for each sentence.
        """
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`to_json` writes."""
        found: dict[str, Any] = {
            key: getattr(self, key) for key in ("task", "metric", "split", "supervised", "parallel")
        }
        found |= {"level": self.level, "resamples": self.resamples, "seed": self.seed}
        for key in ("supervised_score", "zero_shot_mean", "gap"):
            estimate = getattr(self, key)
            found[key] = None if estimate is None else asdict(estimate)
        found["languages"] = {
            language: {
                "score": asdict(self.scores[language]),
                "sentences": counted.sentences,
                "cut_off": counted.cut_off,
                "unmapped": counted.unmapped,
                "digest": counted.digest,
                "ids": counted.ids,
                "hits": _spelled(counted.hits),
                "out_of": _spelled(counted.out_of),
            }
            for language, counted in self.languages.items()
        }
        return found

    @classmethod
    def from_json(cls, text: str) -> ZeroShotReport:
        """Reads the JSON of :meth:`to_json`.

        Scores and intervals are computed again from the counts.

        Raises:
            ValueError: ``text`` is not such JSON.
        """
        found = json.loads(text)
        try:
            languages = {
                language: LanguageScore(
                    np.array(counted["hits"].split(), np.int64),
                    np.array(counted["out_of"].split(), np.int64),
                    **{key: counted[key] for key in ("cut_off", "unmapped", "digest", "ids")},
                )
                for language, counted in found["languages"].items()
            }
            options = ("supervised", "parallel", "level", "resamples", "seed")
            return cls(
                found["task"],
                found["metric"],
                found["split"],
                languages,
                **{key: found[key] for key in options},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"text should be a ZeroShotReport as JSON: {error!r}") from error

    def to_pandas(self) -> pandas.DataFrame:
        """A ``DataFrame`` with a row for each language: its score, interval and counts.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = []
        for language, counted in self.languages.items():
            row = {"language": language, **asdict(self.scores[language])}
            row |= {"sentences": counted.sentences, "cut_off": counted.cut_off}
            rows.append(row | {"unmapped": counted.unmapped})
        frame = _pandas().DataFrame(rows).set_index("language")
        return frame.rename(columns={"value": "score"})

    def plot(self, path: str | Path | None = None, title: str | None = None) -> Figure:
        """Draws the score of each language with its interval.

        Args:
            path: the file to write, if any; its suffix sets the format: ``.png``, ``.pdf``, ...
            title: of the figure.

        Returns:
            The figure, not registered with pyplot.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure: Figure = figures.draw_scores(self, title or self._title())
        return figures.saved(figure, path)

    def __str__(self) -> str:
        return _plain_table(self._cells(), self._summary())

    def __rich__(self) -> Table:
        return _rich_table(self._cells(), self._summary())

    def __repr__(self) -> str:
        return f"ZeroShotReport({self.task}, {len(self.languages)} languages: {self._brief()})"

    def _title(self) -> str:
        return f"{self.task} ({self.split}): {self._brief()}"

    def _brief(self) -> str:
        parts = []
        if self.supervised_score is not None:
            parts.append(f"{self.supervised} {_percent(self.supervised_score.value)}")
        if self.zero_shot_mean is not None:
            parts.append(f"zero-shot mean {_percent(self.zero_shot_mean.value)}")
        return ", ".join(parts)

    def _cells(self) -> list[list[str]]:
        lost = any(counted.cut_off or counted.unmapped for counted in self.languages.values())
        cells = [
            ["language", _METRICS[self.metric], f"{self.level:.0%} interval", "sentences"]
            + ["cut off", "unmapped"] * lost
        ]
        for language in ([self.supervised] if self.supervised else []) + self.zero_shot:
            counted, score = self.languages[language], self.scores[language]
            name = language + (" (supervised)" if language == self.supervised else "")
            cells.append(
                [name, _percent(score.value), _interval(score), f"{counted.sentences:,}"]
                + [f"{counted.cut_off:,}", f"{counted.unmapped:,}"] * lost
            )
        return cells

    def _summary(self) -> list[list[str]]:
        rows = [("zero-shot mean", self.zero_shot_mean), ("gap", self.gap)]
        width = len(self._cells()[0])
        return [
            [name, _percent(estimate.value), _interval(estimate), *[""] * (width - 3)]
            for name, estimate in rows
            if estimate is not None
        ]

    def _group(self, language: str) -> str:
        """The name of the language's group; languages of one group are resampled together."""
        return "" if self.parallel else language

    @cached_property
    def _point_scores(self) -> dict[str, Any]:
        return {
            language: _ratio(counted.hits.sum(), counted.out_of.sum())
            for language, counted in self.languages.items()
        }

    @cached_property
    def _drawn(self) -> dict[str, Any]:
        """The score in each language on every resample; shape ``(resamples,)``."""
        groups: dict[str, list[str]] = {}
        for language in self.languages:
            groups.setdefault(self._group(language), []).append(language)
        drawn = {}
        for group, members in groups.items():
            counts = [
                column
                for language in members
                for column in (self.languages[language].hits, self.languages[language].out_of)
            ]
            sums = resampled_sums(np.stack(counts, 1), self.resamples, self.seed, group)
            for i, language in enumerate(members):
                drawn[language] = _ratio(sums[:, 2 * i], sums[:, 2 * i + 1])
        return drawn

    def _estimate(self, languages: Sequence[str]) -> Estimate:
        return Estimate(
            float(_mean(self._point_scores, languages)),
            *quantiles(_mean(self._drawn, languages), self.level),
        )


class Comparison:
    """What a pruned model lost in each language, against the dense one.

    A drop is the dense model's score minus the pruned one's. A relative drop is the drop as a share
    of the dense score (0 if that is 0). ``excess_drop`` tests the claim that zero-shot languages
    lose more: it is the mean zero-shot drop minus the supervised drop, above 0 if they do. Dense
    scores differ between languages, and a high one has more to lose: look at
    ``relative_excess_drop`` too.

    All intervals are paired, as in :meth:`ZeroShotReport.compare`.

    Attributes:
        dense: the report of the dense model.
        pruned: the report of the pruned one; its ``level``, ``resamples`` and ``seed`` are used.
    """

    def __init__(self, dense: ZeroShotReport, pruned: ZeroShotReport) -> None:
        for key in ("task", "metric", "split", "supervised", "parallel"):
            theirs, own = getattr(dense, key), getattr(pruned, key)
            if theirs != own:
                raise ValueError(f"dense should have the same {key}, {own!r}, got {theirs!r}")
        if set(dense.languages) != set(pruned.languages):
            raise ValueError(
                f"dense should have the same languages, {', '.join(pruned.languages)}, got "
                f"{', '.join(dense.languages)}"
            )
        for language, counted in pruned.languages.items():
            theirs = dense.languages[language]
            if theirs.digest != counted.digest or theirs.sentences != counted.sentences:
                raise ValueError(
                    f"dense should have been evaluated on the same sentences; those in {language} "
                    "differ"
                )
        self.dense = dense
        self.pruned = pruned

    @cached_property
    def drops(self) -> dict[str, Estimate]:
        """The drop in each language."""
        return {language: self._estimate([language]) for language in self.pruned.languages}

    @cached_property
    def relative_drops(self) -> dict[str, Estimate]:
        """The relative drop in each language."""
        return {
            language: self._estimate([language], relative=True)
            for language in self.pruned.languages
        }

    @property
    def supervised_drop(self) -> Estimate | None:
        """The drop in the training language."""
        supervised = self.pruned.supervised
        return None if supervised is None else self.drops[supervised]

    @cached_property
    def zero_shot_drop(self) -> Estimate | None:
        """The mean drop in the other languages."""
        return self._estimate(self.pruned.zero_shot) if self.pruned.zero_shot else None

    @property
    def relative_supervised_drop(self) -> Estimate | None:
        """The relative drop in the training language."""
        supervised = self.pruned.supervised
        return None if supervised is None else self.relative_drops[supervised]

    @cached_property
    def relative_zero_shot_drop(self) -> Estimate | None:
        """The relative drop of the mean over the other languages.

        It is not the mean of their relative drops, which languages with low scores would dominate.
        """
        zero_shot = self.pruned.zero_shot
        return self._estimate(zero_shot, relative=True) if zero_shot else None

    @cached_property
    def excess_drop(self) -> Estimate | None:
        """The mean zero-shot drop minus the supervised drop."""
        return self._excess(relative=False)

    @cached_property
    def relative_excess_drop(self) -> Estimate | None:
        """The relative drop of the zero-shot mean minus the relative supervised drop."""
        return self._excess(relative=True)

    def to_json(self) -> str:
        """The drops as JSON. The JSON of both reports has all that they are computed from."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`to_json` writes."""
        kinds = ("supervised_drop", "zero_shot_drop", "excess_drop")
        found: dict[str, Any] = {}
        for key in (*kinds, *[f"relative_{kind}" for kind in kinds]):
            estimate = getattr(self, key)
            found[key] = None if estimate is None else asdict(estimate)
        found["languages"] = {
            language: {
                "dense": self.dense.scores[language].value,
                "pruned": self.pruned.scores[language].value,
                "drop": asdict(self.drops[language]),
                "relative_drop": asdict(self.relative_drops[language]),
            }
            for language in self.pruned.languages
        }
        return found

    def to_pandas(self) -> pandas.DataFrame:
        """A ``DataFrame`` with a row for each language: both scores and the drops.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = []
        for language, found in self.to_dict()["languages"].items():
            row = {"language": language, "dense": found["dense"], "pruned": found["pruned"]}
            for key in ("drop", "relative_drop"):
                row |= {key: found[key]["value"]}
                row |= {f"{key}_{bound}": found[key][bound] for bound in ("low", "high")}
            rows.append(row)
        return _pandas().DataFrame(rows).set_index("language")

    def plot(
        self,
        path: str | Path | None = None,
        title: str | None = None,
        *,
        shares: Mapping[str, float] | None = None,
        shares_label: str | None = None,
    ) -> Figure:
        """Draws the drop of each language, in its script's colour, and against pretraining shares.

        Args:
            path: the file to write, if any; its suffix sets the format: ``.png``, ``.pdf``, ...
            title: of the figure.
            shares: for each language, how much of it there was in pretraining, in any unit.
                Languages without are left out of that plot. For XLM-R:
                :data:`torchalignprune.crosslingual.CC100_GIB`. Default: draw only the drops.
            shares_label: the axis label of ``shares``; required for any but ``CC100_GIB``.

        Returns:
            The figure, not registered with pyplot.

        Raises:
            ValueError: ``shares`` without ``shares_label``, or not above 0.
            ImportError: matplotlib is not installed.
        """
        figure = figures.draw_drops(self, title or self._title(), shares, shares_label)
        return figures.saved(figure, path)

    def __str__(self) -> str:
        return _plain_table(self._cells(), self._summary())

    def __rich__(self) -> Table:
        return _rich_table(self._cells(), self._summary())

    def __repr__(self) -> str:
        return f"Comparison({self._title()})"

    def _title(self) -> str:
        parts = []
        if self.supervised_drop is not None:
            parts.append(f"{self.pruned.supervised} {_points(self.supervised_drop.value)}")
        if self.zero_shot_drop is not None:
            parts.append(f"zero-shot mean {_points(self.zero_shot_drop.value)}")
        return f"{self.pruned.task} ({self.pruned.split}), drop in points: {', '.join(parts)}"

    def _cells(self) -> list[list[str]]:
        level = f"{self.pruned.level:.0%} interval"
        cells = [["language", "dense", "pruned", "drop", level, "relative", level]]
        supervised = self.pruned.supervised
        for language in ([supervised] if supervised else []) + self.pruned.zero_shot:
            drop, relative = self.drops[language], self.relative_drops[language]
            cells.append(
                [
                    language + (" (supervised)" if language == supervised else ""),
                    _percent(self.dense.scores[language].value),
                    _percent(self.pruned.scores[language].value),
                    *(_points(drop.value), _interval(drop)),
                    *(f"{_percent(relative.value)}%", _interval(relative)),
                ]
            )
        return cells

    def _summary(self) -> list[list[str]]:
        rows = []
        if self.zero_shot_drop is not None and self.relative_zero_shot_drop is not None:
            zero_shot, relative = self.pruned.zero_shot, self.relative_zero_shot_drop
            means = [_mean(report._point_scores, zero_shot) for report in (self.dense, self.pruned)]
            rows.append(
                [
                    "zero-shot mean",
                    *map(_percent, means),
                    *(_points(self.zero_shot_drop.value), _interval(self.zero_shot_drop)),
                    *(f"{_percent(relative.value)}%", _interval(relative)),
                ]
            )
        if self.excess_drop is not None and self.relative_excess_drop is not None:
            excess, relative = self.excess_drop, self.relative_excess_drop
            rows.append(
                [
                    "excess over supervised",
                    *("", "", _points(excess.value), _interval(excess)),
                    *(f"{_percent(relative.value)}%", _interval(relative)),
                ]
            )
        return rows

    @cached_property
    def _draws(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The scores of both on the same resamples."""
        settings = self.pruned
        again = ZeroShotReport(
            self.dense.task,
            self.dense.metric,
            self.dense.split,
            self.dense.languages,
            supervised=settings.supervised,
            parallel=settings.parallel,
            level=settings.level,
            resamples=settings.resamples,
            seed=settings.seed,
        )
        return again._drawn, settings._drawn

    def _lost(self, languages: Sequence[str], *, relative: bool) -> tuple[Any, Any]:
        """The drop of the mean score: on the data, and on every resample."""
        found = []
        for dense, pruned in ((self.dense._point_scores, self.pruned._point_scores), self._draws):
            mean = _mean(dense, languages)
            lost = mean - _mean(pruned, languages)
            found.append(_ratio(lost, mean) if relative else lost)
        return found[0], found[1]

    def _estimate(self, languages: Sequence[str], *, relative: bool = False) -> Estimate:
        point, drawn = self._lost(languages, relative=relative)
        return Estimate(float(point), *quantiles(drawn, self.pruned.level))

    def _excess(self, *, relative: bool) -> Estimate | None:
        if self.pruned.supervised is None or not self.pruned.zero_shot:
            return None
        zero_shot = self._lost(self.pruned.zero_shot, relative=relative)
        supervised = self._lost([self.pruned.supervised], relative=relative)
        drawn = zero_shot[1] - supervised[1]
        return Estimate(float(zero_shot[0] - supervised[0]), *quantiles(drawn, self.pruned.level))


def _spelled(counts: Array) -> str:
    """The counts as one string: as a list, indented JSON would take a line for each."""
    return " ".join(map(str, counts.tolist()))


def check_drawing(level: float, resamples: int, seed: int) -> None:
    """Checks how intervals are to be drawn.

    Raises:
        ValueError: a number is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level should be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples should be at least 1, got {resamples}")
    if seed < 0:
        raise ValueError(f"seed should be at least 0, got {seed}")


def _mean(values: Mapping[str, Any], languages: Sequence[str]) -> Any:
    return sum(values[language] for language in languages) / len(languages)


def _ratio(numerator: Any, denominator: Any) -> Any:
    """0 where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator != 0)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _interval(estimate: Estimate) -> str:
    return f"{_percent(estimate.low)} to {_percent(estimate.high)}"


def _plain_table(cells: list[list[str]], summary: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, *summary, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in (*cells, *summary)
    ]
    return "\n".join([*lines[: len(cells)], *([""] if summary else []), *lines[len(cells) :]])


def _rich_table(cells: list[list[str]], summary: list[list[str]]) -> Table:
    from rich.table import Table

    header, *rows = cells
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if summary:
        table.add_row()
    for row in summary:
        table.add_row(*row)
    return table


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            'to_pandas needs pandas: pip install "torchalignprune[pandas]"'
        ) from error
    return pandas
