"""The page of benchmarks/zero_shot.py, made from its log of runs alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from torchalignprune.crosslingual.experiment import DENSE
from torchalignprune.crosslingual.recipes import RECIPES, REGULARIZERS
from zero_shot_statistics import (
    FLIPS,
    LEAST_ABOVE_CHANCE,
    LEVEL,
    RESAMPLES,
    Array,
    Difference,
    Results,
    distinct,
    friedman,
    holm,
    sentence_test,
)

ALPHA = 0.05
SEEDS = 5
# The methods that others are compared with, and whose drops are shown by language.
BASES = ("magnitude", "aligned")
# Each method with calibration text in many languages, and the same with English text.
CALIBRATIONS = {"wanda-multi": "wanda-en", "aligned-inputs-multi": "aligned-inputs-en"}
METHODS = (DENSE, *RECIPES)
# How many English sentences strengths were chosen on, for logs that do not record it.
VALIDATION = {"pos": 100, "topics": 99}

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """A difference for one setting at one sparsity, with its p-value corrected in its family."""

    difference: Difference
    p: float

    @property
    def tested(self) -> bool:
        """Whether there is more than one seed."""
        return self.difference.seeds > 1

    @property
    def sign(self) -> int:
        """1 or -1 if it is significant, otherwise 0."""
        if self.p >= ALPHA:
            return 0
        return 1 if self.difference.value > 0 else -1

    def __str__(self) -> str:
        found = self.difference
        star = "**" if self.sign else ""
        return f"{star}{100 * found.value:+.1f}{star} ± {100 * found.half:.1f}"


# For each setting, one cell for each sparsity above 0.
Table = dict[tuple[str, str], list[Cell]]


def page(lines: Lines) -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for task, (settings, own, results) in _by_task(lines).items():
        parts += [
            f"## {task}",
            _settings(settings, results, own),
            _strengths(task, own),
            _scores(task, results),
            _first_claim(results),
            _second_claim(results),
            _third_claim(results),
            *(_methods(results, base) for base in BASES),
            _calibration_texts(results),
        ]
    if len(parts) == 1:
        parts.append("There are no runs yet.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _by_task(lines: Lines) -> dict[str, tuple[Lines, Lines, Results]]:
    """For each task: all versions of its settings, the lines of the last one, and its results."""
    found: dict[str, tuple[Lines, Lines, Results]] = {}
    lines = distinct(lines)
    settings = [line for line in lines if line.get("kind") == "settings"]
    for task in dict.fromkeys(line["settings"]["task"] for line in settings):
        versions = [line for line in settings if line["settings"]["task"] == task]
        own = [line for line in lines if line.get("settings_id") == versions[-1]["settings_id"]]
        runs = [line for line in own if line["kind"] == "run"]
        found[task] = versions, own, Results(versions[-1], runs)
    return found


_INTRODUCTION = f"""# Pruning while fine-tuning, and what it costs zero-shot languages

Made by `python benchmarks/zero_shot.py --report` from `runs.jsonl`, which
`python benchmarks/zero_shot.py --data DIR` writes. An encoder is fine-tuned on English, pruned from
sparsity to sparsity with training after each pruning, and evaluated in all languages. What it
learns, and for how long, is below for each task.

How to read it:

- A *drop* is the score of the dense model minus that of the pruned one, in points. The dense model
  of the same seed has trained for as many steps on the same batches, without a regularizer.
- Figures are means over seeds; ± is half of the {LEVEL:.0%} interval. It covers other seeds and
  other test sentences (both variances are added; Student's t, degrees of freedom by Welch and
  Satterthwaite), but not other languages. Everything is paired: by seed, and by sentence, since the
  same sentences are drawn for all models and languages ({RESAMPLES:,} resamples).
- **Bold**: significant at {ALPHA:.0%} after Holm's correction for all tests of that table. Settings
  that have run with a single seed are neither tested nor counted. Rows of `dense` are corrected on
  their own, because what a regularizer does to a model that is not pruned says nothing about a
  claim.
- *Above chance*: above the score of the most frequent label of the language. Zero-shot scores begin
  lower and have less to lose, so drops are also given as shares of what the dense model has above
  chance. This is the share of the zero-shot mean, not the mean of the languages' shares, and what
  is above chance counts as {100 * LEAST_ABOVE_CHANCE:.0f} points at least.
- A claim *holds* if at least half of its settings are significant for it and none against it. It
  *holds in part* if more are significant for it than against it. Otherwise it *is not shown*."""


def _settings(versions: Lines, results: Results, lines: Lines) -> str:
    latest, runs = versions[-1], [line for line in lines if line["kind"] == "run"]
    settings = latest["settings"]
    processors = dict.fromkeys(run["cpu"] for run in runs)
    training = settings["training"]
    whole = len(METHODS) * len(REGULARIZERS) * SEEDS
    counts = {
        name: sum(regularizer == name for _, regularizer, _ in results.keys)
        for name in REGULARIZERS
    }
    complete = sum(seed < SEEDS for _, _, seed in results.keys)
    kinds = _listed(f"{count} with {name}" for name, count in counts.items())
    text = f"""**{complete} of the {whole} runs of the grid are in** ({len(METHODS)} methods,
{len(REGULARIZERS)} regularizers, {SEEDS} seeds; {kinds}).
Trained on English, evaluated on {settings["evaluated"]}: {settings["sentences"]["en"]} sentences in
each of {len(results.languages)} languages ({", ".join(results.languages)}). {training["epochs"]:g}
epochs of dense training and {training["retraining_epochs"]:g} after each pruning, in batches of
{training["batch_size"]} and float32; learning rate {training["learning_rate"]:g}, and
{training["head_learning_rate"]:g} for the classifier; model {settings["model"]}. Measured with
torch {latest["machine"]["torch"]} on {", ".join(processors) or latest["machine"]["cpu"]}."""
    if len(processors) > 1:
        text += """
Runs of one seed on different processors see the same batches but round differently, and training
amplifies this: they are paired more loosely than runs on one processor."""
    if len(versions) > 1:
        text += (
            f"\nThe log has runs of {len(versions) - 1} other settings of this task, left out here."
        )
    seconds = [run["seconds"] for run in runs]
    if seconds:
        text += (
            f"\nA run took {statistics.median(seconds):.0f} s (median, on one core beside another "
            "run). It takes over the dense training of the run before it if the two share seed and "
            "regularizer."
        )
    return text


def figures(lines: Lines) -> dict[str, Figure]:
    """For each task, the scores of every method without a regularizer, by sparsity."""
    return {
        task: _figure(results)
        for task, (_, _, results) in _by_task(lines).items()
        if any(name == "none" for _, name, _ in results.keys)
    }


def _figure(results: Results) -> Figure:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    x = [100 * sparsity for sparsity in results.sparsities]
    for i, method in enumerate(METHODS):
        seeds = results.seeds((method, "none"))
        if not seeds:
            continue
        points = np.mean([results.point((method, "none", seed)) for seed in seeds], axis=0)
        # There are ten colors: lines that repeat one are dashed.
        style = {"color": "black"} if method == DENSE else {"color": f"C{i % 10}"}
        style |= {"linestyle": "-" if i <= 10 else "--", "marker": "o", "markersize": 3}
        for axes, values in zip(panels, (points[:, 0], results.zero_shot(points)), strict=True):
            axes.plot(x, 100 * values, label=_label(method), **style)
    chance = 100 * results.chance
    for axes, title, level in zip(
        panels, ("English", "zero-shot mean"), (chance[0], chance[1:].mean()), strict=True
    ):
        axes.axhline(level, color="gray", linestyle=":", linewidth=1)
        axes.set_title(f"{title} (dotted: chance)", fontsize=10)
        axes.set_xlabel("sparsity (%)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (%)")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right center",
        fontsize=8,
        frameon=False,
    )
    return figure


def _strengths(task: str, lines: Lines) -> str:
    chosen = [line for line in lines if line["kind"] == "strength"]
    if not chosen:
        return "No strength of a regularizer has been chosen yet."
    strengths = list(dict.fromkeys(s for line in chosen for s in line["means"]))
    rows = [["regularizer", *("none" if not float(s) else f"{float(s):g}" for s in strengths)]]
    for line in chosen:
        cells = []
        for strength in strengths:
            mean = line["means"].get(strength)
            text = "" if mean is None else f"{100 * mean:.2f}"
            cells.append(f"**{text}**" if float(strength) == line["strength"] else text)
        rows.append([line["regularizer"], *cells])
    tuning = [line for line in lines if line["kind"] == "tuning"]
    methods = _listed(dict.fromkeys(line["method"] for line in tuning))
    seeds = _listed(dict.fromkeys(str(line["seed"]) for line in tuning))
    counts = dict.fromkeys(line.get("sentences", VALIDATION.get(task)) for line in tuning)
    sentences = _listed(str(count) for count in counts if count is not None) or "some"
    text = (
        f"Strengths, chosen by the mean accuracy over the sparsities in {sentences} sentences of "
        f"English validation data (method {methods}; seeds {seeds}, which the grid does not use):"
        f"\n\n{_markdown(rows)}"
    )
    useless = [
        line["regularizer"]
        for line in chosen
        if line["means"][str(line["strength"])] <= line["means"].get("0.0", -1)
    ]
    if useless:
        text += f"\n\nNo strength of {_listed(useless)} was better there than no regularizer."
    edge = [
        line["regularizer"]
        for line in chosen
        if line["strength"] in (min(_tried(line)), max(_tried(line)))
    ]
    if edge:
        text += (
            f"\n\nThe strength chosen for {_listed(edge)} is the lowest or highest that was tried."
        )
    return text


def _tried(line: Mapping[str, Any]) -> list[float]:
    return [float(strength) for strength in line["means"] if float(strength)]


def _scores(task: str, results: Results) -> str:
    """Zero-shot means and English, without regularizers."""
    rows = [["method", "", *_stages(results, with_dense=True)]]
    for method in METHODS:
        seeds = results.seeds((method, "none"))
        if not seeds:
            continue
        points = np.mean([results.point((method, "none", seed)) for seed in seeds], axis=0)
        for name, values in (("English", points[:, 0]), ("zero-shot", results.zero_shot(points))):
            first = f"{_label(method)} ({len(seeds)})" if name == "English" else ""
            rows.append([first, name, *(f"{100 * value:.1f}" for value in values)])
    if len(rows) == 1:
        return ""
    chance = 100 * results.chance
    return (
        "### Scores without regularizers\n\nIn percent, by sparsity; in brackets the number of "
        f"seeds. Chance: English {chance[0]:.1f}, zero-shot mean {chance[1:].mean():.1f}.\n\n"
        f"{_markdown(rows)}\n\n![scores by sparsity]({task}.png)"
    )


def _corrected(found: Mapping[tuple[str, str], list[Difference] | None]) -> Table:
    """Cells with corrected p-values for all settings that have run, at sparsities above 0.

    Rows of the dense model are a family of their own.
    """
    there = {setting: stages[1:] for setting, stages in found.items() if stages is not None}
    table = {setting: [Cell(stage, 1.0) for stage in stages] for setting, stages in there.items()}
    for dense in (False, True):
        places = [
            (setting, i)
            for setting, cells in table.items()
            for i, cell in enumerate(cells)
            if cell.tested and (setting[0] == DENSE) == dense
        ]
        p_values = holm([there[setting][i].p for setting, i in places])
        for (setting, i), p in zip(places, p_values, strict=True):
            table[setting][i] = Cell(there[setting][i], p)
    return table


def _verdict(signs: Iterable[int]) -> str:
    signs = list(signs)
    up, down = signs.count(1), signs.count(-1)
    if not signs:
        return "is not tested yet"
    if 2 * up >= len(signs) and not down:
        holds = "holds"
    elif up > down:
        holds = "holds in part"
    else:
        holds = "is not shown"
    return (
        f"{holds}: of {len(signs)} settings (method and sparsity) {up} are significant for it, "
        f"{down} against it"
    )


def _first_claim(results: Results) -> str:
    title = "### 1. Pruning hurts zero-shot languages more than English"
    pruned = [(method, "none") for method in RECIPES]
    absolute, relative, drops = (
        {setting: results.compare([(DENSE, "none"), setting], figure) for setting in pruned}
        for figure in (
            results.excess,
            results.relative_excess,
            lambda dense, own: results.zero_shot(dense - own),
        )
    )
    in_points, in_shares = _corrected(absolute), _corrected(relative)
    if not in_points:
        return f"{title}\n\nNot tested yet: it takes `dense` and a method with the same seed."
    text = (
        f"{title}\n\nIn points the claim **{_verdict(_signs(in_points))}**. As shares of what is "
        f"above chance it **{_verdict(_signs(in_shares))}**.\n\n"
        "How many points more the zero-shot mean drops than English:\n\n"
        f"{_cells(results, in_points)}\n\nThe same for drops as shares of what is above chance, in "
        f"percentage points:\n\n{_cells(results, in_shares)}"
    )
    worse = [s for s, cells in in_points.items() if any(cell.sign < 0 for cell in cells)]
    if worse:
        text += (
            f"\n\nEnglish loses significantly more points at some sparsity with {_named(worse)}."
        )
    return (
        f"{text}\n\nThe drop of the zero-shot mean itself:\n\n{_cells(results, _corrected(drops))}"
    )


def _second_claim(results: Results) -> str:
    title = "### 2. The regularizers reduce that loss"
    settings = [
        (method, regularizer)
        for method in METHODS
        for regularizer in REGULARIZERS
        if regularizer != "none"
    ]

    def gains(figure: Callable[[Array], Array]) -> Table:
        return _corrected(
            {
                (method, name): results.compare(
                    [(method, "none"), (method, name)],
                    lambda without, own: figure(own) - figure(without),
                )
                for method, name in settings
            }
        )

    zero_shot = gains(results.zero_shot)
    english = gains(lambda scores: scores[..., 0])
    if not zero_shot:
        return f"{title}\n\nNot tested yet: no method has run with a regularizer."
    # What a regularizer does to a model that is not pruned says nothing about the claim.
    pruned = {setting: cells for setting, cells in zero_shot.items() if setting[0] != DENSE}
    helped = {s for s, cells in pruned.items() if any(cell.sign > 0 for cell in cells)}
    hurt = {s for s, cells in pruned.items() if any(cell.sign < 0 for cell in cells)}
    tested = [s for s, cells in pruned.items() if cells[0].tested]
    lines = [
        f"For the zero-shot mean the claim **{_verdict(_signs(pruned))}**.",
        f"Helped significantly at some sparsity: {_named(sorted(helped)) or 'none'}.",
        f"Hurt significantly at some sparsity: {_named(sorted(hurt)) or 'none'}.",
        "Did not help significantly at any sparsity: "
        f"{_named([s for s in tested if s not in helped]) or 'none'}.",
    ]
    if len(tested) < len(pruned):
        single = _named(s for s in pruned if s not in tested)
        lines.append(f"Has run with one seed, and is not tested: {single}.")
    closer = _corrected(
        {
            (method, name): results.compare(
                [(method, "none"), (method, name)],
                lambda without, own: _gap(results, without) - _gap(results, own),
            )
            for method, name in settings
            if method != DENSE
        }
    )
    return (
        f"{title}\n\n"
        + "\n".join(f"- {line}" for line in lines)
        + f"\n\nGain of the zero-shot mean over the same method without a regularizer, in points:"
        f"\n\n{_cells(results, zero_shot)}\n\nGain of English:\n\n{_cells(results, english)}\n\n"
        f"How many points closer the zero-shot mean is to English:\n\n{_cells(results, closer)}"
    )


def _gap(results: Results, scores: Array) -> Array:
    gap: Array = scores[..., 0] - results.zero_shot(scores)
    return gap


def _third_claim(results: Results) -> str:
    title = "### 3. Languages suffer to different degrees"
    tests: dict[tuple[str, int], float] = {}
    for method in RECIPES:
        seeds = results.seeds((DENSE, "none"), (method, "none"))
        lost = [
            results.hits((DENSE, "none", seed)) - results.hits((method, "none", seed))
            for seed in seeds
        ]
        for stage in range(1, len(results.sparsities)):
            own, out_of = [run[stage, 1:] for run in lost], results.out_of[1:]
            drops = np.array([run.sum(axis=1) / out_of.sum(axis=1) for run in own])
            over_seeds = friedman(drops) if seeds else None
            if over_seeds is not None:
                over_sentences = sentence_test(np.mean(own, axis=0), out_of)
                tests[method, stage] = max(over_seeds, over_sentences)
    parts = [title]
    if tests:
        corrected = dict(zip(tests, holm(list(tests.values())), strict=True))
        verdict = _verdict(int(p < ALPHA) for p in corrected.values())
        parts.append(
            f"The claim **{verdict}**. The hypothesis tested is that all zero-shot languages drop "
            "by the same points. It is tested twice: over seeds (Friedman's test of the drops with "
            "each seed) and over sentences (a randomisation test of the variance of the mean "
            "drops, for which the signs of each sentence's differences between languages are drawn "
            f"{FLIPS:,} times). The larger of the two p-values counts. A test over seeds alone "
            "would not do: all seeds are scored on the same sentences, and what these happen to "
            "cost a language would look like a property of the language."
        )
        alike: dict[str, list[str]] = {}
        for (method, stage), p in corrected.items():
            if p >= ALPHA:
                alike.setdefault(method, []).append(f"{results.sparsities[stage]:.0%}")
        if alike:
            names = _listed(f"{_label(name)} ({_listed(at)})" for name, at in alike.items())
            parts.append(f"No difference between languages was shown with {names}.")
    else:
        parts.append(
            "Not tested yet: it takes three seeds of `dense` and a method, and three zero-shot "
            "languages."
        )
    for method in BASES:
        table = _language_table(results, method)
        if table:
            parts.append(
                f"Drop of each language with {_label(method)}, in points, and in brackets as the "
                f"share of what is above chance (where that is at least "
                f"{100 * LEAST_ABOVE_CHANCE:.0f} points):\n\n{table}"
            )
    return "\n\n".join(parts)


def _language_table(results: Results, method: str) -> str:
    settings = [(DENSE, "none"), (method, "none")]
    seeds = results.seeds(*settings)
    if not seeds:
        return ""
    dense = np.mean([results.point((DENSE, "none", seed)) for seed in seeds], axis=0)
    last = _stages(results)[-1]
    rows = [["language", f"dense, at {last}", *_stages(results)]]
    found = []
    for i, code in enumerate(results.languages):
        drops = results.compare(settings, lambda a, b, i=i: a[..., i] - b[..., i])
        assert drops is not None
        cells = []
        for stage in range(1, len(results.sparsities)):
            above = dense[stage, i] - results.chance[i]
            share = f" ({drops[stage].value / above:.0%})" if above >= LEAST_ABOVE_CHANCE else ""
            cells.append(f"{100 * drops[stage].value:.1f} ± {100 * drops[stage].half:.1f}{share}")
        found.append((drops[-1].value, [code, f"{100 * dense[-1, i]:.1f}", *cells]))
    english, *others = found
    rows += [english[1], *(row for _, row in sorted(others, key=lambda pair: -pair[0]))]
    return _markdown(rows)


def _methods(results: Results, base: str) -> str:
    title = f"### Methods against {_label(base)}"
    table = _gains(results, {method: base for method in RECIPES if method != base})
    if not table:
        return ""
    better = [s for s, cells in table.items() if any(cell.sign > 0 for cell in cells)]
    no_better = [s for s, cells in table.items() if cells[0].tested and s not in better]
    worse = [s for s, cells in table.items() if any(cell.sign < 0 for cell in cells)]
    text = (
        f"Not significantly better at any sparsity: {_named(no_better) or 'none'}. Significantly "
        f"worse at some: {_named(worse) or 'none'}."
    )
    if single := _named(s for s, cells in table.items() if not cells[0].tested):
        text += f" Has run with one seed, and is not tested: {single}."
    return (
        f"{title}\n\nGain of the zero-shot mean over {_label(base)}, without regularizers, in "
        f"points. {text}\n\n{_cells(results, table)}"
    )


def _calibration_texts(results: Results) -> str:
    title = "### Calibration text: many languages against English"
    table = _gains(results, CALIBRATIONS)
    if not table:
        return ""
    better, worse = (_significant(results, table, sign) or "none" for sign in (1, -1))
    return (
        f"{title}\n\nGain of the zero-shot mean over the same method with English text, without "
        f"regularizers, in points. Significantly better: {better}. Significantly worse: {worse}."
        f"\n\n{_cells(results, table)}"
    )


def _gains(results: Results, pairs: Mapping[str, str]) -> Table:
    """Gains in the zero-shot mean of methods (keys) over those they are compared with (values)."""
    return _corrected(
        {
            (method, "none"): results.compare(
                [(base, "none"), (method, "none")],
                lambda before, own: results.zero_shot(own) - results.zero_shot(before),
            )
            for method, base in pairs.items()
        }
    )


def _significant(results: Results, table: Table, sign: int) -> str:
    """The settings, with their sparsities, that are significantly better (1) or worse (-1)."""
    found = {
        _called(setting): [
            f"{sparsity:.0%}"
            for sparsity, cell in zip(results.sparsities[1:], cells, strict=True)
            if cell.sign == sign
        ]
        for setting, cells in table.items()
    }
    return _listed(f"{name} ({_listed(at)})" for name, at in found.items() if at)


def _signs(table: Table) -> list[int]:
    """The signs of all tested cells."""
    return [cell.sign for cells in table.values() for cell in cells if cell.tested]


def _cells(results: Results, table: Table) -> str:
    rows = [["method", "seeds", *_stages(results)]]
    for setting, cells in table.items():
        rows.append([_called(setting), str(cells[0].difference.seeds), *map(str, cells)])
    return _markdown(rows)


def _stages(results: Results, with_dense: bool = False) -> list[str]:
    return ["dense"] * with_dense + [f"{sparsity:.0%}" for sparsity in results.sparsities[1:]]


def _label(method: str) -> str:
    return method if method == DENSE else RECIPES[method].label


def _called(setting: tuple[str, str]) -> str:
    method, regularizer = setting
    return _label(method) + ("" if regularizer == "none" else f" + {regularizer}")


def _named(settings: Iterable[tuple[str, str]]) -> str:
    return "; ".join(map(_called, settings))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))
