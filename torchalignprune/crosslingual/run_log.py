"""Results as JSON lines, in a file that stays readable if the process is killed at any moment."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["RunLog"]


class RunLog:
    """An append-only file of JSON objects, one per line.

    A line is written and synchronized at once. If a process is killed while it writes a line, the
    fragment is skipped, and the next line begins on a new one. Several processes may append to the
    same file.

    Args:
        path: the file; :meth:`prepare` or the first line makes it and its folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = RunLog(Path(folder) / "runs.jsonl")
        ...     log.append({"seed": 0})
        ...     _ = log.path.write_text(log.path.read_text() + '{"see')
        ...     log.append({"seed": 1})
        ...     log.lines()
        [{'seed': 0}, {'seed': 1}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def lines(self) -> list[dict[str, Any]]:
        """All complete objects, in their order."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_bytes().split(b"\n"):
            try:
                value = json.loads(line)
            except ValueError:  # of JSON or of UTF-8
                continue
            if isinstance(value, dict):
                found.append(value)
        return found

    def prepare(self) -> None:
        """Makes the file, so that a path that cannot be written to fails before the work begins.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.open("ab").close()

    def append(self, line: Mapping[str, Any]) -> None:
        """Appends a line."""
        text = json.dumps(line, allow_nan=False).encode() + b"\n"
        self.prepare()
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    text = b"\n" + text
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
