"""An encoder's last hidden states, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchalignprune.crosslingual.inputs import evaluating, longest_input

__all__ = ["visit_last_states"]


def visit_last_states(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int,
    visit: Callable[[list[int], Tensor, dict[str, Tensor]], None],
    *,
    offsets: bool = False,
) -> None:
    """Runs a model over texts, in evaluation mode and without gradients, the longest ones first.

    Args:
        model: a Transformers model with or without a head, on any device.
        tokenizer: its tokenizer.
        texts: sentences, cut where they are too long.
        batch_size: sentences per batch.
        visit: called for each batch with the indices of its texts, their last hidden states, shape
            ``(sentences, tokens, hidden)``, and ``special_tokens_mask`` on the CPU, in a dict.
        offsets: put ``offset_mapping`` into the dict too; needs a fast tokenizer.
    """
    encoder = getattr(model, "base_model", model)
    device = next(encoder.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    with evaluating(encoder):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=longest_input(model, tokenizer),
                return_special_tokens_mask=True,
                return_offsets_mapping=offsets,
                return_tensors="pt",
            )
            names = ["special_tokens_mask", *["offset_mapping"] * offsets]
            places = {name: batch.pop(name) for name in names}
            visit(rows, encoder(**batch.to(device)).last_hidden_state, places)
