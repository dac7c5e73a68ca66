"""Types of the commands' options, and the error for wrong input."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIXES = (".json", ".png", ".pdf", ".svg")


class InputError(Exception):
    """The user's input is wrong; the message is one line."""


@contextmanager
def input_errors() -> Iterator[None]:
    """Turns a ``ValueError`` of the library into an :class:`InputError`."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be an integer of at least 1, got {text}")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"should be an integer from 0 to below 2**64, got {text}")
    return int(text)


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"should be from 0 to below 1, got {text}")
    return value


def report_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"should end in {', '.join(SUFFIXES)}, got {text}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"should be a file, got the folder {text}")
    return path
