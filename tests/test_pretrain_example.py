"""Pretraining a miniature from a shell: on a few sentences, in the formats of the real files."""

from __future__ import annotations

import gzip
import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerFast, XLMRobertaForMaskedLM

from test_cli import make_bert
from test_examples import EXAMPLES, launch, refusal
from torchalignprune.crosslingual import LanguageSpec, generate_corpus


def write(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    languages = {"en": LanguageSpec(0.0), "de": LanguageSpec(0.3), "id": LanguageSpec(0.5)}
    raw = generate_corpus(languages, train=0, validation=0, test=0, raw=640).raw
    folder = tmp_path / "data"
    for code, own in raw.items():
        verses = [f"GEN.1.{i}\t{text}" for i, text in enumerate(own[:60])]
        write(folder / "bible" / f"{'id-ulb' if code == 'id' else code}.tsv.gz", verses)
        news = [f"n{i:04}\t{text}" for i, text in enumerate(own[60:600], 1)]
        write(folder / "ntrex" / f"{code}.tsv.gz", news)
    write(folder / "raw" / "en.txt.gz", raw["en"][600:])
    wordnet = folder / "wordnet"
    wordnet.mkdir()
    for kind in ("noun", "verb", "adj", "adv"):
        (wordnet / f"data.{kind}").write_text(
            "  1 This is the licence.\n"
            f"00001740 03 n 02 big_{kind} 0 other(a) 0 003 ~ 00001930 n 0000 | said of a {kind}  \n"
        )
    return folder


@pytest.mark.slow
def test_it_pretrains_and_goes_on(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    teacher = make_bert(tmp_path / "bert")
    arguments = [
        "--data",
        data,
        "--out",
        out,
        "--languages",
        "en",
        "de",
        "id",
        "--teacher",
        teacher,
    ]
    arguments += ["--wordnet", data / "wordnet", "--vocabulary", 500, "--layers", 1, "--hidden", 16]
    arguments += ["--heads", 2, "--intermediate", 32, "--tokens", 512, "--float32", "--steps", 4]
    process = launch("pretrain_mini_xlmr.py", *arguments)
    assert process.returncode == 0, process.stderr

    with safe_open(out / "model" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    model = XLMRobertaForMaskedLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model.config.num_hidden_layers == 1 and model.config.hidden_dropout_prob == 0.1
    assert tokenizer.model_max_length == 256 and tokenizer.mask_token_id == len(tokenizer) - 1
    scores = json.loads((out / "model" / "scores.json").read_text())
    assert scores["sentences"] == 500 and scores["retrieval_chance"] == 0.002
    assert set(scores["masked_lm_loss"]) == {"en", "de", "id"}
    assert set(scores["retrieval"]) == {"de", "id"}

    made = [*out.glob("tokenizer/*"), *out.glob("lexicons/*"), *out.glob("teacher/*")]
    assert {path.parent.name for path in made} == {"tokenizer", "lexicons", "teacher"}
    assert not [*out.rglob("*partial*")]
    written = [path.stat().st_mtime_ns for path in made]
    # It was killed before the model was written, and finds that there is nothing left to do.
    (out / "model" / "model.safetensors").unlink()
    again = launch("pretrain_mini_xlmr.py", *arguments)
    assert again.returncode == 0, again.stderr
    resumed = XLMRobertaForMaskedLM.from_pretrained(out / "model")
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))
    assert [path.stat().st_mtime_ns for path in made] == written
    other = launch("pretrain_mini_xlmr.py", *arguments, "--seed", 1)
    assert other.returncode == 1 and "should be of a run with" in other.stderr


def test_a_folder_is_of_one_set_of_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("pretrain_mini_xlmr")
    # The example sets it for its process, which is that of the tests here.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    out, teacher = tmp_path / "out", make_bert(tmp_path / "bert")
    arguments = ["--data", data, "--out", out, "--languages", "en", "de", "id"]
    arguments += ["--vocabulary", 500]
    capsys.readouterr()

    class FarEnough(Exception):
        pass

    def stop(*_: Any) -> None:
        raise FarEnough

    def main(*more: object) -> str:
        with pytest.raises((FarEnough, SystemExit)):
            example.main([*map(str, arguments), "--teacher", *map(str, more)])
        return capsys.readouterr().err

    save = PreTrainedTokenizerFast.save_pretrained

    def killed(self: Any, folder: Path) -> None:
        save(self, folder)
        raise FarEnough

    # What was killed before its tokenizer was whole begins with it anew.
    monkeypatch.setattr(example.AutoTokenizer, "from_pretrained", stop)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", killed)
    assert main(teacher) == "" and not (out / "tokenizer").exists()
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    assert main(teacher) == "" and (out / "tokenizer" / "tokenizer.json").exists()
    assert main(teacher) == ""

    other = shutil.copytree(teacher, tmp_path / "other")
    assert main(other) == ""
    (other / "config.json").write_text("{}")
    message = f"or one with the same texts, vocabulary, teacher, got {out} with other "
    assert f"{message}teacher\n" in main(other)
    assert f"{message}vocabulary\n" in main(teacher, "--vocabulary", 400)
    assert f"{message}texts\n" in main(teacher, "--wordnet", data / "wordnet")
    assert "--teacher should be a folder, got " in main(tmp_path / "none")
    # Nor is one taken that does not say what it was made of.
    (out / "settings.json").unlink()
    assert f"{message}texts, vocabulary, teacher\n" in main(teacher)


def test_what_is_missing_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The example sets it for its process, which is that of the tests here.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    arguments = ["pretrain_mini_xlmr.py", "--data", data, "--out", tmp_path / "out"]
    said = refusal(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert "has no nl.tsv.gz in bible/ and ntrex/" in said
    arguments += ["--languages", "de", "id"]
    said = refusal(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert "--languages should be en and at least one other, got de id" in said
    assert not (tmp_path / "out").exists()
