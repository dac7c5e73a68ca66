"""Pretraining a miniature from a shell: on a few sentences, in the formats of the real files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, XLMRobertaForMaskedLM

from test_cli import make_bert
from test_examples import launch
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

    kept = out / "teacher" / "words.safetensors"
    written = kept.stat().st_mtime_ns
    # It was killed before the model was written, and finds that there is nothing left to do.
    (out / "model" / "model.safetensors").unlink()
    again = launch("pretrain_mini_xlmr.py", *arguments)
    assert again.returncode == 0, again.stderr
    resumed = XLMRobertaForMaskedLM.from_pretrained(out / "model")
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))
    assert kept.stat().st_mtime_ns == written

    # What the teacher said is made again for other sentences.
    (data / "wordnet" / "data.verb").write_text("0 03 n 01 more 0 000 | a definition\n" * 2)
    other = launch("pretrain_mini_xlmr.py", *arguments, "--seed", 1)
    assert kept.stat().st_mtime_ns > written
    assert other.returncode == 1 and "should be of a run with" in other.stderr


def test_what_is_missing_is_said(data: Path, tmp_path: Path) -> None:
    arguments = ["--data", data, "--out", tmp_path / "out"]
    process = launch("pretrain_mini_xlmr.py", *arguments)
    assert process.returncode == 2 and "has no nl.tsv.gz in bible/ and ntrex/" in process.stderr
    process = launch("pretrain_mini_xlmr.py", *arguments, "--languages", "de", "id")
    assert process.returncode == 2
    assert "--languages should be en and others, got de id" in process.stderr
    assert not (tmp_path / "out").exists()
