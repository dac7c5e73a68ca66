"""``torchalignprune evaluate`` on tiny fine-tuned checkpoints and small files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch.nn.utils import prune

from test_cli import make_bert, run, tree
from test_crosslingual_readers import jsonl, tagged, write
from tiny_xlmr import SENTENCES, wordpiece, xlmr
from torchalignprune import cli, prunable_parameters
from torchalignprune.crosslingual import (
    TASKS,
    ZeroShotReport,
    encode_words,
    evaluate_zero_shot,
    evaluation,
)

LANGUAGES = ("ar", "en", "vi", "zh")
TAGS = ("PROPN", "VERB", "ADP", "PUNCT", "X", "NOUN")


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    wordpiece().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(xlmr(TASKS["pos"].labels), tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = xlmr(TASKS["pos"].labels)
    for module, name in prunable_parameters(model):
        prune.l1_unstructured(module, name, amount=0.8)
        prune.remove(module, name)
    return save(model, tmp_path_factory.mktemp("models") / "pruned")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for language in LANGUAGES:
        words = SENTENCES[language]
        sentences = [
            [(word, TAGS[(i + j) % len(TAGS)]) for j, word in enumerate(words)] for i in range(6)
        ]
        for place in ("udpos/test", "udpos/dev", "pud/test"):
            write(folder / f"{place}.{language}.tsv.gz", tagged(sentences))
    return folder


def found_in(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run("evaluate", *arguments, "--json") == 0
    printed, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(printed)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    capsys.readouterr()
    assert run("evaluate", *arguments) == code
    printed, err = capsys.readouterr()
    assert printed == "" and err.startswith("torchalignprune evaluate: error: ")
    assert len(err.splitlines()) == 1
    return err


def by_hand(folder: Path, task: str, data: Path, **options: Any) -> ZeroShotReport:
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    return evaluate_zero_shot(model, wordpiece(), task, sorted(LANGUAGES), data=data, **options)


@pytest.mark.parametrize("task", ["pos", "pud"])
def test_evaluate(task: str, dense: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(dense)
    found = found_in(capsys, dense, "--task", task, "--data", data)
    assert tree(dense) == before
    report = by_hand(dense, task, data)
    assert report.parallel == (task == "pud")
    assert {key: found[key] for key in report.to_dict()} == report.to_dict()
    assert found["checkpoint"] == str(dense) and found["seconds"] > 0
    assert found["bare_pieces"] == "skip" and found["max_length"] is None
    assert found["command"].startswith("torchalignprune evaluate ")


def test_options(dense: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--languages", "zh", "ar", "--supervised", "ar", "--split", "validation"]
    arguments += ["--seed", "3", "--max-length", "7", "--batch-size", "2", "--device", "cpu"]
    found = found_in(capsys, dense, "--task", "pos", "--data", data, *arguments)
    assert list(found["languages"]) == ["zh", "ar"] and found["supervised"] == "ar"
    assert found["split"] == "validation" and found["seed"] == 3
    assert found["languages"]["ar"]["cut_off"] > 0
    found = found_in(capsys, dense, "--task", "pos", "--data", data, "--supervised", "none")
    assert found["supervised"] is None and found["gap"] is None


def test_bare_pieces(
    dense: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watched(*arguments: Any, bare_pieces: str, **options: Any) -> Any:
        asked.append(bare_pieces)
        return encode_words(*arguments, **options)

    monkeypatch.setattr(evaluation, "encode_words", watched)
    task = ["--task", "pos", "--data", data, "--languages", "en"]
    found_in(capsys, dense, *task)
    found_in(capsys, dense, *task, "--bare-pieces", "label")
    assert asked == ["skip", "label"]


def test_compare(
    dense: Path, pruned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = by_hand(pruned, "pud", data).compare(by_hand(dense, "pud", data))
    arguments = [pruned, "--task", "pud", "--data", data]
    found = found_in(capsys, *arguments, "--compare", dense)
    assert found["comparison"] == comparison.to_dict() and found["compared_with"] == str(dense)
    # An earlier evaluation of the dense model does as well.
    earlier = tmp_path / "made" / "dense.json"
    assert run("evaluate", dense, "--task", "pud", "--data", data, "--out", earlier) == 0
    assert f"written: {earlier}" in capsys.readouterr().out
    again = found_in(capsys, *arguments, "--compare", earlier)
    assert again["comparison"] == found["comparison"]
    assert run("evaluate", *arguments, "--compare", earlier) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(str(comparison))
    assert "the same for all languages" in printed and "the same for both models" in printed


def test_files(
    dense: Path, pruned: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("r.json", "r.png", "r.svg")]
    arguments = [pruned, "--task", "pos", "--data", data]
    found = found_in(capsys, *arguments, "--out", *files)
    assert json.loads(files[0].read_text()) == found
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "zero-shot mean" in files[2].read_text()
    assert run("evaluate", *arguments, "--compare", dense, "--out", files[2]) == 0
    assert "drop against the dense model" in files[2].read_text()
    assert "CC-100" not in files[2].read_text()
    assert run("evaluate", *arguments, "--compare", dense, "--cc100", "--out", files[2]) == 0
    assert "CC-100" in files[2].read_text()


def test_the_table(dense: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", dense, "--task", "pos", "--data", data) == 0
    printed, err = capsys.readouterr()
    assert err == "" and printed.startswith(str(by_hand(dense, "pos", data)))
    assert "intervals: 95%, 2,000 resamples of sentences, separate for each language" in printed


def test_on_a_terminal(
    dense: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("evaluate", dense, "--task", "pos", "--data", data) == 0
    printed, err = capsys.readouterr()
    assert "en (supervised)" in printed and "evaluating" in err


@pytest.mark.parametrize("task", ["xnli", "topics"])
def test_texts(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = TASKS[task].labels
    folder = save(xlmr(labels, "SequenceClassification"), tmp_path / "model")
    for language in ("en", "de"):
        rows = [
            {"premise": "The units", "hypothesis": "were kept", "label": i % 3, "text": "Hùng " * i}
            for i in range(1, 7)
        ]
        config = TASKS[task].configs[language]
        jsonl(tmp_path / "data" / config / "test.jsonl", rows)
    found = found_in(capsys, folder, "--task", task, "--data", tmp_path / "data")
    assert sorted(found["languages"]) == ["de", "en"] and found["parallel"]


def test_wrong_usage(
    dense: Path,
    pruned: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = ["--task", "pos", "--data", data]
    assert "--languages is needed without --data" in refused(capsys, dense, "--task", "pos")
    err = refused(capsys, dense, *task, "--languages", "en", "xx")
    assert "udpos has no pos data in 'xx', only in ar, en, vi, zh" in err
    err = refused(capsys, dense, *task, "--languages", "ar")
    assert "--supervised en should be one of the languages, ar; or --supervised none" in err
    assert "is not a checkpoint folder" in refused(capsys, tmp_path, *task)
    err = refused(capsys, dense, "--task", "topics", "--data", data)
    assert "no files of topics" in err or "should be a model for SequenceClassification" in err
    assert "no split 'train', only" in refused(capsys, dense, *task, "--split", "train")
    assert "should be from 1 to 48" in refused(capsys, dense, *task, "--max-length", "49")
    assert "--device warp cannot be used" in refused(capsys, dense, *task, "--device", "warp")
    for broken in ("no JSON", "{}", "[]"):
        write(tmp_path / "dense.json", broken)
        err = refused(capsys, dense, *task, "--compare", tmp_path / "dense.json")
        assert "dense.json is not the JSON file of an evaluation" in err
    by_hand(dense, "pud", data)
    other = tmp_path / "other.json"
    other.write_text(by_hand(dense, "pud", data).to_json())
    with monkeypatch.context() as patch:  # before the model is evaluated
        patch.setattr(cli.evaluate, "_evaluation", lambda *_: pytest.fail("evaluated for nothing"))
        err = refused(capsys, pruned, *task, "--compare", other)
        assert "other.json should be an evaluation with the task pos, got pud" in err
        pud = ["--task", "pud", "--data", data, "--compare", other]
        err = refused(capsys, pruned, *pud, "--supervised", "none")
        assert "should be an evaluation with the supervised language None, got en" in err
        err = refused(capsys, pruned, *pud, "--languages", "en", "ar")
        assert "should have the same languages, en, ar, got ar, en, vi, zh" in err
        changed = tmp_path / "changed"
        shutil.copytree(data, changed)
        write(changed / "pud" / "test.vi.tsv.gz", tagged([[("Thanh", "PROPN")]] * 6))
        err = refused(capsys, pruned, "--task", "pud", "--data", changed, "--compare", other)
        assert "should be an evaluation on the same sentences; those in vi differ" in err
        written = json.loads(other.read_text())
        other.write_text(json.dumps(written | {"bare_pieces": "label", "max_length": 7}))
        err = refused(capsys, pruned, *pud, "--max-length", "7")
        assert "should be an evaluation with --bare-pieces skip, got label" in err
        err = refused(capsys, pruned, *pud, "--bare-pieces", "label")
        assert "should be an evaluation with --max-length None, got 7" in err
    assert "--cc100 goes with --compare" in refused(capsys, dense, *task, "--cc100")
    for option in ("--batch-size", "--max-length"):
        assert run("evaluate", dense, *task, option, "0") == 2
    assert run("evaluate", dense, *task, "--seed", "-1") == 2


def test_models_that_cannot_do_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["--task", "pos", "--data", data]
    bare = make_bert(tmp_path / "bare")
    assert "should be a model for TokenClassification" in refused(capsys, bare, *task)
    # The right class, but its head was never trained.
    config = json.loads((bare / "config.json").read_text())
    config["architectures"] = ["BertForTokenClassification"]
    (bare / "config.json").write_text(json.dumps(config))
    assert "is not fine-tuned: it has no weights for classifier" in refused(capsys, bare, *task)
    other = save(xlmr(("a", "b")), tmp_path / "other")
    assert "the model should have the labels of pos" in refused(capsys, other, *task)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other / file).unlink()
    assert "evaluate needs the tokenizer of" in refused(capsys, other, *task)


def test_a_place_that_cannot_be_written_to_is_noticed_first(
    dense: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        cli.evaluate, "_evaluation", lambda *_: pytest.fail("evaluated for nothing")
    )
    (tmp_path / "file").write_text("x")
    out = ["--out", tmp_path / "made" / "r.json", tmp_path / "file" / "r.json"]
    err = refused(capsys, dense, "--task", "pos", "--data", data, *out, code=1)
    assert f"--out: {tmp_path / 'file'} cannot be written to: Not a directory" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_datasets(
    dense: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    err = refused(capsys, dense, "--task", "pos", "--data", data, code=1)
    assert '"torchalignprune[crosslingual]"' in err
