"""The example that pretrains a tiny XLM-R on generated languages and prunes it, cut short."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

from torchalignprune.crosslingual import LanguageScore, ZeroShotReport

SCRIPT = Path(__file__).parents[1] / "examples" / "zero_shot_pruning.py"
WAYS = ["dense", "magnitude", "aligned", "magnitude + cosine", "magnitude + frobenius"]
LANGUAGES = ["source", "near", "middle", "far", "remote"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """What three runs printed, and where they wrote; two of them with the same arguments."""
    folder = tmp_path_factory.mktemp("runs")
    tags = ["--task", "pos", "--seed", 1, "--sparsities", 0.8]
    processes = {
        name: start("--quick", "--out", folder / name, *arguments)
        for name, arguments in (("first", []), ("again", []), ("tags", tags))
    }
    found = {}
    for name, process in processes.items():
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert errors == ""
        found[name] = (printed, folder / name)
    return found


def read(folder: Path) -> Any:
    return json.loads((folder / "zero_shot.json").read_text())


def tables(printed: str) -> str:
    return printed[printed.index("\ndense") : printed.index("\nwritten")]


@pytest.mark.slow
def test_what_a_run_leaves(runs: dict[str, tuple[str, Path]]) -> None:
    for name, levels in (("first", ["0.0", "0.5", "0.9"]), ("tags", ["0.0", "0.8"])):
        printed, folder = runs[name]
        found = read(folder)
        assert found["task"] == ("topics" if name == "first" else "pos")
        assert found["seed"] == (0 if name == "first" else 1)
        assert list(found["sweeps"]) == WAYS
        for way, sweep in found["sweeps"].items():
            assert list(sweep) == levels
            block = printed[printed.index(f"\n{way}: accuracy in %") :].splitlines()
            for language in LANGUAGES:
                (line,) = [line for line in block[:13] if line.startswith(language)]
                for level in levels:
                    score = sweep[level]["languages"][language]["score"]["value"]
                    assert f" {100 * score:.1f}" in line
            if way != "dense":
                picture = folder / f"heat_map_{way.replace(' + ', '_')}.png"
                assert picture.read_bytes().startswith(b"\x89PNG")
        assert (folder / "retention.png").read_bytes().startswith(b"\x89PNG")
        # All ways begin with the same model; a regularizer changes its training.
        dense = {
            way: [sweep["0.0"]["languages"][code]["hits"] for code in LANGUAGES]
            for way, sweep in found["sweeps"].items()
        }
        assert dense["dense"] == dense["magnitude"] == dense["aligned"]
        AutoModelForMaskedLM.from_pretrained(folder / "pretrained")
        assert AutoTokenizer.from_pretrained(folder / "pretrained").mask_token == "<mask>"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table(runs: dict[str, tuple[str, Path]]) -> None:
    first, again = runs["first"], runs["again"]
    assert tables(first[0]) == tables(again[0])
    assert read(first[1]) == read(again[1])
    # Bit for bit, the vocabulary included.
    for name in ("model.safetensors", "tokenizer.json"):
        one, other = ((run[1] / "pretrained" / name).read_bytes() for run in (first, again))
        assert one == other, name


def report(source: int, near: int, far: int) -> ZeroShotReport:
    """With so many of ten words right in each of four sentences."""
    scores = {"source": source, "near": near, "far": far}
    return ZeroShotReport(
        "generated_pos",
        "accuracy",
        "test",
        {
            code: LanguageScore(np.full(4, hits), np.full(4, 10), 0, 0, "", "")
            for code, hits in scores.items()
        },
        supervised="source",
        parallel=True,
    )


def test_tables(script: ModuleType) -> None:
    magnitude = {0.0: report(10, 8, 6), 0.5: report(10, 8, 5), 0.9: report(9, 5, 2)}
    assert script.drops_table(magnitude).splitlines() == [
        "                         dense           50%           90%",
        "source (trained on)      100.0  100.0 (+0.0)  90.0 (-10.0)",
        "near                      80.0   80.0 (+0.0)  50.0 (-30.0)",
        "far                       60.0  50.0 (-10.0)  20.0 (-40.0)",
        "zero-shot mean            70.0   65.0 (-5.0)  35.0 (-35.0)",
        "  lost more than source                 +5.0         +25.0",
        "  95% interval                    5.0 to 5.0  25.0 to 25.0",
    ]
    aligned = {0.0: report(10, 8, 6), 0.5: report(10, 8, 6), 0.9: report(8, 6, 3)}
    found = script.comparison_table({"magnitude": magnitude, "aligned": aligned})
    assert found.splitlines() == [
        "                                       50%                     90%",
        "aligned          source  +0.0 (0.0 to 0.0)  -10.0 (-10.0 to -10.0)",
        "         zero-shot mean  +5.0 (5.0 to 5.0)    +10.0 (10.0 to 10.0)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsities", "0.9", "0.5"], "--sparsities should rise from above 0 to below 1, got"),
        (["--sparsities", "1.0"], "--sparsities should rise from above 0 to below 1, got"),
        (["--seed", "-1"], "--seed should be at least 0, got -1"),
        (["--strength", "-1"], "--strength should be finite and at least 0, got -1"),
        (["--out", str(SCRIPT)], f"--out should be a folder, got the file {SCRIPT}"),
    ],
)
def test_bad_arguments(
    script: ModuleType,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
