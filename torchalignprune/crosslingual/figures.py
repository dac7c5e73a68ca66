"""Figures of scores and drops by language, sparsity, script and share of pretraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchalignprune.crosslingual.languages import CC100_GIB, LANGUAGES
from torchalignprune.figures import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torchalignprune.crosslingual.report import Comparison, Estimate, ZeroShotReport

__all__ = [
    "draw_drops",
    "draw_heat_map",
    "draw_retention",
    "draw_scores",
    "plot_heat_map",
    "plot_retention",
    "saved",
]


def plot_heat_map(
    sweep: Mapping[float, ZeroShotReport],
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draws what each language loses at each sparsity, as a heat map.

    A cell is the drop against the dense model in points, red for a loss and blue for a gain. The
    training language is on top; the others follow by their drop at the highest sparsity.

    Args:
        sweep: a report for each sparsity, from 0 (the dense model, required) to 1.
        path: the file to write, if any; its suffix sets the format: ``.png``, ``.pdf``, ...
        title: of the figure.

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: sparsity 0 is missing, or the only one; the reports cannot be compared, as in
            :meth:`ZeroShotReport.compare`.
        ImportError: matplotlib is not installed.
    """
    return saved(draw_heat_map(sweep, title), path)


def plot_retention(
    sweeps: Mapping[str, Mapping[float, ZeroShotReport]],
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draws the share of the dense model's score that is left at each sparsity.

    Each method has a solid line for the mean over the zero-shot languages and a dashed line for
    the training language, both with paired bootstrap intervals.

    Args:
        sweeps: for each method, a report for each sparsity, as :func:`plot_heat_map` takes them.
        path: the file to write, if any; its suffix sets the format.
        title: of the figure.

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: as :func:`plot_heat_map`.
        ImportError: matplotlib is not installed.
    """
    return saved(draw_retention(sweeps, title), path)


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """Writes a figure, if there is a path."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def draw_scores(report: ZeroShotReport, title: str) -> Figure:
    """:meth:`ZeroShotReport.plot`."""
    require_matplotlib()
    from matplotlib.figure import Figure

    languages = sorted(report.languages, key=lambda language: report.scores[language].value)
    figure = Figure(figsize=(7, 1.4 + 0.25 * len(languages)), layout="constrained")
    axes = figure.subplots()
    _draw_rows(axes, languages, report.scores, report.supervised)
    if report.zero_shot_mean is not None:
        axes.axvline(100 * report.zero_shot_mean.value, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel(f"{report.metric.replace('_', ' ')} (%), dotted: zero-shot mean")
    axes.set_title(title, fontsize=10)
    return figure


def draw_heat_map(sweep: Mapping[float, ZeroShotReport], title: str | None) -> Figure:
    """:func:`plot_heat_map`, without writing."""
    require_matplotlib()
    from matplotlib.figure import Figure

    drops = {
        sparsity: {language: drop.value for language, drop in comparison.drops.items()}
        for sparsity, comparison in _comparisons(sweep).items()
    }
    dense, sparsities = sweep[0], sorted(drops)
    last = drops[sparsities[-1]]
    languages = [dense.supervised] if dense.supervised is not None else []
    languages += sorted(dense.zero_shot, key=lambda language: -last[language])
    matrix = [
        [100 * drops[sparsity][language] for sparsity in sparsities] for language in languages
    ]
    top = max(1.0, *(abs(value) for line in matrix for value in line))
    size = (2.4 + 0.7 * len(sparsities), 1.4 + 0.26 * len(languages))
    figure = Figure(figsize=(max(size[0], 5), size[1]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    for y, line in enumerate(matrix):
        for x, value in enumerate(line):
            color = "white" if abs(value) > 0.6 * top else "black"
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(sparsities)), [f"{sparsity:.0%}" for sparsity in sparsities])
    names = [f"{name} (supervised)" if name == dense.supervised else name for name in languages]
    axes.set_yticks(range(len(languages)), names, fontsize=8)
    axes.set_xlabel("sparsity")
    axes.set_title(title or f"{dense.task} ({dense.split})", fontsize=10)
    figure.colorbar(image, ax=axes, label="drop against the dense model (points)")
    return figure


def draw_retention(
    sweeps: Mapping[str, Mapping[float, ZeroShotReport]], title: str | None
) -> Figure:
    """:func:`plot_retention`, without writing."""
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not sweeps:
        raise ValueError("sweeps should have at least one method")
    found = {method: _comparisons(sweep) for method, sweep in sweeps.items()}
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, (method, comparisons) in enumerate(found.items()):
        x = [0.0, *[100 * sparsity for sparsity in sorted(comparisons)]]
        ordered = [comparisons[sparsity] for sparsity in sorted(comparisons)]
        color = colors[i % len(colors)]
        kinds: list[tuple[str, str, list[Estimate | None]]] = [
            ("zero-shot mean", "-", [each.relative_zero_shot_drop for each in ordered]),
            ("supervised", "--", [each.relative_supervised_drop for each in ordered]),
        ]
        for kind, style, drops in kinds:
            lost = [drop for drop in drops if drop is not None]
            if not lost:
                continue
            left = [100.0, *[100 * (1 - drop.value) for drop in lost]]
            label = f"{method}, {kind}"
            axes.plot(x, left, style, color=color, marker="o", markersize=4, label=label)
            low = [100.0, *[100 * (1 - drop.high) for drop in lost]]
            high = [100.0, *[100 * (1 - drop.low) for drop in lost]]
            axes.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)
    axes.set_xlabel("sparsity (%)")
    axes.set_ylabel("share of the dense model's score (%)")
    axes.grid(alpha=0.3)
    first = next(iter(sweeps.values()))[0]
    axes.set_title(title or f"{first.task} ({first.split})", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def draw_drops(
    comparison: Comparison,
    title: str,
    shares: Mapping[str, float] | None,
    shares_label: str | None,
) -> Figure:
    """:meth:`Comparison.plot`."""
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    shares = {} if shares is None else shares
    if shares is CC100_GIB and not shares_label:
        shares_label = "text in XLM-R's pretraining, CC-100 (GiB)"
    if shares and not shares_label:
        raise ValueError("shares_label should say what the shares are")
    if any(not share > 0 for share in shares.values()):
        raise ValueError("shares should be above 0")
    drops, supervised = comparison.drops, comparison.pruned.supervised
    languages = sorted(drops, key=lambda language: drops[language].value)
    known = [language for language in languages if language in shares]
    height = max(3.6, 1.4 + 0.25 * len(languages))
    figure = Figure(figsize=(11 if known else 6, height), layout="constrained")
    left, *right = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    colors = _script_colors(languages)
    _draw_rows(left, languages, drops, supervised, colors)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("drop against the dense model (points)")
    for script in dict.fromkeys(map(_script, languages)):
        left.plot([], [], "o", color=colors[script], label=script)
    left.legend(fontsize=7, loc="best", title="script", title_fontsize=7)
    for axes in right:
        for language in known:
            drop = drops[language]
            color = colors[_script(language)]
            axes.plot(shares[language], 100 * drop.value, "o", color=color, markersize=5)
            bounds = [100 * drop.low, 100 * drop.high]
            axes.plot([shares[language]] * 2, bounds, color=color, linewidth=0.8, alpha=0.6)
            label = f"{language}*" if language == supervised else language
            axes.annotate(
                label,
                (shares[language], 100 * drop.value),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1)
        axes.set_xlabel(shares_label)
        axes.set_ylabel("drop (points)")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    return figure


def _comparisons(sweep: Mapping[float, ZeroShotReport]) -> dict[float, Comparison]:
    if 0 not in sweep:
        raise ValueError("a sweep should have the dense model's report at sparsity 0")
    pruned = {sparsity: report for sparsity, report in sweep.items() if sparsity != 0}
    if not pruned:
        raise ValueError("a sweep should have a report of a pruned model too")
    for sparsity in pruned:
        if not 0 < sparsity <= 1:
            raise ValueError(f"sparsities should be from 0 to 1, got {sparsity}")
    return {sparsity: report.compare(sweep[0]) for sparsity, report in pruned.items()}


def _script(language: str) -> str:
    known = LANGUAGES.get(language) or LANGUAGES.get(language.split("_")[0])
    return known.script if known is not None else "other"


def _script_colors(languages: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    scripts = sorted(set(map(_script, languages)))
    colors = colormaps["tab10" if len(scripts) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    return {script: colors[i % len(colors)] for i, script in enumerate(scripts)}


def _draw_rows(
    axes: Any,
    languages: Sequence[str],
    estimates: Mapping[str, Estimate],
    supervised: str | None,
    colors: Mapping[str, Any] | None = None,
) -> None:
    for y, language in enumerate(languages):
        estimate = estimates[language]
        color = "tab:blue" if colors is None else colors[_script(language)]
        axes.plot([100 * estimate.low, 100 * estimate.high], [y, y], color=color, linewidth=1.5)
        axes.plot(100 * estimate.value, y, "o", color=color, markersize=5)
    names = [f"{name} (supervised)" if name == supervised else name for name in languages]
    axes.set_yticks(range(len(languages)), names, fontsize=8)
    axes.set_ylim(-0.7, len(languages) - 0.3)
    axes.grid(axis="x", alpha=0.3)
