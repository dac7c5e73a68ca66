"""The examples run from a shell, on a tiny model and a few sentences in their file formats."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from test_cli import SENTENCES, make_bert

EXAMPLES = Path(__file__).parents[1] / "examples"


def launch(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refusal(
    script: str,
    *arguments: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What an example says of arguments that it ends at; without a process of its own."""
    monkeypatch.syspath_prepend(EXAMPLES)
    main = importlib.import_module(script.removesuffix(".py")).main
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == 2
    return capsys.readouterr().err


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
def test_regularize_finetuning(
    topics: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
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

    arguments += ["--languages", "yy"]
    said = refusal(script, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert "has no test.yy.tsv.gz" in said


def torchrun(*arguments: object) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    return [*map(str, command), "--master-port", str(port), *map(str, arguments)]


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in listed]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_fsdp_pruning_goes_on_when_a_rank_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = [EXAMPLES / "fsdp_pruning.py", "--steps", 24, "--every", 4, "--save-every", 4]
    ends = []
    for name, kills in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        command = torchrun("--max-restarts", int(kills), *script, "--out", folder)
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A rank that is not to die says where it did.
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        ) as process:
            try:
                last = kill_a_rank(process, folder / "checkpoints") if kills else "no checkpoint"
                output, errors = process.communicate(timeout=180)
            finally:
                process.terminate()
        assert process.returncode == 0, output + errors
        assert (f"resuming from {last}" in output) == kills, output + errors
        assert "with sparsity 0.7" in output
        for rank in range(2):
            assert f"rank {rank}: wrote step-00000024" in output
            assert f"rank {rank}: done" in output
        ends.append(folder)
    # The run that was killed ends bit for bit as the other one.
    whole, killed = (load_file(folder / "model" / "model.safetensors") for folder in ends)
    assert whole.keys() == killed.keys()
    for key, value in whole.items():
        assert torch.equal(value, killed[key]), key
    pruned = sum(int((value == 0).sum()) for key, value in whole.items() if "encoder" in key)
    assert pruned > 0.6 * sum(v.numel() for k, v in whole.items() if "encoder" in k)
    # So do its checkpoints, one of which was written over what the killed ones had left.
    for path in (ends[0] / "checkpoints").glob("step-*/*.distcp"):
        other = ends[1] / path.relative_to(ends[0])
        assert other.with_name(".metadata").exists()
        assert other.read_bytes() == path.read_bytes(), other

    monkeypatch.syspath_prepend(EXAMPLES)
    main = importlib.import_module("fsdp_pruning").main
    with pytest.raises(SystemExit):
        main([*map(str, script[1:]), "--seed", "1", "--out", str(ends[0])])
    message = f"seed should be 0, as in the run in --out {ends[0]}, got 1; another folder"
    assert message in capsys.readouterr().err


def kill_a_rank(process: subprocess.Popen[str], checkpoints: Path) -> str:
    """Kills a rank after the second checkpoint, as if while it wrote the next; returns the last."""
    deadline = time.monotonic() + 120
    while not (checkpoints / "step-00000008" / ".metadata").exists():
        assert process.poll() is None, "".join(process.communicate())
        assert time.monotonic() < deadline, f"only {sorted(checkpoints.glob('*'))} after 120 s"
        time.sleep(0.01)
    ranks = children(process.pid)
    assert ranks, "the ranks had ended before one of them could be killed"
    os.kill(ranks[-1], signal.SIGKILL)
    last = max(path.parent for path in checkpoints.glob("step-*/.metadata"))
    torn = checkpoints / f"step-{int(last.name.removeprefix('step-')) + 4:08}" / "__0_0.distcp"
    torn.parent.mkdir(exist_ok=True)
    torn.write_bytes((last / torn.name).read_bytes()[:-100])
    return last.name


@pytest.mark.slow
def test_trainer_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the same sums on every machine
    model, out = make_bert(tmp_path / "bert"), tmp_path / "out"
    arguments = ["--out", out, "--model", model, "--steps", 6, "--save-every", 2, "--batch", 8]
    first = launch("trainer_pruning.py", *arguments)
    assert first.returncode == 0, first.stderr
    assert "starting from the pretrained model" in first.stdout
    figures = json.loads(first.stdout.splitlines()[-1])
    assert figures["sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert 0 < figures["alignment"] < 1 and 0 <= figures["accuracy"] <= 1
    weights = load_file(out / "pruned" / "model.safetensors")
    assert not any(name.endswith("_mask") for name in weights)
    encoder = [w for name, w in weights.items() if "encoder.layer" in name and w.dim() == 2]
    zeros = sum(int((w == 0).sum()) for w in encoder)
    assert zeros >= 0.69 * sum(w.numel() for w in encoder)
    assert AutoModelForSequenceClassification.from_pretrained(out / "pruned").config.id2label == {
        0: "food",
        1: "weather",
    }

    said = refusal("trainer_pruning.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert "without checkpoints unless --resume is" in said

    def resume(message: str) -> None:
        again = launch("trainer_pruning.py", *arguments, "--resume")
        assert again.returncode == 0, again.stderr
        assert message in again.stdout
        assert json.loads(again.stdout.splitlines()[-1]) == figures
        resumed = load_file(out / "pruned" / "model.safetensors")
        assert all(torch.equal(resumed[name], w) for name, w in weights.items())

    # The run was killed while it saved its last checkpoint, and goes on from the one before.
    (out / "checkpoint-6" / "trainer_state.json").unlink()
    resume(f"resuming from {out / 'checkpoint-4'}")
    # It was killed after its last checkpoint.
    shutil.rmtree(out / "pruned")
    resume(f"training had finished in {out / 'checkpoint-6'}")


@pytest.mark.slow
def test_trainer_pruning_reads_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = make_bert(tmp_path / "bert")
    rows = [f'"{SENTENCES[i % len(SENTENCES)]}",{("no", "yes")[i % 2]}' for i in range(20)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
    arguments = ["--out", tmp_path / "out", "--model", model, "--steps", 2, "--strength", 0]
    process = launch("trainer_pruning.py", *arguments, "--data", tmp_path / "data.csv")
    assert process.returncode == 0, process.stderr
    assert "penalty_share" not in process.stdout and "'pruning/sparsity'" in process.stdout
    (tmp_path / "other.csv").write_text("text\nhello\n")
    arguments += ["--out", tmp_path / "out2"]
    process = launch("trainer_pruning.py", *arguments, "--data", tmp_path / "other.csv")
    assert process.returncode == 1
    assert "other.csv has no column label" in process.stderr
