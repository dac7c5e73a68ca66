"""The examples run from a shell, on a tiny model and a few sentences in their file formats."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from test_cli import SENTENCES, make_bert

EXAMPLES = Path(__file__).parents[1] / "examples"


def launch(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """A few rows in the format of SIB-200's files."""
    folder = tmp_path / "data" / "sib200"
    folder.mkdir(parents=True)
    rows = [
        f"{i}\t{('sports', 'travel')[i % 2]}\t{SENTENCES[i % len(SENTENCES)]}\n" for i in range(12)
    ]
    for split in ("train", "dev", "test"):
        for language in ("en", "xx"):
            with gzip.open(folder / f"{split}.{language}.tsv.gz", "wt", encoding="utf-8") as file:
                file.writelines(rows)
    return folder.parent


@pytest.mark.slow
def test_regularize_finetuning(topics: Path, tmp_path: Path) -> None:
    arguments = ["--data", topics, "--model", make_bert(tmp_path / "bert"), "--out", tmp_path / "o"]
    arguments += ["--seeds", 1, "--batch", 2, "--epochs", 4]
    script = "regularize_finetuning.py"
    first = launch(script, *arguments, "--variants", "dense", "cosine")
    assert first.returncode == 0, first.stderr
    process = launch(script, *arguments)
    assert process.returncode == 0, process.stderr
    runs = [json.loads(line) for line in (tmp_path / "o" / "runs.jsonl").read_text().splitlines()]
    # What had been run before was not run again.
    assert [run["variant"] for run in runs] == ["dense", "cosine", "none", "frobenius"]
    for run in runs:
        assert run["sparsity"] == pytest.approx(0.0 if run["variant"] == "dense" else 0.7, abs=1e-3)
        assert (run["strength"] > 0) == (run["variant"] in ("cosine", "frobenius"))
        assert set(run["languages"]) == {"en", "xx"}
        assert 0 <= run["english"] <= 1
    assert "difference from none, by seed" in process.stdout

    process = launch(script, *arguments, "--languages", "yy")
    assert process.returncode == 2
    assert "has no test.yy.tsv.gz" in process.stderr
