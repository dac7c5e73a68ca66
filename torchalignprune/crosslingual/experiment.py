"""The zero-shot experiment: fine-tune on English, prune on the way, evaluate in every language."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchalignprune.calibration import Calibration
from torchalignprune.checkpoints import quiet_transformers
from torchalignprune.crosslingual.columns import import_datasets
from torchalignprune.crosslingual.evaluation import evaluate_zero_shot, row_digests
from torchalignprune.crosslingual.inputs import longest_input, padded
from torchalignprune.crosslingual.readers import available_languages, load_task
from torchalignprune.crosslingual.recipes import RECIPES, Collect, make_penalty
from torchalignprune.crosslingual.report import ZeroShotReport
from torchalignprune.crosslingual.sweep import SPARSITIES, finetune_and_prune
from torchalignprune.crosslingual.tasks import Task, get_task
from torchalignprune.hooks import cached_weights
from torchalignprune.parameters import prunable_parameters
from torchalignprune.pruner import Pruner
from torchalignprune.reference import Reference
from torchalignprune.schedules import Schedule

if TYPE_CHECKING:
    import datasets

__all__ = ["DENSE", "ENGLISH", "Experiment", "Training"]

ENGLISH = "en"
DENSE = "dense"
"""The method that prunes nothing, and trains as long as the others."""

_CALIBRATION_SENTENCES = 256


@dataclass(frozen=True)
class Training:
    """How long and how fast to train.

    Attributes:
        epochs: of dense training.
        retraining_epochs: after each pruning.
        batch_size: sentences per step.
        learning_rate: its maximum.
        head_learning_rate: the same for the classifier; None: ``learning_rate``.
        autocast: the dtype for :func:`torch.autocast`, in training and evaluation, or None.
    """

    epochs: float = 3
    retraining_epochs: float = 1
    batch_size: int = 32
    learning_rate: float = 2e-4
    head_learning_rate: float | None = 1e-3
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Experiment:
    """A model and its data: what all runs have in common.

    Attributes:
        model: a folder or the name of a model on the hub.
        tokenizer: its tokenizer.
        task: the task to train on.
        evaluated: the task to evaluate the languages on: the same, or one with the same labels.
        train: the English training rows.
        validation: the English validation rows, to choose settings by; None if there are none.
        test: the rows of each language, English first.
        calibration: the ``"english"`` and the ``"multilingual"`` calibration texts.
    """

    model: str
    tokenizer: Any
    task: Task
    evaluated: Task
    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: Mapping[str, datasets.DatasetDict]
    calibration: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _dense: dict[Any, tuple[dict[str, Tensor], ZeroShotReport]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def load(
        cls,
        model: str | Path,
        task: str,
        evaluated: str,
        data: Path | None,
        *,
        languages: Sequence[str] | None = None,
        sentences: int | None = None,
        multilingual: bool = True,
    ) -> Experiment:
        """Loads the tokenizer and the data.

        The ``"english"`` calibration texts are up to 256 training rows, without their labels; the
        ``"multilingual"`` ones are 256 training rows of SIB-200, from all of the evaluated
        languages that it has.

        Args:
            model: a folder or a name on the hub.
            task: the task to train on.
            evaluated: the task to evaluate the languages on.
            data: a folder to read from; None: the hub.
            languages: the languages to evaluate besides English. Default: all of
                :func:`~torchalignprune.crosslingual.available_languages`.
            sentences: how many rows of each language to evaluate on, evenly spread. Default: all.
            multilingual: read the multilingual calibration texts.

        Raises:
            ValueError: a language or a split is missing; the data or the tokenizer cannot be used.
            OSError: there is no such model; the hub cannot be reached.
        """
        from transformers import AutoTokenizer

        there = available_languages(evaluated, data, others=languages is not None)
        chosen = there if languages is None else languages
        if missing := [code for code in [ENGLISH, *chosen] if code not in there]:
            raise ValueError(
                f"languages should be among those of {evaluated}, {', '.join(there)}, got "
                f"{missing[0]!r}"
            )
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(model))
        splits = load_task(task, ENGLISH, data)
        if "train" not in splits:
            raise ValueError(
                f"{task} in {ENGLISH} should have a split 'train' to learn from, got only "
                f"{', '.join(splits)}"
            )
        test = {
            code: _test_rows(load_task(evaluated, code, data, splits=["test"])["test"], sentences)
            for code in dict.fromkeys([ENGLISH, *chosen])
        }
        calibration = {"english": _spread(_texts(splits["train"]), _CALIBRATION_SENTENCES)}
        if multilingual:
            calibration["multilingual"] = _multilingual(list(test), data)
        validation = splits.get("validation")
        return cls(
            str(model),
            tokenizer,
            get_task(task),
            get_task(evaluated),
            splits["train"],
            validation if validation is None else _evenly(validation, sentences),
            test,
            calibration,
        )

    def run(
        self,
        method: str,
        regularizer: str,
        strength: float,
        seed: int,
        training: Training,
        *,
        sparsities: Sequence[float] = SPARSITIES,
        validation: bool = False,
        progress: bool = False,
        device: str | torch.device = "cpu",
    ) -> dict[float, ZeroShotReport]:
        """Runs a method through all sparsities.

        With the same seed, all methods and regularizers start from the same classifier and see the
        same batches with the same dropout. Dense training is then the same for all methods, and a
        run reuses that of the run before if it had the same settings, other than the method and
        the values of as many sparsities. Criteria that watch the gradients need their own.

        Args:
            method: one of :data:`~torchalignprune.crosslingual.recipes.RECIPES`, or ``"dense"``.
            regularizer: one of ``REGULARIZERS`` there; it keeps the encoder's units aligned with
                the pretrained ones.
            strength: of the regularizer.
            seed: of the run.
            training: how long and how fast to train.
            sparsities: in increasing order.
            validation: evaluate on the English validation rows instead of on the languages.
            progress: show a progress bar; needs tqdm.
            device: where to run.

        Returns:
            A report for each sparsity, and for 0.

        Raises:
            ValueError: the method or the regularizer is unknown; there are no validation rows; as
                :func:`torchalignprune.crosslingual.finetune_and_prune`.
        """
        if method != DENSE and method not in RECIPES:
            raise ValueError(
                f"method should be one of {', '.join([DENSE, *RECIPES])}, got {method!r}"
            )
        languages, split = self.test, "test"
        if validation:
            if self.validation is None:
                raise ValueError(f"{self.task.name} in {ENGLISH} has no validation rows")
            rows = import_datasets().DatasetDict(validation=self.validation)
            languages, split = {ENGLISH: rows}, "validation"
        model = self.new_model(seed).to(device)
        params = prunable_parameters(model)
        reference = Reference.capture(params)
        penalty = make_penalty(regularizer, params, reference)

        def evaluate() -> ZeroShotReport:
            with self._autocast(model, training), torch.no_grad(), cached_weights():
                return evaluate_zero_shot(
                    model,
                    self.tokenizer,
                    self.task if validation else self.evaluated,
                    languages,
                    split=split,
                    supervised=ENGLISH,
                )

        recipe = RECIPES.get(method)
        collect: Collect | None = None
        if recipe is not None and recipe.calibration is not None:
            batches = self._calibration_batches(model, recipe.calibration)

            def collect() -> Calibration:
                with self._autocast(model, training):
                    return Calibration.collect(model, batches, params)

        def make_pruner(schedule: Schedule) -> Pruner:
            assert recipe is not None
            return recipe.pruner(params, schedule, collect, reference)

        trained = None
        # The seed of the dense stage depends on the number of stages.
        stages = len(sparsities)
        settings = (regularizer, strength, seed, stages, training, validation, str(device))
        if settings in self._dense and (recipe is None or recipe.criterion is None):
            weights, trained = self._dense[settings]
            model.load_state_dict(weights)

        def evaluate_and_keep() -> ZeroShotReport:
            report = evaluate()
            if settings not in self._dense:
                self._dense.clear()
                self._dense[settings] = (_unmasked_state(model), report)
            return report

        return finetune_and_prune(
            model,
            self.tokenizer,
            self.task,
            self.train,
            evaluate_and_keep,
            trained=trained,
            pruner=None if recipe is None else make_pruner,
            sparsities=sparsities,
            epochs=training.epochs,
            retraining_epochs=training.retraining_epochs,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            head_learning_rate=training.head_learning_rate,
            autocast=training.autocast,
            penalty=penalty,
            strength=0.0 if penalty is None else strength,
            seed=seed,
            progress=progress,
        )

    def new_model(self, seed: int) -> Any:
        """The pretrained encoder in float32, with a classifier initialized by the seed."""
        import transformers

        kind = "TokenClassification" if self.task.kind == "words" else "SequenceClassification"
        labels = self.task.labels
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
                self.model,
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                dtype=torch.float32,
            )

    def chance(self) -> dict[str, float]:
        """For each language, the share of its most frequent label."""
        found = {}
        for code, splits in self.test.items():
            rows = splits["test"]
            words = self.evaluated.kind == "words"
            gold = itertools.chain(*rows["labels"]) if words else rows["label"]
            counts = [0] * len(self.evaluated.labels)
            for label in gold:
                counts[label] += 1
            found[code] = max(counts) / max(sum(counts), 1)
        return found

    def digests(self) -> dict[str, str]:
        """For each language, the hash of its test rows that reports have."""
        return {
            code: row_digests(splits["test"], self.evaluated)[0]
            for code, splits in self.test.items()
        }

    def digest(self) -> str:
        """A hash of the pretrained weights."""
        found = hashlib.sha256()
        for name, parameter in sorted(self.new_model(0).base_model.named_parameters()):
            found.update(name.encode())
            found.update(parameter.detach().numpy().tobytes())
        return found.hexdigest()[:16]

    def _autocast(self, model: nn.Module, training: Training) -> torch.autocast:
        device = next(model.parameters()).device.type
        return torch.autocast(device, training.autocast, enabled=training.autocast is not None)

    def _calibration_batches(self, model: nn.Module, kind: str) -> list[Mapping[str, Any]]:
        if not self.calibration.get(kind):
            raise ValueError(f"calibration should have {kind} texts, got none")
        encoded = self.tokenizer(
            list(self.calibration[kind]),
            truncation=True,
            max_length=longest_input(model, self.tokenizer),
        )
        rows = [
            {key: encoded[key][i] for key in encoded} for i in range(len(self.calibration[kind]))
        ]
        rows.sort(key=lambda row: len(row["input_ids"]))
        pad = self.tokenizer.pad_token_id
        return [padded(rows[i : i + 32], pad) for i in range(0, len(rows), 32)]


def _unmasked_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model that is not pruned yet, whether it has masks or not."""
    return {
        name.removesuffix("_orig"): value.clone()
        for name, value in model.state_dict().items()
        if not name.endswith("_mask")
    }


def _texts(rows: datasets.Dataset) -> list[str]:
    if "tokens" in rows.column_names:
        return [" ".join(tokens) for tokens in rows["tokens"]]
    return list(rows["text"])


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """A random sample of the texts, always the same one."""
    return random.Random(0).sample(texts, min(count, len(texts)))


def _evenly(rows: datasets.Dataset, count: int | None) -> datasets.Dataset:
    if count is None or count >= len(rows):
        return rows
    return rows.select([i * len(rows) // count for i in range(count)])


def _test_rows(rows: datasets.Dataset, count: int | None) -> datasets.DatasetDict:
    return import_datasets().DatasetDict(test=_evenly(rows, count))


def _multilingual(languages: Sequence[str], data: Path | None) -> list[str]:
    there = available_languages("topics", data)
    own = [code for code in languages if code in there]
    each = -(-_CALIBRATION_SENTENCES // max(len(own), 1))
    texts = []
    for number, code in enumerate(own):
        rows = load_task("topics", code, data, splits=["train"])["train"]
        # SIB-200 is parallel: take different rows of each language.
        texts += [rows[(number * each + i) % len(rows)]["text"] for i in range(each)]
    return texts[:_CALIBRATION_SENTENCES]
