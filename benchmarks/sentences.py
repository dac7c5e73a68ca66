"""What the benchmarks on a real encoder share: all-MiniLM-L6-v2, its batches and embeddings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import torchalignprune as tap
from torchalignprune.checkpoints import load_checkpoint, quiet_transformers
from torchalignprune.demo import encoder_folder

BATCH = 32


class Encoder:
    """The dense encoder, and copies of it to prune."""

    def __init__(self) -> None:
        folder = encoder_folder()
        with quiet_transformers():
            from transformers import AutoTokenizer

            self.model = load_checkpoint(folder).model.eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.params = tap.prunable_parameters(self.model)

    def batches(self, sentences: Sequence[str]) -> list[Any]:
        """Batches of sentences of similar length."""
        ordered = sorted(sentences, key=len)
        return [
            self.tokenizer(
                ordered[start : start + BATCH],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            for start in range(0, len(ordered), BATCH)
        ]

    def calibrate(self, sentences: Sequence[str]) -> tap.Calibration:
        return tap.Calibration.collect(
            self.model, self.batches(sentences), self.params, statistics="covariance"
        )

    def copy(
        self, calibration: tap.Calibration
    ) -> tuple[nn.Module, tap.PrunableParameters, tap.Calibration]:
        """A copy of the model, its parameters, and the calibration keyed by these."""
        model = copy.deepcopy(self.model)
        params = tap.prunable_parameters(model)
        pairs = zip(params, self.params, strict=True)
        return model, params, tap.Calibration({own: calibration[pair] for own, pair in pairs})

    def dense(self, params: tap.PrunableParameters) -> dict[tuple[nn.Module, str], Tensor]:
        """The dense weights, keyed by the parameters of a copy."""
        pairs = zip(params, self.params, strict=True)
        return {own: getattr(*pair).detach() for own, pair in pairs}


def embed(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    """Normalized means over tokens, float64, shape ``(sentences, hidden size)``."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            states = model(**batch).last_hidden_state.double()
            mask = batch["attention_mask"].unsqueeze(-1).to(states)
            means = (states * mask).sum(dim=1) / mask.sum(dim=1)
            rows.append(nn.functional.normalize(means, dim=1))
    return torch.cat(rows)


def cosine(model: nn.Module, batches: Sequence[Any], embeddings: Tensor) -> Tensor:
    """The cosine between this model's embedding and the given one, for each sentence."""
    return (embed(model, batches) * embeddings).sum(dim=1)
