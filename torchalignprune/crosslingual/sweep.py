"""Fine-tuning that prunes to one sparsity after the other, with training after each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from torchalignprune import schedules
from torchalignprune.crosslingual.finetuning import finetune, steps_of
from torchalignprune.crosslingual.tasks import Task
from torchalignprune.pruner import Pruner
from torchalignprune.schedules import Schedule

if TYPE_CHECKING:
    import datasets

__all__ = ["SPARSITIES", "fast_dtype", "finetune_and_prune"]

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)

T = TypeVar("T")


def finetune_and_prune(
    model: nn.Module,
    tokenizer: Any,
    task: str | Task,
    rows: datasets.Dataset,
    evaluate: Callable[[], T],
    *,
    pruner: Callable[[Schedule], Pruner] | None,
    sparsities: Sequence[float] = SPARSITIES,
    epochs: float = 3,
    retraining_epochs: float = 1,
    batch_size: int = 32,
    seed: int = 0,
    trained: T | None = None,
    **options: Any,
) -> dict[float, T]:
    """Fine-tunes a dense model, then prunes and retrains it for each sparsity, in place.

    Iterative pruning with retraining: after ``epochs`` of dense training the model is evaluated.
    Then, for each sparsity, it is pruned, trained for ``retraining_epochs`` more and evaluated. One
    run thus gives all sparsities, each starting from the one before. Every stage has its own
    optimizer and its own learning rate schedule, which rises and falls to 0 (learning rate
    rewinding: Renda, Frankle and Carbin 2020, "Comparing rewinding and fine-tuning in neural
    network pruning"), so that no evaluation is in the middle of one. The model is pruned right
    after the first step of a stage, so that a criterion that watches gradients has some.

    A pruned model has trained for longer than the dense one that was evaluated first. To separate
    the effect of pruning from that of training, compare with a run of the same seed that trains as
    long and prunes nothing, ``pruner=None``: it sees the same batches.

    Args:
        model: as in :func:`torchalignprune.crosslingual.finetune`.
        tokenizer: likewise.
        task: likewise.
        rows: likewise.
        evaluate: called at the end of every stage.
        pruner: makes the pruner of the model from a schedule, such as
            ``lambda schedule: Pruner(params, AlignedMagnitude, schedule)``. None: prune nothing.
        sparsities: in increasing order, between 0 and 1.
        epochs: of dense training.
        retraining_epochs: after each pruning.
        batch_size: as in :func:`torchalignprune.crosslingual.finetune`.
        seed: of the run; every stage has its own order of the rows.
        trained: what ``evaluate`` returned after the dense stage, if the model has been through it
            with the same settings already: the stage is skipped.
        options: other arguments of ``finetune``.

    Returns:
        What ``evaluate`` returned, by sparsity, 0 for the dense model. The model keeps the pruner's
        masks.

    Raises:
        ValueError: the sparsities do not rise from above 0 to below 1; as ``finetune``.
        TypeError: ``pruner`` is not a function that makes a pruner; as ``finetune``.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> from transformers import PreTrainedTokenizerFast
        >>> import torchalignprune as tap
        >>> from torchalignprune.crosslingual import GENERATED_POS, generate_corpus
        >>> from torchalignprune.crosslingual import evaluate_zero_shot
        >>> corpus = generate_corpus(train=32, validation=0, test=10, raw=50)
        >>> words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> trainer = trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"])
        >>> words.train_from_iterator(corpus.raw["source"], trainer)
        >>> tokenizer = PreTrainedTokenizerFast(
        ...     tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
        ... )
        >>> config = BertConfig(
        ...     vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1,
        ...     num_attention_heads=1, intermediate_size=8, num_labels=len(GENERATED_POS.labels),
        ... )
        >>> model = BertForTokenClassification(config)
        >>> params = tap.prunable_parameters(model)
        >>> sweep = finetune_and_prune(
        ...     model,
        ...     tokenizer,
        ...     GENERATED_POS,
        ...     corpus.pos["source"]["train"],
        ...     lambda: evaluate_zero_shot(
        ...         model, tokenizer, GENERATED_POS, corpus.pos, supervised="source"
        ...     ),
        ...     pruner=lambda schedule: tap.Pruner(params, tap.AlignedMagnitude, schedule),
        ...     sparsities=[0.5, 0.9],
        ... )
        >>> list(sweep), [report.supervised for report in sweep.values()]
        ([0.0, 0.5, 0.9], ['source', 'source', 'source'])
    """
    levels = [0.0, *sparsities]
    if len(levels) < 2 or any(not a < b < 1 for a, b in itertools.pairwise(levels)):
        raise ValueError(
            f"sparsities should rise from above 0 to below 1, at least one, got {list(sparsities)}"
        )
    if pruner is not None and not callable(pruner):
        raise TypeError(
            "pruner should be a function that makes the Pruner from a schedule, or None, got "
            f"{pruner!r}"
        )
    for name, number in (("epochs", epochs), ("retraining_epochs", retraining_epochs)):
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} should be a number above 0, got {number}")
    lengths = [epochs, *[retraining_epochs] * len(sparsities)]
    begin, targets = 0, {0: 0.0}
    for level, length in zip(levels, lengths, strict=True):
        if level:
            targets[begin + 1] = level
        if level or trained is None:
            begin += steps_of(len(rows), length, batch_size)
    made = None if pruner is None else pruner(schedules.steps(targets))
    found = {} if trained is None else {0.0: trained}
    for stage, (level, length) in enumerate(zip(levels, lengths, strict=True)):
        if level in found:
            continue
        finetune(
            model,
            tokenizer,
            task,
            rows,
            pruner=made,
            epochs=length,
            batch_size=batch_size,
            seed=seed * len(levels) + stage,
            **options,
        )
        found[level] = evaluate()
    return found


def fast_dtype(device: torch.device | str) -> torch.dtype | None:
    """bfloat16 for ``autocast`` if the device multiplies it in hardware; otherwise None.

    GPUs of compute capability 8.0 or higher do, and CPUs with AMX, where it is several times as
    fast as float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else None
    # torch has no public name for this.
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return torch.bfloat16 if kind == "cpu" and tiles is not None and tiles() else None
