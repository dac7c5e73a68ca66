"""Finds a sentence's translation by its embedding: what an encoder can do without fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from torchalignprune.crosslingual.last_states import visit_last_states

__all__ = ["retrieval_hits", "sentence_embeddings", "sentence_means"]


def sentence_means(states: Tensor, special: Tensor) -> Tensor:
    """The mean of each sentence's states, in float32, special tokens left out.

    Args:
        states: shape ``(sentences, tokens, hidden)``.
        special: bool, shape ``(sentences, tokens)``: which tokens to leave out.

    Returns:
        Shape ``(sentences, hidden)``; zeros where all tokens are special.

    Example:
        >>> states = torch.tensor([[[9.0], [1.0], [3.0]]])
        >>> sentence_means(states, torch.tensor([[True, False, False]]))
        tensor([[2.]])
    """
    kept = (~special).unsqueeze(-1)
    return (states.float() * kept).sum(1) / kept.sum(1).clamp(min=1)


def sentence_embeddings(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 64
) -> Tensor:
    """Means of a model's last hidden states over the tokens of each text, normalized.

    A text with more tokens than the model takes is silently cut: two long texts that differ only at
    the end have the same embedding. Split long texts into sentences.

    Args:
        model: a Transformers model with or without a head, on any device.
        tokenizer: its tokenizer.
        texts: sentences.
        batch_size: sentences per batch.

    Returns:
        The embeddings, of length 1, float32 on the CPU, shape ``(sentences, hidden)``.
    """
    encoder = getattr(model, "base_model", model)
    found = torch.empty(len(texts), encoder.config.hidden_size)

    def visit(rows: list[int], states: Tensor, places: dict[str, Tensor]) -> None:
        special = places["special_tokens_mask"].bool().to(states.device)
        found[rows] = normalize(sentence_means(states, special), dim=1).cpu()

    visit_last_states(model, tokenizer, texts, batch_size, visit)
    return found


def retrieval_hits(a: Tensor, b: Tensor) -> Tensor:
    """Whether each sentence of ``a`` is nearest to its translation among all of ``b``.

    Args:
        a: embeddings of length 1, shape ``(sentences, width)``.
        b: embeddings of the translations, in the same order.

    Returns:
        bool, shape ``(sentences,)``. Its mean is the accuracy; chance is 1 / sentences.

    Example:
        >>> retrieval_hits(torch.eye(3), torch.eye(3)[[0, 2, 1]])
        tensor([ True, False, False])
    """
    return (a @ b.T).argmax(dim=1) == torch.arange(len(a), device=a.device)
