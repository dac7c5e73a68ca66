"""The zero-shot examples run from a shell, on a tiny model and a few rows of the small files."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from test_crosslingual_readers import write
from test_examples import EXAMPLES, launch
from tiny_xlmr import SENTENCES, wordpiece, xlmr
from torchalignprune.crosslingual.experiment import Experiment

LANGUAGES = ("en", "vi", "ar")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for code in LANGUAGES:
        words = SENTENCES[code]
        tags = ["NOUN", "VERB", "ADP", "PUNCT", "X", "NOUN"]
        sentence = "".join(f"{w}\t{t}\n" for w, t in zip(words, tags, strict=False))
        topics = "".join(
            f"{i}\t{('sports', 'travel')[i % 2]}\t{words[i % len(words)]}\n" for i in range(12)
        )
        for split in ("train", "dev", "test"):
            write(folder / "udpos" / f"{split}.{code}.tsv.gz", "\n".join([sentence] * 12))
            write(folder / "sib200" / f"{split}.{code}.tsv.gz", topics)
        write(folder / "pud" / f"test.{code}.tsv.gz", "\n".join([sentence] * 6))
    xlmr(("A", "B")).base_model.save_pretrained(folder / "model")
    wordpiece().save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("task", ["pos", "topics"])
def test_zero_shot(
    task: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    main = importlib.import_module(f"zero_shot_{task}").main
    out = tmp_path / "out"
    arguments = ["--data", data, "--model", data / "model", "--out", out, "--epochs", 1]
    arguments += ["--batch-size", 4, "--sparsities", 0.5, 0.9, "--device", "cpu"]
    main([*map(str, arguments), "--method", "magnitude"])
    # As if it had been killed while it wrote the next line.
    with (out / "runs.jsonl").open("a") as file:
        file.write('{"method": "wanda-')
    more = ["--method", "magnitude", "wanda-multi", "--regularizer", "none", "both"]
    capsys.readouterr()
    main([*map(str, arguments), *more])
    printed = capsys.readouterr().out
    assert "magnitude, seed 0: done already" in printed
    lines = (out / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 5
    runs = [json.loads(line) for line in lines if line.endswith("}")]
    assert [(run["method"], run["regularizer"]) for run in runs] == [
        ("magnitude", "none"),
        ("wanda-multi", "none"),
        ("magnitude", "both"),
        ("wanda-multi", "both"),
    ]
    for run in runs:
        assert list(run["reports"]) == ["0.0", "0.5", "0.9"]
        assert set(run["reports"]["0.9"]["languages"]) == set(LANGUAGES)
    assert "zero-shot mean" in printed and "Wanda, multilingual inputs + both (10)" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary) == 4
    drops = summary["magnitude"]["0.9"]["drops"]["languages"]["ar"]
    assert drops["drop"]["value"] == pytest.approx(drops["dense"] - drops["pruned"])
    assert len(list(out.glob("heat_map_*.png"))) == 4 and (out / "retention.png").exists()


def test_several_seeds_and_bad_options(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    main = importlib.import_module("zero_shot_topics").main
    out = tmp_path / "out"
    arguments = ["--data", data, "--model", data / "model", "--out", out, "--epochs", 1]
    arguments += ["--sparsities", 0.5, "--device", "cpu", "--languages", "ar"]
    given = [*map(str, arguments)]
    main([*given, "--seeds", "2"])
    assert "aligned, 2 seeds: score (drop), in points" in capsys.readouterr().out
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [run["seed"] for run in runs] == [0, 1]
    hits = [run["reports"]["0.5"]["languages"]["ar"]["hits"].split() for run in runs]
    summed = [str(sum(map(int, pair))) for pair in zip(*hits, strict=True)]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["aligned"]["0.5"]["languages"]["ar"]["hits"].split() == summed
    # A run that two processes made is one seed.
    with (out / "runs.jsonl").open("a") as file:
        file.write(json.dumps(runs[1] | {"seconds": 0.1}) + "\n")
    main([*given, "--seeds", "2"])
    assert "aligned, 2 seeds: score (drop), in points" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["aligned"]["0.5"]["languages"]["ar"]["hits"].split() == summed
    # Nor are seeds of other sentences put together.
    lines = (out / "runs.jsonl").read_text()
    path = data / "sib200" / "test.ar.tsv.gz"
    texts = gzip.decompress(path.read_bytes()).decode()
    write(path, texts.replace("travel", "sports", 1))
    with pytest.raises(SystemExit):
        main([*given, "--seeds", "3"])
    assert "got other sentences in ar; give another folder as --out" in capsys.readouterr().err
    assert (out / "runs.jsonl").read_text() == lines
    write(path, texts)
    for bad, message in (
        (["--languages", "xx"], "languages should be among those of topics, ar, en, vi"),
        (["--seeds", "0"], "--seeds should be at least 1, got 0"),
        (["--data", str(tmp_path / "none")], "data should be a folder"),
        (["--sparsities", "0.5", "0.3"], "--sparsities should rise from above 0 to below 1"),
        # Before the training, not after it.
        (["--out", str(path)], "--out: "),
    ):
        with pytest.raises(SystemExit):
            main([*given, *bad])
        assert message in capsys.readouterr().err


def test_the_miniature_is_evaluated_in_its_own_languages(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    main = importlib.import_module("zero_shot_topics").main
    asked: list[Any] = []

    def load(*arguments: Any, languages: Any, **options: Any) -> None:
        asked.append(languages)
        raise ValueError("far enough")

    monkeypatch.setattr(Experiment, "load", load)
    given = ["--data", str(data), "--out", str(tmp_path / "out")]
    for more in ([], ["--languages", "vi"], ["--model", str(data / "model")]):
        with pytest.raises(SystemExit):
            main([*given, *more])
    # There is Vietnamese too, which it has never seen.
    assert asked == [["en", "ar"], ["vi"], None]


@pytest.mark.slow
def test_from_a_shell() -> None:
    for task in ("pos", "topics"):
        process = launch(f"zero_shot_{task}.py", "--help")
        assert process.returncode == 0 and "--retraining-epochs" in process.stdout
