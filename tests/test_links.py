"""The links of the pages lead somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def pages() -> list[str]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "*.md"], cwd=TOP, capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        listed = []
    return listed or ["README.md"]


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", pages())
def test_links(page: str) -> None:
    path = TOP / page
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_anchors() -> None:
    assert anchors("# One `A`: b, c-d\ntext\n### 1. And_so\n") == {"one-a-b-c-d", "1-and_so"}
