"""The miniature XLM-R that lies in the repository, and its sentences."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from test_examples import EXAMPLES, launch, refusal
from torchalignprune.crosslingual import retrieval_hits, sentence_embeddings

FOLDER = EXAMPLES / "mini_xlmr"
LANGUAGES = ["en", "de", "nl", "fr", "es", "it", "pt", "ru", "pl", "fi", "ar", "zh", "id"]


def rows() -> list[dict[str, str]]:
    head, *lines = (FOLDER / "sentences.tsv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]


def test_the_sentences_are_complete() -> None:
    found = rows()
    assert list(found[0]) == ["number", "topic", *LANGUAGES]
    assert [row["number"] for row in found] == [str(i) for i in range(1, 85)]
    assert set(Counter(row["topic"] for row in found).values()) == {12}
    for language in LANGUAGES:
        texts = [row[language] for row in found]
        assert len(set(texts)) == 84 and all(text == text.strip() and text for text in texts)
        assert all(unicodedata.is_normalized("NFC", text) for text in texts)


def test_the_checkpoint_is_small_and_in_bfloat16() -> None:
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 16_000_000
    with safe_open(path, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_it_finds_translations_far_more_often_than_by_chance() -> None:
    """On sentences that it has never seen, in every language, nearly as its card says."""
    model = AutoModelForMaskedLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    found = rows()
    embeddings = {
        language: sentence_embeddings(model, tokenizer, [row[language] for row in found])
        for language in LANGUAGES
    }
    shares = {
        language: float(retrieval_hits(own, embeddings["en"]).float().mean())
        for language, own in embeddings.items()
    }
    assert shares.pop("en") == 1.0
    assert min(shares.values()) > 0.3, shares
    scores = json.loads((FOLDER / "scores.json").read_text())
    assert set(scores["retrieval"]) == set(shares)
    assert sum(shares.values()) / len(shares) > 0.6


def test_the_first_blocks_of_the_readme_run_on_it() -> None:
    """As they are pasted: XLM-R is what the README speaks of."""
    page = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:2]
    assert "prune.global_unstructured(" in blocks[0] and "prune.remove(" in blocks[1]
    model, other = (
        AutoModelForSequenceClassification.from_pretrained(FOLDER, dtype=torch.float32).eval()
        for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    batch = tokenizer(["a sentence", "ein Satz"], padding=True, return_tensors="pt")
    names: dict[str, Any] = {"model": model, "other_model": other, "batch": batch}
    for block in blocks:
        exec(block, names)
    assert torch.equal(model(**batch).logits, other(**batch).logits)
    params = names["params"]
    zeros = sum(int((getattr(*pair) == 0).sum()) for pair in params)
    assert zeros / sum(getattr(*pair).numel() for pair in params) > 0.82


@pytest.mark.slow
def test_the_example_that_prunes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = launch("mini_xlmr_pruning.py", "--out", tmp_path, "--sparsities", 0.8)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    dense, *pruned = results
    assert dense["sparsity"] == 0.0 and {result["sparsity"] for result in pruned} == {0.8}
    for question in ("retrieval", "topics"):
        assert list(dense[question]) == LANGUAGES
        for result in pruned:
            drop, low, high = result[f"{question}_drop"]
            expected = dense[f"{question}_others"] - result[f"{question}_others"]
            assert drop == pytest.approx(expected, abs=1e-6) and low <= drop <= high
    assert all(result["retrieval_drop"][1] > 0 for result in pruned), "pruning to 80% must hurt"
    assert (tmp_path / "retention.png").stat().st_size > 10_000
    arguments = ["mini_xlmr_pruning.py", "--out", tmp_path, "--sparsities", 1]
    said = refusal(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert "should be between 0 and 1, got 1.0" in said
