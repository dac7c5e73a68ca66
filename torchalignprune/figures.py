"""Figures of what pruning did to every layer, and of how methods compare."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_comparison", "draw_report", "require_matplotlib"]

_ROWS, _COLUMNS = 24, 64  # the largest grid; more layers are drawn as a list


def require_matplotlib() -> None:
    """Checks that figures can be drawn, before the work whose results they show.

    Raises:
        ImportError: matplotlib is not installed.
    """
    logger = logging.getLogger("matplotlib")
    level = logger.level
    try:
        # The very first import would log that it builds the font cache.
        logger.setLevel(logging.ERROR)
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib: pip install "torchalignprune[transformers]"'
        ) from error
    finally:
        logger.setLevel(level)


def draw_report(layers: Sequence[Mapping[str, Any]], alignments: Sequence[Any], title: str) -> Any:
    """Draws the mean unit alignment and the sparsity of each layer, and the units' distribution.

    Numbered layers, as in a transformer, make a grid with the depth on x and a row for each kind of
    module. Any others are listed one below the other.

    Args:
        layers: a :class:`torchalignprune.AlignmentReport`.
        alignments: arrays with the alignments of the units.
        title: the title of the figure, one line.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels = {
        "mean unit alignment": [layer["mean_alignment"] for layer in layers],
        "sparsity": [layer["sparsity"] for layer in layers],
    }
    cells = _grid([layer["name"] for layer in layers])
    spread = 2.2  # inches
    if cells:
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = sorted({column for _, column in cells})
        width = max(3.5 + 0.5 * min(len(columns), 30), 7.0)
        height = 1.1 + 0.35 * len(rows)
        figure = Figure(figsize=(width, 2 * height + spread), layout="constrained")
        *above, below = figure.subplots(3, 1, height_ratios=[height, height, spread])
        for axes, (label, values) in zip(above, panels.items(), strict=True):
            _draw_grid(figure, axes, label, values, cells, rows, columns)
    else:
        height = 1.6 + min(0.2 * len(layers), 40)
        figure = Figure(figsize=(10, height + spread), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=[height, spread])
        left = figure.add_subplot(grid[0, 0])
        right = figure.add_subplot(grid[0, 1], sharey=left)
        right.tick_params(labelleft=False)
        below = figure.add_subplot(grid[1, :])
        for axes, (label, values) in zip((left, right), panels.items(), strict=True):
            _draw_list(axes, label, values, [_plain(layer["name"]) for layer in layers])
    _draw_spread(below, alignments)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_comparison(
    curves: Mapping[str, Mapping[float, tuple[float, float, float]]],
    dashed: set[str],
    ylabel: str,
    title: str,
    path: Path,
) -> None:
    """Draws a metric against sparsity, with a line for each method, and saves it as a PNG.

    Args:
        curves: for each method ``{sparsity: (value, lower, upper)}``; the last two are the bounds
            of an interval.
        dashed: the methods to draw with dashed lines.
        ylabel: the name of the metric.
        title: the title of the figure.
        path: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots()
    colors = [*colormaps["tab10"].colors, "black", "gold", "navy", "lime"]  # type: ignore[attr-defined]
    markers = "osD^v<>PX*"
    # The legend lists the methods in the order of their last values, as the lines end.
    order = sorted(curves, key=lambda method: -curves[method][max(curves[method])][0])
    styles = {
        method: (colors[i % len(colors)], markers[i % len(markers)])
        for i, method in enumerate(curves)
    }
    for method in order:
        points = sorted(curves[method].items())
        color, marker = styles[method]
        x = [100 * sparsity for sparsity, _ in points]
        axes.plot(
            x,
            [value for _, (value, _, _) in points],
            "--" if method in dashed else "-",
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1.6,
            label=method,
        )
        axes.fill_between(
            x,
            [lower for _, (_, lower, _) in points],
            [upper for _, (_, _, upper) in points],
            color=color,
            alpha=0.1,
            linewidth=0,
        )
    axes.set_xlabel("sparsity of the encoder's weight matrices (%)")
    axes.set_xticks(sorted({100 * sparsity for curve in curves.values() for sparsity in curve}))
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=11)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3)
    figure.savefig(path, dpi=150)


def _plain(name: str) -> str:
    return name.removesuffix(".weight")


def _grid(names: Sequence[str]) -> list[tuple[str, int]] | None:
    """A row and a column for each layer, or None if they do not make a good grid.

    The first number in a name is the depth, and what follows it is the kind of module. The part
    before the number is added to the kind if it is not the same for all. Layers without a number
    have depth -1.
    """
    split = []
    for name in map(_plain, names):
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            split.append(("", name, -1))
        else:
            split.append((".".join(parts[:at]), ".".join(parts[at + 1 :]), int(parts[at])))
    stems = {stem for stem, _, depth in split if depth >= 0}
    cells = [
        (kind if len(stems) == 1 or depth < 0 else f"{stem}: {kind}".removesuffix(": "), depth)
        for stem, kind, depth in split
    ]
    cells = [(row or "weight", column) for row, column in cells]
    rows, columns = len({row for row, _ in cells}), len({column for _, column in cells})
    fits = rows <= _ROWS and 1 < columns <= _COLUMNS and len(set(cells)) == len(cells)
    return cells if fits and 2 * len(cells) >= rows * columns else None


def _draw_grid(
    figure: Any,
    axes: Any,
    label: str,
    values: Sequence[float | None],
    cells: Sequence[tuple[str, int]],
    rows: list[str],
    columns: list[int],
) -> None:
    matrix = [[math.nan] * len(columns) for _ in rows]
    for (row, column), value in zip(cells, values, strict=True):
        matrix[rows.index(row)][columns.index(column)] = math.nan if value is None else value
    low, high, decimals = _scale(label, values)
    image = axes.imshow(
        matrix, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(columns)), ["none" if depth < 0 else depth for depth in columns])
    if len(columns) > 30:
        axes.set_xticks(range(0, len(columns), 4), [str(depth) for depth in columns[::4]])
    axes.set_xlabel("layer")
    axes.set_title(label, fontsize=10)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    if len(columns) > 30:
        return
    for y, line in enumerate(matrix):
        for x, value in enumerate(line):
            if not math.isnan(value):
                dark = (value - low) / (high - low) < 0.6
                axes.text(
                    x,
                    y,
                    f"{value:.{decimals}f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )


def _draw_list(axes: Any, label: str, values: Sequence[float | None], names: Sequence[str]) -> None:
    low, high, _ = _scale(label, values)
    shown = [math.nan if value is None else value for value in values]
    axes.plot(shown, range(len(names)), "o-", color="tab:blue", markersize=4, linewidth=0.6)
    axes.set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    step = math.ceil(len(names) / 200)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(label, fontsize=10)


def _draw_spread(axes: Any, alignments: Sequence[Any]) -> None:
    every = np.concatenate([np.zeros(0), *alignments])
    axes.set_title("alignment of the units", fontsize=10)
    axes.set_xlabel("cosine between a unit's pruned and its reference weights")
    axes.set_ylabel("units")
    if not every.size:
        return
    low = min(math.floor(10 * every.min()) / 10, 0.9)
    axes.hist(every, bins=100, range=(low, 1.0), color="tab:blue", log=True)
    axes.set_xlim(low, 1.0)
    median, p5 = np.quantile(every, [0.5, 0.05])
    marks = {"mean": (every.mean(), "-"), "median": (median, "--"), "5th percentile": (p5, ":")}
    for label, (value, style) in marks.items():
        axes.axvline(
            value, color="black", linestyle=style, linewidth=1, label=f"{label} {value:.3f}"
        )
    axes.legend(fontsize=8, loc="best")
    axes.grid(axis="y", alpha=0.3)


def _scale(label: str, values: Sequence[float | None]) -> tuple[float, float, int]:
    """Bounds of the values, and how many decimals to show."""
    present = [value for value in values if value is not None] or [0.0]
    decimals = 3 if max(present) - min(present) < 0.05 else 2
    if label == "sparsity":
        return 0.0, 1.0, decimals
    # Alignments are close to 1, so the lower bound is the worst one rounded down, at most 0.9.
    return min(math.floor(10 * min(present)) / 10, 0.9), 1.0, decimals
