"""What the commands print, and the files that they write."""

from __future__ import annotations

import json
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import torchalignprune
from torchalignprune.alignment_report import AlignmentReport
from torchalignprune.figures import require_matplotlib
from torchalignprune.weight_files import flush

if TYPE_CHECKING:
    from torchalignprune.crosslingual import Comparison, ZeroShotReport


@contextmanager
def writable(folders: Iterable[Path]) -> Iterator[None]:
    """Makes folders, and checks before the work begins that they can be written to.

    When the block fails, the folders that were made are removed.
    """
    made: list[Path] = []
    try:
        for folder in folders:
            try:
                for path in [*reversed(folder.parents), folder]:
                    if not path.exists():
                        path.mkdir()
                        made.append(path)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                reason = error.strerror or error
                raise OSError(f"--out: {folder} cannot be written to: {reason}") from error
        yield
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):  # something else is in it by now
                path.rmdir()
        raise


@contextmanager
def writable_files(files: Sequence[Path]) -> Iterator[None]:
    """:func:`writable` for the folders of files; checks for matplotlib if some are pictures."""
    if any(file.suffix != ".json" for file in files):
        require_matplotlib()
    with writable(file.resolve().parent for file in files):
        yield


@contextmanager
def _new_files(files: Iterable[Path]) -> Iterator[list[Path]]:
    """Yields temporary files, which replace ``files`` when the block ends without an error."""
    files = list(files)
    places = [file.resolve() for file in files]
    partials = [
        # The format is that of the given name, even if it is a link to a name with another suffix.
        place.with_name(f".{secrets.token_hex(4)}.partial{file.suffix}")
        for file, place in zip(files, places, strict=True)
    ]
    try:
        for place in places:  # another run may have made the folder, failed, and removed it
            place.parent.mkdir(parents=True, exist_ok=True)
        yield partials
        for partial, place in zip(partials, places, strict=True):
            flush(partial)
            if place.exists():
                shutil.copymode(place, partial)
        for partial, place in zip(partials, places, strict=True):
            partial.replace(place)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def write_files(files: Iterable[Path], value: Any, plot: Callable[[Path], object]) -> None:
    """Writes all files or none: ``value`` into those that end in .json, ``plot`` into the rest."""
    with _new_files(files) as partials:
        for partial in partials:
            if partial.suffix == ".json":
                write_json(partial, value)
            else:
                plot(partial)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def print_written(files: Sequence[Path]) -> None:
    if files:
        print(f"written: {', '.join(map(str, files))}")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def print_report(report: AlignmentReport | ZeroShotReport | Comparison) -> None:
    if sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            Console().print(report)
            return
    print(report)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table()
            for column in header:
                table.add_column(column, justify="left" if column == "method" else "right")
            for i, row in enumerate(rows):
                last = i + 1 == len(rows) or rows[i + 1][0] != row[0]
                table.add_row(*row, end_section=last)
            Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for i, row in enumerate([header, *rows]):
        if i > 1 and row[0] != rows[i - 2][0]:
            print()
        cells = [
            cell.ljust(width) if column == "method" else cell.rjust(width)
            for cell, width, column in zip(row, widths, header, strict=True)
        ]
        print("  ".join(cells))


def three_decimals(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def versions() -> dict[str, str]:
    import transformers

    return {
        "torchalignprune": torchalignprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def progress_bar(*args: Any, **options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(*args, **options)
