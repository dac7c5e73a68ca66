"""The command line: ``torchalignprune prune``, ``report``, ``evaluate``, ``demo`` and ``info``."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torchalignprune
from torchalignprune.cli import demo, evaluate, info, prune, report
from torchalignprune.cli.options import InputError

__all__ = ["main"]

_CODES = """\
exit codes:
  0    done
  1    failure: the target of --out is unchanged, or complete if only printing failed
  2    wrong usage or input: nothing was written
  130  interrupted (143: terminated): the target of --out is unchanged or complete
"""


class _Terminated(BaseException):
    """Raised on SIGTERM, so that the command cleans up before it exits."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments without the program's name. Default: ``sys.argv[1:]``.

    Returns:
        The exit code: 0 done, 1 failure, 2 wrong usage or input, 130 and 143 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        _drop_output()
        return stop.code if isinstance(stop.code, int) else 2
    options.command_line = shlex.join(["torchalignprune", *arguments])
    prefix = f"torchalignprune {options.command}: error:"
    try:
        with _sigterm_raises(), _hidden_library_warnings():
            options.run(options)
            print(end="", flush=True)  # raises here if the output cannot be written
    except InputError as error:
        print(prefix, error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        pass  # the reader of the output has closed it; the work is done
    except (OSError, ImportError, MemoryError) as error:
        print(prefix, str(error) or "out of memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"torchalignprune {options.command}: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"torchalignprune {options.command}: terminated", file=sys.stderr)
        return 143
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        _drop_output()
    return 0


def _drop_output() -> None:
    """Discards output that cannot be written: Python would retry at exit, and exit with 120."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchalignprune",
        description="Prune pretrained models so that their units stay aligned.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"torchalignprune {torchalignprune.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared: dict[str, Any] = {
        "epilog": _CODES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    for command in (prune, report, evaluate, demo, info):
        command.add_parser(commands, **shared)
    return parser


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    try:
        former = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # only the main thread may set a handler
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def _hidden_library_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)(\.|$)")
        yield
