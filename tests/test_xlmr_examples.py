"""The examples with XLM-R and mBERT run from a shell, on random models and files as of the hub."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from hub_files import SPLITS, write_model, write_pairs, write_tags
from test_examples import EXAMPLES, launch, torchrun
from torchalignprune import prunable_parameters
from torchalignprune.crosslingual import TASKS, ZeroShotReport, evaluate_zero_shot

SMALL = ["--use_cpu", "--max_length", 32, "--per_device_train_batch_size", 8, "--disable_tqdm"]
SMALL += ["true", "--learning_rate", 2e-3]
STEPS = SPLITS["train"] // 8  # of an epoch


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    found: list[dict[str, Any]] = state["log_history"]
    return found


def share_of_zeros(model: torch.nn.Module) -> float:
    weights = [getattr(*pair) for pair in prunable_parameters(model)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.slow
def test_xnli_xlmr_goes_on_after_it_was_killed(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data", "xnli", ("en", "de", "sw"))
    model = write_model(tmp_path / "xlmr", "XLMRoberta")
    arguments = ["--data", data, "--model", model, *SMALL, "--num_train_epochs", 10]
    arguments += ["--save_steps", 4, "--sparsity", 0.6, "--rounds", 4]
    whole = tmp_path / "whole"
    process = launch("xnli_xlmr.py", *arguments, "--output_dir", whole)
    assert process.returncode == 0, process.stderr
    assert f"starting from {model}" in process.stdout
    report = report_of(whole)
    assert list(report["languages"]) == ["en", "de", "sw"] and report["parallel"]
    assert report["supervised_score"]["value"] > 0.6  # by chance it is a third
    assert report["weights"]["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert (whole / "report.png").stat().st_size > 0 and not (whole / "drops.png").exists()
    # The model in the folder is the one that was evaluated.
    pruned = AutoModelForSequenceClassification.from_pretrained(whole / "model")
    assert share_of_zeros(pruned) == pytest.approx(0.6, abs=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    again = evaluate_zero_shot(pruned, tokenizer, "xnli", ["en", "de", "sw"], data=data)
    assert {key: report[key] for key in again.to_dict()} == again.to_dict()
    # Four rounds of a cubic schedule in the middle of the training; the penalty is in the loss.
    logs = history(whole)
    sparsities = [row["pruning/target_sparsity"] for row in logs]
    rounds = [0.6 * (1 - (1 - i / 4) ** 3) for i in range(5)]
    assert sorted(set(sparsities)) == pytest.approx(rounds, abs=0.02)
    strengths = [row["penalty_strength"] for row in logs if "penalty_strength" in row]
    assert strengths[0] == 0 and len(set(strengths)) > 10 and all(map(math.isfinite, strengths))

    killed = tmp_path / "killed"
    command = [sys.executable, EXAMPLES / "xnli_xlmr.py", *arguments, "--output_dir", killed]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as running:
        deadline = time.monotonic() + 300
        while not (killed / "checkpoint-24").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(running.pid, signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL and not (killed / "model").exists()
    process = launch("xnli_xlmr.py", *arguments, "--output_dir", killed)
    assert process.returncode == 0, process.stderr
    assert f"resuming from {killed / 'checkpoint-'}" in process.stdout
    assert [row.get("penalty_strength") for row in history(killed)] == [
        row.get("penalty_strength") for row in logs
    ]
    wanted = load_file(whole / "model" / "model.safetensors")
    found = load_file(killed / "model" / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], w) for name, w in wanted.items())
    assert report_of(killed)["languages"] == report["languages"]

    # A run that is done is evaluated again, here against its twin.
    arguments += ["--languages", "sw", "--compare", whole / "model"]
    process = launch("xnli_xlmr.py", *arguments, "--output_dir", killed)
    assert process.returncode == 0, process.stderr
    assert list(report_of(killed)["languages"]) == ["en", "sw"]
    assert report_of(killed)["comparison"]["zero_shot_drop"]["value"] == 0
    assert (killed / "drops.png").stat().st_size > 0


@pytest.mark.slow
def test_pawsx_mbert_against_the_dense_model(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data", "pawsx", ("en", "de", "ko"))
    model = write_model(tmp_path / "mbert", "Bert")
    arguments = ["--data", data, "--model", model, *SMALL, "--num_train_epochs", 8]
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    baseline = ["--output_dir", dense, "--sparsity", 0, "--regularizer", "none"]
    process = launch("pawsx_mbert.py", *arguments, *baseline)
    assert process.returncode == 0, process.stderr
    assert "penalty_loss" not in process.stdout
    assert report_of(dense)["weights"]["sparsity"] == 0
    assert report_of(dense)["supervised_score"]["value"] > 0.7  # by chance it is a half
    options = ["--sparsity", 0.9, "--method", "aligned-inputs-en", "--budget", "layer"]
    options += ["--regularizer", "both", "--strength", 3, "--compare", dense / "report.json"]
    process = launch("pawsx_mbert.py", *arguments, "--output_dir", pruned, *options)
    assert process.returncode == 0, process.stderr
    report = report_of(pruned)
    first, second = (
        ZeroShotReport.from_json((folder / "report.json").read_text()) for folder in (dense, pruned)
    )
    assert report["comparison"] == second.compare(first).to_dict()
    assert "excess over supervised" in process.stdout
    assert (pruned / "drops.png").stat().st_size > 0
    assert {row["penalty_strength"] for row in history(pruned) if "penalty_strength" in row} == {3}
    # The method has no reference; what is logged has.
    alignments = [row["pruning/alignment"] for row in history(pruned) if "loss" in row]
    assert alignments[0] > 0.99 and 0 < alignments[-1] < alignments[0]
    found = AutoModelForSequenceClassification.from_pretrained(pruned / "model")
    assert found.config.id2label == {0: "0", 1: "1"}
    for module, name in prunable_parameters(found):
        weight = getattr(module, name)
        assert int((weight == 0).sum()) == pytest.approx(0.9 * weight.numel(), abs=1)


@pytest.mark.slow
def test_pos_xlmr_on_two_processes(tmp_path: Path) -> None:
    data = write_tags(tmp_path / "data", ("en", "ar", "vi"))
    model = write_model(tmp_path / "xlmr", "XLMRoberta")
    arguments = ["--data", data, "--model", model, *SMALL, "--num_train_epochs", 10]
    out = tmp_path / "out"
    arguments += ["--output_dir", out, "--regularizer", "frobenius", "--save_steps", 10]
    arguments += ["--method", "taylor"]
    command = torchrun(EXAMPLES / "pos_xlmr.py", *arguments, "--ddp_backend", "gloo")
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("starting from") == process.stdout.count("zero-shot mean") == 1
    report = report_of(out)
    assert list(report["languages"]) == ["en", "ar", "vi"]
    assert report["supervised_score"]["value"] > 0.5  # of the most frequent tag it is a third
    assert report["weights"]["sparsity"] == pytest.approx(0.7, abs=1e-3)
    # Half as many steps as one process would take, and both processes save their generators.
    assert json.loads((out / "settings.json").read_text())["max_steps"] == STEPS // 2 * 10
    assert (out / f"checkpoint-{STEPS // 2 * 10}" / "rng_state_1.pth").exists()
    found = AutoModelForTokenClassification.from_pretrained(out / "model")
    assert found.config.id2label == dict(enumerate(TASKS["pos"].labels))
    assert share_of_zeros(found) == pytest.approx(0.7, abs=1e-3)


def test_the_model_that_is_evaluated_is_the_one_in_the_folder(
    xnli: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after training in bfloat16, after which the model keeps an autocast of Accelerate."""
    monkeypatch.syspath_prepend(EXAMPLES)
    main = importlib.import_module("xnli_xlmr").main
    evaluated: list[Any] = []
    monkeypatch.setattr(
        importlib.import_module("zero_shot_training"),
        "report",
        lambda task, model, *_: evaluated.append(model),
    )
    main([*xnli, "--output_dir", str(tmp_path), "--bf16", "true", "--max_steps", "4"])
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokens = torch.arange(5, 25)[None]
    own = evaluated[0].eval()
    for name, weight in saved.state_dict().items():
        assert torch.equal(own.state_dict()[name], weight), name
    with torch.no_grad():  # MKL's products may depend on where in the memory their factors lie.
        torch.testing.assert_close(own(tokens).logits, saved.eval()(tokens).logits)


@pytest.fixture(scope="module")
def xnli(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that a run would start with."""
    folder = tmp_path_factory.mktemp("xnli")
    write_pairs(folder / "data", "xnli", ("en", "de"))
    write_model(folder / "xlmr", "XLMRoberta")
    given = ["--data", folder / "data", "--model", folder / "xlmr", *SMALL]
    return list(map(str, given))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1"], "--sparsity should be from 0 to below 1, got 1.0"),
        (["--sparsity", "0"], "--regularizer should be none with --sparsity 0, the dense baseline"),
        (
            ["--begin", "0.8"],
            "--begin and --end should satisfy 0 <= begin < end <= 1, got 0.8 and 0.7",
        ),
        (["--rounds", "0"], "--rounds should be at least 1, got 0"),
        (["--strength", "-1"], "--strength should be finite and at least 0, got -1.0"),
        (["--strength", "1", "--regularizer", "none"], "should not be none with --strength, got"),
        (["--share", "0"], "--share should be finite and above 0, got 0.0"),
        (["--compare", "nowhere"], "--compare should be a folder or a file, got nowhere"),
        (["--compare", __file__], f"--compare should be a folder or a report, got {__file__}: "),
        (["--max_length", "600"], "--max_length should be from 1 to 48, got 600"),
        (["--languages", "de", "fr"], "has no xnli data in 'fr', only in de, en"),
        (["--data", "nowhere"], "data should be a folder, got nowhere"),
        (["--eval_stratgy", "no"], "are not used by the HfArgumentParser: ['--eval_stratgy'"),
        (["--output_dir", ""], "--output_dir should be a folder for checkpoints and results, got"),
        (["--num_train_epochs", "0"], "48 training sentences should make at least one step, got"),
        (["--resume_from_checkpoint", "true"], "should be a checkpoint's folder, got true"),
    ],
)
def test_arguments_that_are_wrong(
    arguments: list[str],
    message: str,
    xnli: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    main = importlib.import_module("xnli_xlmr").main
    with pytest.raises(SystemExit) as error:
        main([*xnli, "--output_dir", str(tmp_path / "out"), *arguments])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_folder(
    xnli: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    main = importlib.import_module("xnli_xlmr").main
    settings = {"model": xnli[3], "max_length": 32, "sparsity": 0.5}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=r"sparsity should be 0\.5, as in the run in .*, got 0\.7"):
        main([*xnli, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("case", [str, str.upper, str.title])
def test_labels_in_another_order(
    case: Any, xnli: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    main = importlib.import_module("xnli_xlmr").main
    folder = write_model(tmp_path / "model", "XLMRoberta")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(enumerate(map(case, ["contradiction", "neutral", "entailment"])))
    config["label2id"] = {label: i for i, label in config["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="labels in the order entailment, neutral, contradiction"):
        main([*xnli, "--output_dir", str(tmp_path / "out"), "--model", str(folder)])
