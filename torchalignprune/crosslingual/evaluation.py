"""Evaluates a model in every language of a task."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from torchalignprune.crosslingual.columns import column_names
from torchalignprune.crosslingual.inputs import (
    checked_length,
    checked_rows,
    encode_texts,
    evaluating,
    label_places,
    padded,
)
from torchalignprune.crosslingual.readers import load_task
from torchalignprune.crosslingual.report import LanguageScore, ZeroShotReport, check_drawing
from torchalignprune.crosslingual.spans import span_counts
from torchalignprune.crosslingual.tasks import Task, get_task
from torchalignprune.crosslingual.words import BarePieces, check_bare_pieces, encode_words

if TYPE_CHECKING:
    import datasets

__all__ = ["evaluate_zero_shot"]

# How many sentences are sorted by length and batched at a time.
_SORTED = 4096
# Replaces the predicted label where a logit is NaN, which argmax takes for the largest. Only at the
# padding, where some models give NaN, is that no error.
_NAN = -2


def evaluate_zero_shot(
    model: nn.Module,
    tokenizer: Any,
    task: str | Task,
    languages: Sequence[str] | Mapping[str, datasets.DatasetDict],
    *,
    data: str | Path | None = None,
    split: str = "test",
    supervised: str | None = "en",
    batch_size: int = 32,
    max_length: int | None = None,
    bare_pieces: BarePieces = "skip",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> ZeroShotReport:
    """Evaluates a model that was fine-tuned on one language in that language and in others.

    POS tagging is scored by accuracy over words, entities by the micro-averaged F1 of strict IOB2
    spans (:func:`torchalignprune.crosslingual.spans.spans`), texts and pairs by accuracy.

    A word is predicted at its first subword with a character, where
    :func:`torchalignprune.crosslingual.finetune` trains its label. A model that was fine-tuned
    elsewhere, for example by Transformers' ``run_ner.py`` or XTREME's scripts, has learned to label
    a bare ``▁`` too: pass ``bare_pieces="label"`` for it. A word that the model never sees counts
    as wrong (for entities, as outside of any), whether its sentence was too long or the tokenizer
    gives it no subword. Scores are thus over the same words for every model and tokenizer. The
    report counts the words that were not seen.

    The model's outputs are matched to the task's labels by their names in
    ``model.config.id2label``, in any order. Without names (``LABEL_0``, ...) there must be as many
    as the task has labels, in the task's order.

    Args:
        model: a Transformers model for token or sequence classification, on any device, in any
            dtype, pruned or not. It is in evaluation mode during the call.
        tokenizer: its tokenizer; a fast one if the task labels words.
        task: a task, or the name of one of :data:`torchalignprune.crosslingual.TASKS`.
        languages: language codes, which :func:`torchalignprune.crosslingual.load_task` reads; or a
            mapping from codes to data as that function returns it.
        data: a folder to read from, instead of the hub.
        split: ``"test"``, ``"validation"`` or ``"train"``.
        supervised: the one of the languages that the model was fine-tuned on; None if none of them.
        batch_size: sentences per batch.
        max_length: the most subwords of a sentence, special tokens included. Default: the limit of
            the model and the tokenizer.
        bare_pieces: whether a word is predicted at a bare ``▁`` before it: ``"skip"`` or
            ``"label"``, as in :func:`torchalignprune.crosslingual.encode_words`.
        level: the coverage of the intervals.
        resamples: the number of bootstrap resamples for the intervals.
        seed: of the resamples.
        progress: show a progress bar on standard error; needs tqdm.

    Returns:
        The report.

    Raises:
        ValueError: a language, a split or a column is missing; the labels do not fit; a number is
            out of range; the model gives NaN.
        TypeError: ``languages`` is one string; its data is not of ``datasets``; the tokenizer is
            slow and the task labels words.
        OSError: the hub cannot be reached.
        ImportError: datasets is not installed (``pip install "torchalignprune[crosslingual]"``).

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> from transformers import PreTrainedTokenizerFast
        >>> from torchalignprune.crosslingual import GENERATED_POS, generate_corpus
        >>> corpus = generate_corpus(train=0, validation=0, test=20, raw=50)
        >>> words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> trainer = trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"])
        >>> words.train_from_iterator(sum(corpus.raw.values(), []), trainer)
        >>> tokenizer = PreTrainedTokenizerFast(
        ...     tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
        ... )
        >>> config = BertConfig(
        ...     vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1,
        ...     num_attention_heads=1, intermediate_size=8, num_labels=len(GENERATED_POS.labels),
        ... )
        >>> model = BertForTokenClassification(config)
        >>> report = evaluate_zero_shot(
        ...     model, tokenizer, GENERATED_POS, corpus.pos, supervised="source"
        ... )
        >>> report.parallel, report.zero_shot
        (True, ['near', 'middle', 'far', 'remote'])
    """
    task = get_task(task)
    codes = _checked(languages, data, supervised)
    check_drawing(level, resamples, seed)
    if batch_size < 1:
        raise ValueError(f"batch_size should be at least 1, got {batch_size}")
    check_bare_pieces(bare_pieces)
    longest = checked_length(model, tokenizer, max_length)
    places = label_places(model, task)
    read = {}
    for code in codes:
        if isinstance(languages, Mapping):
            splits = languages[code]
        else:
            splits = load_task(task, code, data, splits=[split])
        read[code] = _rows(splits, task, code, split)
    runner = _Runner(model, tokenizer, task, places, longest, batch_size, bare_pieces)
    digests = {code: row_digests(rows, task) for code, rows in read.items()}
    parallel = task.parallel and len({ids for _, ids in digests.values()}) == 1
    scores = {}
    with evaluating(model), _bar(sum(map(len, read.values())), progress) as advance:
        for code, rows in read.items():
            counts = runner.run(rows, advance)
            scores[code] = LanguageScore(*counts, *digests[code])
    return ZeroShotReport(
        task.name,
        task.metric,
        split,
        scores,
        supervised=supervised,
        parallel=parallel,
        level=level,
        resamples=resamples,
        seed=seed,
    )


def _checked(
    languages: Sequence[str] | Mapping[str, Any], data: str | Path | None, supervised: str | None
) -> list[str]:
    if isinstance(languages, str):
        raise TypeError(f"languages should be a list of codes, got {languages!r}")
    codes = list(languages)
    if not codes or len(set(codes)) != len(codes):
        raise ValueError(f"languages should be one or more different codes, got {codes}")
    if isinstance(languages, Mapping) and data is not None:
        raise ValueError("data goes with language codes, not with data that is already read")
    if supervised is not None and supervised not in codes:
        raise ValueError(
            f"supervised should be one of the languages, {', '.join(codes)}, or None, got "
            f"{supervised!r}"
        )
    return codes


def _rows(splits: Any, task: Task, language: str, split: str) -> Any:
    if split not in splits:
        raise ValueError(
            f"{task.name} in {language} has no split {split!r}, only {', '.join(splits)}"
        )
    return checked_rows(splits[split], task, language, split)


@dataclass
class _Runner:
    """Runs the model over the sentences of one language at a time."""

    model: nn.Module
    tokenizer: Any
    task: Task
    places: Tensor
    max_length: int
    batch_size: int
    bare_pieces: BarePieces

    def run(self, rows: Any, advance: Any) -> tuple[Any, Any, int, int]:
        """``hits``, ``out_of``, ``cut_off`` and ``unmapped`` of a :class:`LanguageScore`."""
        hits = np.zeros(len(rows), np.int64)
        out_of = np.zeros(len(rows), np.int64)
        cut_off = unmapped = 0
        for start in range(0, len(rows), _SORTED):
            part = rows[start : start + _SORTED]
            labels = part[column_names(self.task)[-1]]
            if self.task.kind == "words":
                sentences = encode_words(
                    self.tokenizer,
                    part["tokens"],
                    max_length=self.max_length,
                    bare_pieces=self.bare_pieces,
                )
                inputs = [sentence.inputs for sentence in sentences]
                cut_off += sum(sentence.cut_off for sentence in sentences)
                unmapped += sum(sentence.unmapped for sentence in sentences)
            else:
                inputs, cut = encode_texts(self.tokenizer, self.task, part, self.max_length)
                cut_off += cut
            for i, predicted in self._predict(inputs, advance):
                words = self.task.kind == "words"
                places = sentences[i].first if words else [0]
                found = [predicted[at] if at >= 0 else -1 for at in places]
                if _NAN in found:
                    raise ValueError(f"the model should give numbers, got NaN for {self.task.name}")
                counts = self._count_words(labels[i], found) if words else (found == [labels[i]], 1)
                hits[start + i], out_of[start + i] = counts
        return hits, out_of, cut_off, unmapped

    def _count_words(self, gold: Sequence[int], found: Sequence[int]) -> tuple[int, int]:
        if self.task.metric == "accuracy":
            return sum(a == b for a, b in zip(gold, found, strict=True)), len(gold)
        names = self.task.labels
        outside = names.index("O")
        return span_counts(
            [names[label] for label in gold],
            [names[label if label >= 0 else outside] for label in found],
        )

    def _predict(
        self, inputs: list[dict[str, list[int]]], advance: Any
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields the index of each row, with the label predicted for it or for each subword."""
        order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]["input_ids"]))
        device = next(self.model.parameters()).device
        places = self.places.to(device)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = padded([inputs[i] for i in rows], self.tokenizer.pad_token_id)
            logits = self.model(**{key: value.to(device) for key, value in batch.items()}).logits
            if logits.shape[-1] != len(places) or logits.dim() != 2 + (self.task.kind == "words"):
                raise ValueError(
                    f"the model should give {len(places)} logits for each "
                    f"{'subword' if self.task.kind == 'words' else 'text'}, got shape "
                    f"{tuple(logits.shape)} for {len(rows)} rows of {self.task.name}"
                )
            found = places[logits.argmax(-1)].masked_fill(logits.isnan().any(-1), _NAN)
            predicted = found.reshape(len(rows), -1).tolist()
            yield from zip(rows, predicted, strict=True)
            advance(len(rows))


def row_digests(rows: Any, task: Task) -> tuple[str, str]:
    """Hashes of the sentences with their labels, and of their ids."""
    content, ids = hashlib.sha256(), hashlib.sha256()
    names = column_names(task)
    for start in range(0, len(rows), _SORTED):
        part = rows[start : start + _SORTED]
        for row in zip(*[part[name] for name in names], strict=True):
            content.update(repr(row).encode())
        for name in part.get("id", range(start, start + len(part[names[0]]))):
            ids.update(f"{name}\n".encode())
    return content.hexdigest()[:16], ids.hexdigest()[:16]


@contextmanager
def _bar(total: int, visible: bool) -> Iterator[Any]:
    if not visible:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="evaluating", unit="sentence", leave=False) as bar:
        yield bar.update
