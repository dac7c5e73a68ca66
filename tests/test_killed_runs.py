"""Runs that are killed at random moments, again and again, and end as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("killed_run.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks"),
]


@pytest.mark.parametrize(("kind", "kills"), [("aligned", 25), ("movement", 25), ("trainer", 16)])
def test_killed_runs_end_like_the_one_that_was_not(kind: str, kills: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), kind, "1", str(kills)],
        # Forks of a process whose threads are running would hang.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1].removeprefix("killed ")) >= 10
    whole, ends = (
        torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "killed")
    )
    weights = [w for name, w in whole.items() if w.dim() == 2 and "embeddings" not in name]
    weights = [w for w in weights if bool((w == 0).any())]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros == round(0.8 * sum(w.numel() for w in weights))
    assert ends.keys() == whole.keys()
    assert all(torch.equal(ends[name], whole[name]) for name in whole)
