"""What an encoder makes of a word, handed to the pieces of another tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchalignprune.crosslingual.inputs import longest_input

__all__ = ["piece_states"]


def piece_states(
    model: Any, tokenizer: Any, texts: Sequence[str], pieces: Any, *, batch_size: int = 64
) -> list[Tensor]:
    """Last states of a model's tokens, for the pieces that another tokenizer makes of the texts.

    A piece gets the state of the token that has its first character, blanks left out.

    Args:
        model: of Transformers, with or without a head; on any device. Middle layers know most about
            syntax: ``from_pretrained(..., num_hidden_layers=3)`` loads the first three only.
        tokenizer: its tokenizer, a fast one.
        texts: sentences.
        pieces: the other tokenizer, a fast one too; without its special tokens.
        batch_size: sentences at a time.

    Returns:
        For each text bfloat16 on the CPU, shape ``(pieces, hidden)``; fewer pieces, from the first
        on, where the model does not take the whole text.
    """
    encoder = getattr(model, "base_model", model)
    device = next(encoder.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    training = encoder.training
    encoder.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                own = [texts[i] for i in rows]
                batch = tokenizer(
                    own,
                    padding=True,
                    truncation=True,
                    max_length=longest_input(model, tokenizer),
                    return_offsets_mapping=True,
                    return_special_tokens_mask=True,
                    return_tensors="pt",
                )
                offsets = batch.pop("offset_mapping").numpy()
                ordinary = batch.pop("special_tokens_mask").numpy() == 0
                others = pieces(own, add_special_tokens=False, return_offsets_mapping=True)
                states = encoder(**batch.to(device)).last_hidden_state.to(torch.bfloat16)
                for place, row in enumerate(rows):
                    columns = np.flatnonzero(ordinary[place])
                    tokens = _tokens_of(
                        own[place], offsets[place][columns], others["offset_mapping"][place]
                    )
                    found[row] = states[place, torch.from_numpy(columns[tokens])].cpu()
    finally:
        encoder.train(training)
    return found


def _tokens_of(
    text: str, tokens: np.ndarray[Any, Any], pieces: Sequence[tuple[int, int]]
) -> np.ndarray[Any, Any]:
    """For each piece the token that has its first character, as far as the tokens go."""
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
