"""The tensor parallel plans of Transformers: pruned as one process prunes the whole model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedConfig, logging
from transformers.distributed import DistributedConfig

import torchalignprune as tap
from ranks import Ranks
from torchalignprune.parameters import mask_of, stored

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def planned(folder: str) -> None:
    # torch's own, about how DTensor arguments are handed on.
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    parallel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, distributed_config=DistributedConfig(tp_plan="auto")
    )
    models = (parallel, plain)
    words = torch.arange(16).reshape(2, 8)
    params = [tap.prunable_parameters(model) for model in models]
    assert params[0].names == params[1].names
    assert all(isinstance(stored(*p), DTensor) for p in params[0])
    penalties = []
    for own in params:
        reference = tap.Reference.capture(own)
        tap.global_unstructured(own, tap.AlignedMagnitude, amount=0.5)
        penalties.append(tap.CosineAlignment(own, reference))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, foreach=False) for m in models]
    for _ in range(2):
        values = []
        for model, penalty, optimizer in zip(models, penalties, optimizers, strict=True):
            loss = model(input_ids=words, labels=words).loss
            value = penalty()
            (loss + value).backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append((loss.item(), value.item()))
        assert values[0] == pytest.approx(values[1], rel=1e-9)
        with torch.no_grad():  # other code in Transformers
            logits = [whole(model(input_ids=words).logits) for model in models]
        torch.testing.assert_close(*logits)
    for p, twin in zip(*params, strict=True):
        assert torch.equal(whole(mask_of(*p)), mask_of(*twin))
        torch.testing.assert_close(whole(stored(*p)), stored(*twin).detach())


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SIZES), Phi3Config(**SIZES)], ids=["llama", "phi3"]
)
def test_plans(ranks: Ranks, tmp_path: Path, config: PreTrainedConfig) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ranks.run(2, planned, str(tmp_path))
