"""Fine-tunes a model on the rows of one language, with or without pruning it on the way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchalignprune import schedules
from torchalignprune.crosslingual.columns import column_names
from torchalignprune.crosslingual.inputs import (
    checked_length,
    checked_rows,
    encode_texts,
    label_places,
    padded,
)
from torchalignprune.crosslingual.tasks import Task, get_task
from torchalignprune.crosslingual.words import (
    IGNORED,
    BarePieces,
    check_bare_pieces,
    encode_words,
)
from torchalignprune.pruner import Pruner

if TYPE_CHECKING:
    import datasets

__all__ = ["FineTuning", "finetune", "steps_of"]

# How many batches of rows are drawn at a time and sorted by length.
_POOL = 50
_CLIPPED_AT = 1.0


@dataclass(frozen=True)
class FineTuning:
    """Statistics of a fine-tuning.

    Attributes:
        steps: the number of steps.
        losses: the mean task loss, without any penalty, of each epoch.
        penalty: the penalty at the end, not multiplied by its strength; None without one.
        cut_off: words that were not trained on because their sentence was too long; for texts and
            pairs: how many were cut.
    """

    steps: int
    losses: tuple[float, ...]
    penalty: float | None
    cut_off: int


def steps_of(rows: int, epochs: float, batch_size: int) -> int:
    """How many steps :func:`finetune` takes.

    Example:
        >>> steps_of(701, 2, 32), steps_of(701, 0.5, 32)
        (44, 11)
    """
    return max(1, round(epochs * math.ceil(rows / batch_size)))


def finetune(
    model: nn.Module,
    tokenizer: Any,
    task: str | Task,
    rows: datasets.Dataset,
    *,
    pruner: Pruner | None = None,
    penalty: nn.Module | None = None,
    strength: float = 0.0,
    epochs: float = 3,
    batch_size: int = 32,
    learning_rate: float = 5e-4,
    head_learning_rate: float | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    max_length: int | None = None,
    bare_pieces: BarePieces = "skip",
    seed: int = 0,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int], None] | None = None,
    progress: bool = False,
) -> FineTuning:
    """Fine-tunes a model on the rows of one language, in place, and prunes it on the way.

    A plain loop: AdamW, a learning rate that rises and then falls linearly to 0, gradients clipped
    to a norm of 1, and batches of sentences of similar length in a seeded order. A word's label is
    trained at its first subword with a character, not at a bare ``▁`` as by Transformers'
    ``run_ner.py`` (see :func:`torchalignprune.crosslingual.encode_words`). The model's outputs are
    matched to the labels by name, as in :func:`torchalignprune.crosslingual.evaluate_zero_shot`.
    On the CPU the same seed gives the same weights. torch's own random state does not change.

    Args:
        model: a Transformers model for token or sequence classification, on any device. It trains
            in the dtype of its parameters; those that do not require a gradient stay as they are.
        tokenizer: its tokenizer; a fast one if the task labels words.
        task: a task, or the name of one of :data:`torchalignprune.crosslingual.TASKS`.
        rows: the training rows, such as ``load_task(task, "en")["train"]``.
        pruner: a pruner of this model; its ``step()`` is called after every optimizer step. It
            continues its own count of steps, so that one pruner can go through several calls.
        penalty: a regularizer, such as :class:`torchalignprune.CosineAlignment`.
        strength: the factor of ``penalty()`` in the loss.
        epochs: passes over the rows; a fraction is rounded to whole steps, at least one.
        batch_size: sentences per step.
        learning_rate: its maximum.
        head_learning_rate: the same for the parameters outside the encoder
            (``model.base_model``), usually the classifier. Default: ``learning_rate``.
        warmup: the share of the steps in which the learning rate rises.
        weight_decay: of AdamW; biases and normalization have none.
        max_length: the most subwords of a sentence, special tokens included. Default: the limit of
            the model and the tokenizer.
        bare_pieces: whether a word's label is trained at a bare ``▁`` before it: ``"skip"`` or
            ``"label"``, as in ``encode_words``. Use ``"label"`` to continue with a model that was
            fine-tuned elsewhere, and to evaluate it.
        seed: of the order of the rows, and of dropout.
        autocast: ``torch.bfloat16`` for :func:`torch.autocast`, or None.
        on_step: called after every step with its number, from 1 on. It may evaluate the model and
            draw random numbers: training mode and random state are restored after it.
        progress: show a progress bar on standard error; needs tqdm.

    Returns:
        The statistics. The model is back in its former mode.

    Raises:
        ValueError: the rows or the model do not fit the task; a number is out of range; the pruner
            is finished or of another model. Nothing has changed then.
        TypeError: an argument has the wrong type; likewise.
        RuntimeError: the loss is not finite.
        ImportError: ``progress`` without tqdm.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from transformers import PreTrainedTokenizerFast
        >>> import torchalignprune as tap
        >>> from torchalignprune.crosslingual import GENERATED_TOPICS, generate_corpus
        >>> corpus = generate_corpus(train=64, validation=0, test=0, raw=50)
        >>> words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> trainer = trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"])
        >>> words.train_from_iterator(corpus.raw["source"], trainer)
        >>> tokenizer = PreTrainedTokenizerFast(
        ...     tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
        ... )
        >>> config = BertConfig(
        ...     vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1,
        ...     num_attention_heads=1, intermediate_size=8, num_labels=len(GENERATED_TOPICS.labels),
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> params = tap.prunable_parameters(model.bert)
        >>> pruner = tap.Pruner(params, tap.AlignedMagnitude, tap.schedules.cubic(0, 0.7, end=6))
        >>> rows = corpus.topics["source"]["train"]
        >>> found = finetune(
        ...     model, tokenizer, GENERATED_TOPICS, rows, pruner=pruner, epochs=4, batch_size=32
        ... )
        >>> found.steps, len(found.losses), round(pruner.sparsity(), 2)
        (8, 4, 0.7)
    """
    task = get_task(task)
    _check_numbers(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        strength=strength,
    )
    if autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast should be torch.bfloat16 or None, got {autocast}; float16 needs loss "
            "scaling, which this loop does not do"
        )
    _check_pruner(pruner, model)
    if penalty is not None and not isinstance(penalty, nn.Module):
        raise TypeError(f"penalty should be a regularizer such as CosineAlignment, got {penalty!r}")
    if strength and penalty is None:
        raise ValueError(f"strength goes with a penalty, got {strength} without one")
    check_bare_pieces(bare_pieces)
    longest = checked_length(model, tokenizer, max_length)
    outputs = _outputs(model, task)
    rows = checked_rows(rows, task, "these rows", "train")
    inputs, labels, cut_off = _encode(tokenizer, task, rows, outputs, longest, bare_pieces)
    groups = _parameter_groups(
        model, learning_rate, head_learning_rate or learning_rate, weight_decay
    )
    trained = [parameter for group in groups for parameter in group["params"]]
    device = trained[0].device
    steps = steps_of(len(inputs), epochs, batch_size)
    with _bar(steps, progress) as advance, _training(model), _seeded(device, seed):
        optimizer = torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))
        rising = min(round(warmup * steps), steps - 1)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(steps, rising))
        losses = _Losses(math.ceil(len(inputs) / batch_size))
        lengths = [len(row["input_ids"]) for row in inputs]
        for step, chosen in zip(
            range(1, steps + 1), _batches(lengths, batch_size, seed), strict=False
        ):
            batch = padded(
                [inputs[i] | {"labels": labels[i]} for i in chosen],
                tokenizer.pad_token_id,
                labels=IGNORED,
            )
            batch = {key: value.to(device) for key, value in batch.items()}
            gold = batch.pop("labels")
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                logits = model(**batch).logits
            loss = _loss(logits, gold, task, len(outputs))
            losses.add(loss, step)
            if penalty is not None and strength:
                loss = loss + strength * penalty()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, _CLIPPED_AT)
            optimizer.step()
            rates.step()
            if pruner is not None:
                pruner.step()
            if on_step is not None:
                with torch.random.fork_rng(**_generators(device)):
                    on_step(step)
                model.train()
            advance(1)
        optimizer.zero_grad()  # frees the gradients
    with torch.no_grad():
        remaining = None if penalty is None else float(penalty())
    return FineTuning(steps, losses.means(), remaining, cut_off)


class _Losses:
    """The mean task loss of each epoch, read from the device only once per epoch."""

    def __init__(self, steps_per_epoch: int) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._sum: Tensor | None = None
        self._count = 0
        self._means: list[float] = []

    def add(self, loss: Tensor, step: int) -> None:
        loss = loss.detach()
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1
        if step % self._steps_per_epoch == 0:
            self._end()

    def _end(self) -> None:
        assert self._sum is not None
        mean = float(self._sum) / self._count
        if not math.isfinite(mean):
            raise RuntimeError(
                f"the loss is {mean} in epoch {len(self._means) + 1}: a lower learning_rate, or a "
                "lower strength, may help"
            )
        self._means.append(mean)
        self._sum, self._count = None, 0

    def means(self) -> tuple[float, ...]:
        if self._count:
            self._end()
        return tuple(self._means)


def _check_numbers(**numbers: float | None) -> None:
    for name in ("epochs", "learning_rate", "head_learning_rate"):
        number = numbers[name]
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} should be a number above 0, got {number}")
    for name in ("weight_decay", "strength"):
        number = numbers[name]
        if number is None or not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} should be a number of at least 0, got {number}")
    if not isinstance(numbers["batch_size"], int) or numbers["batch_size"] < 1:
        raise ValueError(f"batch_size should be at least 1, got {numbers['batch_size']}")
    if numbers["warmup"] is None or not 0 <= numbers["warmup"] < 1:
        raise ValueError(f"warmup should be a share from 0 to below 1, got {numbers['warmup']}")


def _check_pruner(pruner: Pruner | None, model: nn.Module) -> None:
    if pruner is None:
        return
    if not isinstance(pruner, Pruner):
        raise TypeError(f"pruner should be a Pruner, got {pruner!r}")
    if pruner.finished:
        raise ValueError("pruner should not be finished, got one whose finalize() was called")
    own = set(model.modules())
    if any(module not in own for module, _ in pruner.params):
        raise ValueError("pruner should be of this model, got one with parameters of another")


def _outputs(model: nn.Module, task: Task) -> Tensor:
    """For each of the task's labels, the index of the model's output that stands for it."""
    places = label_places(model, task).tolist()
    return torch.tensor([places.index(label) for label in range(len(task.labels))])


def _encode(
    tokenizer: Any,
    task: Task,
    rows: Any,
    outputs: Tensor,
    max_length: int,
    bare_pieces: BarePieces,
) -> tuple[list[dict[str, list[int]]], list[list[int]], int]:
    """The inputs and the target outputs of each row, and how much was cut off."""
    columns = rows[:]
    gold = columns[column_names(task)[-1]]
    if task.kind == "words":
        ids = [[int(outputs[label]) for label in labels] for labels in gold]
        sentences = encode_words(
            tokenizer, columns["tokens"], ids, max_length=max_length, bare_pieces=bare_pieces
        )
        inputs = [sentence.inputs for sentence in sentences]
        cut_off = sum(sentence.cut_off for sentence in sentences)
        return inputs, [sentence.labels for sentence in sentences], cut_off
    inputs, cut_off = encode_texts(tokenizer, task, columns, max_length)
    return inputs, [[int(outputs[label])] for label in gold], cut_off


def _parameter_groups(
    model: nn.Module, learning_rate: float, head_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    encoder = getattr(model, "base_model", model)
    in_encoder = {id(parameter) for parameter in encoder.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = learning_rate if id(parameter) in in_encoder else head_learning_rate
            decay = weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise ValueError("model should have parameters that require a gradient, got none")
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _rate(steps: int, rising: int) -> Callable[[int], float]:
    """The factor of the learning rate, as a function of the number of steps done."""
    fall = schedules.linear(1.0, 0.0, begin=0, end=steps - rising)
    if not rising:
        return fall
    # The first step already has a rate above 0.
    rise = schedules.linear(1 / (rising + 1), 1.0, end=rising)
    return schedules.join([rise, fall], [rising])


def _batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yields batches of row indices without end; each epoch has every row once."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), _POOL * batch_size):
            pool = sorted(order[start : start + _POOL * batch_size], key=lambda i: lengths[i])
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def _loss(logits: Tensor, gold: Tensor, task: Task, labels: int) -> Tensor:
    dims = 2 + (task.kind == "words")
    if logits.dim() != dims or logits.shape[-1] < labels:
        raise ValueError(
            f"the model should give at least {labels} logits for each "
            f"{'subword' if task.kind == 'words' else 'text'}, got shape {tuple(logits.shape)} "
            f"for {len(gold)} rows of {task.name}"
        )
    flat = functional.cross_entropy(
        logits.flatten(0, -2).float(), gold.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    # A batch may have no labelled word.
    return flat / (gold != IGNORED).sum().clamp(min=1)


def _generators(device: torch.device) -> dict[str, Any]:
    """Arguments of :func:`torch.random.fork_rng` for the random states that a loop changes."""
    if device.type == "cpu":
        return {"devices": []}
    count = torch.get_device_module(device).device_count()
    return {"devices": range(count), "device_type": device.type}


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(**_generators(device)):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _bar(total: int, visible: bool) -> Iterator[Callable[[int], Any]]:
    if not visible:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="fine-tuning", unit="step", leave=False) as bar:
        yield bar.update
