"""``torchalignprune info``: versions and build."""

from __future__ import annotations

import argparse
from typing import Any

from torchalignprune.cli.output import print_json


def add_parser(commands: Any, **shared: Any) -> None:
    """Adds the command to those of the command line."""
    parser = commands.add_parser(
        "info",
        help="print versions and build flags",
        description="Print versions and build flags.",
        **shared,
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from torchalignprune import build_info

    if options.json:
        print_json(build_info.info())
    else:
        print(build_info.render())
