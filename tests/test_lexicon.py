"""Word alignment, and the vectors that it carries from one language to others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import translation_table as plain_table
from tiny_xlmr import unigram, wordpiece
from torchalignprune.crosslingual.lexicon import (
    piece_vectors,
    transferred_vectors,
    translation_table,
)

Sentences = Sequence[Sequence[int]]


def test_a_literal_table() -> None:
    # 0 is "the", 1 "house", 2 "book"; 3, 4 and 5 the same in the other language.
    table = translation_table([[0, 1], [0, 2], [0]], [[3, 4], [3, 5], [3]], 6).toarray()
    assert table[:3].argmax(1).tolist() == [3, 4, 5]
    np.testing.assert_allclose(table[:3].sum(1), 1, atol=0.01)
    assert not table[3:].any()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=5), st.lists(st.integers(0, 5), max_size=5)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 4),
)
def test_tables_against_the_plain_definition(
    pairs: list[tuple[list[int], list[int]]], iterations: int
) -> None:
    source, target = [a for a, _ in pairs], [b for _, b in pairs]
    found = translation_table(source, target, 6, iterations=iterations).toarray()
    expected = plain_table(source, target, 6, iterations)
    np.testing.assert_allclose(found, np.where(expected > 1e-3, expected, 0), atol=1e-9)


def test_no_sentences_no_table() -> None:
    assert translation_table([], [], 4).nnz == 0
    with pytest.raises(ValueError, match="target should have as many sentences as source, 1, got"):
        translation_table([[0]], [], 4)


def test_vectors_of_spellings() -> None:
    tokenizer, encoder = unigram(), wordpiece()
    vectors = torch.arange(len(encoder), dtype=torch.float32)[:, None] * torch.ones(3)
    found, known = piece_vectors(tokenizer, encoder, vectors)
    assert found.shape == (len(tokenizer), 3)
    assert not known[tokenizer.all_special_ids].any() and known.any()
    assert not found[~known].any()
    ids = tokenizer.get_vocab()
    there = 0
    for piece, place in ids.items():
        if piece.startswith("▁") and len(piece) > 1 and known[place]:
            spelled = encoder(piece[1:].lower(), add_special_tokens=False)["input_ids"]
            assert found[place, 0].item() == pytest.approx(np.mean(spelled))
            there += 1
    assert there > 0


class Words:
    """A tokenizer that knows a few words."""

    def __init__(self, *words: str) -> None:
        self.ids = {word: i for i, word in enumerate(words)}

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, texts: list[str], **options: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self.ids[word] for word in text.split()] for text in texts]}


def test_translations_have_the_vectors_of_what_they_translate() -> None:
    words, foreign = ["a", "b", "c", "d", "e"], ["v", "w", "x", "y", "z"]
    tokenizer = Words(*words, *foreign, "unseen", "known")
    order = [(i, j) for i in range(5) for j in range(5) if i != j]
    texts = {
        "en": {f"{i}{j}": f"{words[i]} {words[j]}" for i, j in order},
        "xx": {f"{i}{j}": f"{foreign[j]} {foreign[i]}" for i, j in order},
    }
    vectors = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    known = torch.tensor([True] * 5 + [False] * 6 + [True])
    found, counts = transferred_vectors(tokenizer, [texts], vectors, known)
    assert found.shape == vectors.shape
    assert counts.tolist() == [8.0] * 10 + [0.0, 0.0]
    for i in range(5):
        cosine = torch.nn.functional.cosine_similarity(found[i], found[5:10])
        assert cosine.argmax() == i and cosine[i] > 0.9, (i, cosine)
    # What was in no sentence has its own vector, if any; all are centered together.
    torch.testing.assert_close(found[11] - found[0], vectors[11] - vectors[0])
    assert not found[10].any()
    torch.testing.assert_close(found.sum(0), torch.zeros(4), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="a text should have the pivot de, got en, xx"):
        transferred_vectors(tokenizer, [texts], vectors, known, pivot="de")
