"""States of a model's tokens for another tokenizer's pieces, against a loop over characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from test_cli import make_bert
from torchalignprune.crosslingual import piece_states, train_tokenizer
from torchalignprune.crosslingual.piece_states import _tokens_of

TEXTS = ["the cat sat on the mat", "  a  cat", "unbelievable", "the", ""]


def pieces() -> Any:
    return train_tokenizer(
        ["the cat sat on the mat", "a cat is unbelievable", "believable"] * 5, 40
    )


@pytest.fixture
def encoder(tmp_path: Path) -> tuple[Any, Any]:
    folder = make_bert(tmp_path / "bert")
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_piece_gets_the_token_that_has_its_first_character(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    model.train()
    found = piece_states(model, tokenizer, TEXTS, pieces(), batch_size=2)
    assert model.training
    model.eval()
    for text, own in zip(TEXTS, found, strict=True):
        tokens = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        spans = tokens.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            states = model(**tokens).last_hidden_state[0]
        expected = []
        for begin, end in pieces()(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]:
            first = next((i for i in range(begin, end) if not text[i].isspace()), end)
            expected += [states[i] for i, span in enumerate(spans) if span[0] <= first < span[1]]
        assert own.dtype == torch.bfloat16 and own.shape == (len(expected), states.shape[1])
        for one, other in zip(own, expected, strict=True):
            assert torch.allclose(one.float(), other, atol=2e-2, rtol=2e-2)


def test_pieces_beyond_the_last_token_get_none() -> None:
    tokens = np.array([[0, 3], [4, 7]])
    spans = [(0, 2), (2, 3), (3, 6), (6, 9), (9, 12)]
    assert _tokens_of("the cat is on", tokens, spans).tolist() == [0, 0, 1, 1]
    assert _tokens_of("the cat", np.zeros((0, 2), np.int64), spans).tolist() == []
