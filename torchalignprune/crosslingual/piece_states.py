"""Hands an encoder's hidden states to the pieces of another tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchalignprune.crosslingual.last_states import visit_last_states

__all__ = ["piece_states"]


def piece_states(
    model: Any, tokenizer: Any, texts: Sequence[str], pieces: Any, *, batch_size: int = 64
) -> list[Tensor]:
    """A model's last hidden states, for the pieces that another tokenizer makes of the texts.

    A piece gets the state of the token with the piece's first character that is not blank.

    Args:
        model: a Transformers model with or without a head, on any device. Middle layers know most
            about syntax: ``from_pretrained(..., num_hidden_layers=3)`` loads only the first three.
        tokenizer: its tokenizer, a fast one.
        texts: sentences.
        pieces: the other tokenizer, a fast one too; its special tokens are left out.
        batch_size: sentences per batch.

    Returns:
        For each text a bfloat16 tensor on the CPU, shape ``(pieces, hidden)``. If the model does
        not take the whole text, only its first pieces are there.
    """
    found: list[Tensor] = [torch.empty(0)] * len(texts)

    def visit(rows: list[int], states: Tensor, places: dict[str, Tensor]) -> None:
        own = [texts[i] for i in rows]
        others = pieces(own, add_special_tokens=False, return_offsets_mapping=True)
        ordinary = places["special_tokens_mask"].numpy() == 0
        offsets = places["offset_mapping"].numpy()
        kept = states.to(torch.bfloat16)
        for place, row in enumerate(rows):
            columns = np.flatnonzero(ordinary[place])
            tokens = _tokens_of(
                own[place], offsets[place][columns], others["offset_mapping"][place]
            )
            found[row] = kept[place, torch.from_numpy(columns[tokens])].cpu()

    visit_last_states(model, tokenizer, texts, batch_size, visit, offsets=True)
    return found


def _tokens_of(
    text: str, tokens: np.ndarray[Any, Any], pieces: Sequence[tuple[int, int]]
) -> np.ndarray[Any, Any]:
    """For each piece, the token that has its first character, as far as the tokens go."""
    if not len(tokens):
        return np.zeros(0, np.int64)
    firsts = []
    for begin, end in pieces:
        while begin < end and text[begin].isspace():
            begin += 1
        firsts.append(begin)
    reached = np.asarray(firsts, np.int64)
    reached = reached[: int(np.searchsorted(reached, tokens[-1, 1]))]
    found: np.ndarray[Any, Any] = np.searchsorted(tokens[:, 0], reached, side="right") - 1
    return found.clip(min=0)
