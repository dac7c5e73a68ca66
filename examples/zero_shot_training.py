"""What xnli_xlmr.py, pawsx_mbert.py and pos_xlmr.py share.

Arguments, data and model, training with pruning, and the report at the end. The scripts choose the
task and the model. ``run`` does it all; each function is a few calls of the library.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState

import torchalignprune as tap
from torchalignprune import hf
from torchalignprune.crosslingual import (
    CC100_GIB,
    TASKS,
    ZeroShotReport,
    available_languages,
    evaluate_zero_shot,
    load_task,
)
from torchalignprune.crosslingual.recipes import RECIPES, make_penalty

TRAINED_ON = "en"
# Calibration uses the training data, which is in one language.
METHODS = [name for name, recipe in RECIPES.items() if recipe.calibration != "multilingual"]
SCHEDULES: dict[str, Any] = {
    "cubic": tap.schedules.cubic,
    "linear": tap.schedules.linear,
    "exponential": tap.schedules.exponential,
}
MEASURED = 20  # the strength is measured every steps // MEASURED steps
CALIBRATED = 256  # training sentences that calibration uses


@dataclass
class PruningArguments:
    """What is pruned, how, and what it is evaluated on."""

    model: str = field(
        default="xlm-roberta-base", metadata={"help": "name on the hub, or a folder"}
    )
    data: str | None = field(
        default=None, metadata={"help": "folder with the data, instead of the hub"}
    )
    languages: list[str] | None = field(
        default=None,
        metadata={"help": "codes of languages to evaluate in, besides English, instead of all"},
    )
    compare: str | None = field(
        default=None,
        metadata={"help": "dense model to compare with: its folder, or the report.json of its run"},
    )
    max_length: int = field(default=128, metadata={"help": "most subwords of a training sample"})
    sparsity: float = field(default=0.7, metadata={"help": "final; 0: the dense baseline"})
    method: str = field(
        default="magnitude",
        metadata={"help": "what weights are ranked by", "choices": METHODS},
    )
    budget: Literal["global", "layer", "unit"] | None = field(
        default=None, metadata={"help": "where sparsity is counted, instead of the method's own"}
    )
    schedule: Literal["cubic", "linear", "exponential"] = field(
        default="cubic",
        metadata={"help": "how sparsity rises; exponential: by the same share of what remains"},
    )
    rounds: int = field(
        default=10, metadata={"help": "number of prunings, with retraining between them"}
    )
    begin: float = field(
        default=0.1, metadata={"help": "share of the steps before the first round"}
    )
    end: float = field(
        default=0.7, metadata={"help": "share of the steps after which the last round is done"}
    )
    regularizer: Literal["none", "cosine", "frobenius", "both"] = field(
        default="cosine",
        metadata={"help": "keeps units aligned with those of the model that training starts from"},
    )
    strength: float | None = field(
        default=None,
        metadata={"help": "of the regularizer, instead of measuring it (--share)"},
    )
    share: float = field(
        default=0.1,
        metadata={
            "help": "the regularizer's gradient norm as a share of the task's; the strength is "
            "measured for this repeatedly"
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"--sparsity should be from 0 to below 1, got {self.sparsity}")
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(
                "--begin and --end should satisfy 0 <= begin < end <= 1, got "
                f"{self.begin} and {self.end}"
            )
        if self.rounds < 1:
            raise ValueError(f"--rounds should be at least 1, got {self.rounds}")
        if self.sparsity == 0 and self.regularizer != "none":
            raise ValueError(
                "--regularizer should be none with --sparsity 0, the dense baseline, got "
                f"{self.regularizer}"
            )
        if self.strength is not None and not 0 <= self.strength < math.inf:
            raise ValueError(f"--strength should be finite and at least 0, got {self.strength}")
        if self.strength is not None and self.regularizer == "none":
            raise ValueError("--regularizer should not be none with --strength, got none")
        if not 0 < self.share < math.inf:
            raise ValueError(f"--share should be finite and above 0, got {self.share}")
        if self.compare is not None and not Path(self.compare).exists():
            raise ValueError(f"--compare should be a folder or a file, got {self.compare}")
        if self.compare is not None and Path(self.compare).is_file():
            try:
                read_report(self.compare)
            except ValueError as error:
                raise ValueError(
                    f"--compare should be a folder or a report, got {self.compare}: {error}"
                ) from error


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description as written, and shows the defaults of the arguments."""


@contextmanager
def input_errors() -> Iterator[None]:
    """Ends the script with a one-line message if something is wrong with the input."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {error}") from error


def parse(
    description: str | None, defaults: Mapping[str, Any], arguments: Sequence[str] | None
) -> tuple[PruningArguments, TrainingArguments]:
    """The arguments of the command line: our own, and all those of the Trainer.

    Args:
        description: for ``--help``.
        defaults: of the script; ``batch`` is the number of sentences per step over all processes.
        arguments: used instead of the command line.
    """
    parser: Any = HfArgumentParser(
        [PruningArguments, TrainingArguments],
        description=description,
        formatter_class=Help,
        usage="%(prog)s --output_dir FOLDER [--data FOLDER] [--sparsity S] [...]",
        allow_abbrev=False,
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    own = dict(defaults)
    parser.set_defaults(
        output_dir="",
        per_device_train_batch_size=max(1, own.pop("batch") // processes),
        per_device_eval_batch_size=64,
        eval_strategy="epoch",
        # Shares of all steps: 20 checkpoints, and 100 lines in the log.
        save_steps=0.05,
        save_total_limit=2,
        logging_steps=0.01,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        **own,
    )
    with input_errors():
        options, args = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        if not args.output_dir:
            raise ValueError(
                "--output_dir should be a folder for checkpoints and results, got none"
            )
    return options, args


def run(
    task: str,
    kind: Any,
    collator: Callable[[Any], Any],
    encode: Callable[..., dict[str, Any]],
    description: str | None,
    defaults: Mapping[str, Any],
    arguments: Sequence[str] | None,
) -> None:
    """Fine-tunes on English, prunes on the way, and evaluates in every language.

    Args:
        task: a key of :data:`torchalignprune.crosslingual.TASKS`.
        kind: the class of the model.
        collator: makes the data collator from the tokenizer.
        encode: makes inputs and labels from the tokenizer, a batch of rows, and the most subwords
            of a sentence or pair.
        description, defaults, arguments: as in :func:`parse`.
    """
    options, args = parse(description, defaults, arguments)
    data = load_data(task, options)
    model, tokenizer = load_model(kind, task, options, args)

    def encode_rows(rows: Mapping[str, Any]) -> dict[str, Any]:
        return encode(tokenizer, rows, options.max_length)

    splits = data[TRAINED_ON]
    columns = splits["train"].column_names
    train, validation = (
        splits[split].map(encode_rows, batched=True, remove_columns=columns, desc=split)
        for split in ("train", "validation")
    )
    figures = prune(model, tokenizer, train, validation, collator(tokenizer), options, args)
    report(task, model, tokenizer, data, figures, options, args)


def encode_pairs(tokenizer: Any, rows: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    encoded = tokenizer(rows["text"], rows["text_pair"], truncation=True, max_length=max_length)
    return {**encoded, "labels": rows["label"]}


def load_data(task: str, options: PruningArguments) -> dict[str, DatasetDict]:
    """All splits of English, and the test splits of the other languages."""
    data = {}
    with input_errors():
        codes = options.languages or available_languages(task, options.data)
        for code in dict.fromkeys([TRAINED_ON, *codes]):
            needed = ["train", "validation", "test"] if code == TRAINED_ON else ["test"]
            data[code] = load_task(task, code, options.data, splits=needed)
    return data


def load_model(
    kind: Any, task: str, options: PruningArguments, args: TrainingArguments
) -> tuple[nn.Module, Any]:
    """The model, with the labels of the task and on the training device, and its tokenizer."""
    labels = TASKS[task].labels
    with input_errors():
        of_ids = AutoConfig.from_pretrained(options.model).id2label or {}
        own = [name for _, name in sorted(of_ids.items())]
        # A head fine-tuned with the labels in another order would be used as if it were in ours.
        # Case is ignored, as in an evaluation.
        names = [str(label).casefold() for label in own]
        ordered = [label.casefold() for label in labels]
        if set(names) == set(ordered) and names != ordered:
            raise ValueError(
                f"--model {options.model} should have its labels in the order {', '.join(labels)}, "
                f"got {', '.join(own)}"
            )
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        if not 0 < options.max_length <= tokenizer.model_max_length:
            raise ValueError(
                f"--max_length should be from 1 to {tokenizer.model_max_length}, got "
                f"{options.max_length}"
            )
        # So that every process draws the same new head.
        set_seed(args.seed)
        model = kind.from_pretrained(
            options.model,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            dtype=torch.float32,
        )
    return model.to(args.device), tokenizer


class MeasuredStrength(TrainerCallback, ExportableState):
    """A strength that gives the penalty's gradient a share of the task's, measured repeatedly.

    The penalty's gradient is zero before the weights have moved, and grows as they move. The task's
    loss is that of a batch drawn by the number of the step, so it is the same on all processes and
    in a resumed run. Checkpoints hold the strength.
    """

    def __init__(
        self, penalty: Any, share: float, rows: Dataset, collator: Any, batch: int, every: int
    ) -> None:
        self.penalty = penalty
        self.share = share
        self.rows = rows
        self.collator = collator
        self.batch = batch
        self.every = every
        self.strength = 0.0

    def __call__(self, step: int) -> float:
        return self.strength

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"strength": self.strength}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            saved = state.stateful_callbacks["MeasuredStrength"]
            self.strength = saved["attributes"]["strength"]

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step == 0 or state.global_step % self.every:
            return
        generator = torch.Generator().manual_seed(state.global_step)
        drawn = torch.randint(len(self.rows), (self.batch,), generator=generator)
        batch = self.collator([self.rows[i] for i in drawn.tolist()])
        model.eval()  # dropout would draw from the generator of the training
        try:
            loss = model(**{key: value.to(args.device) for key, value in batch.items()}).loss
            self.strength = self.penalty.suggest_strength(loss, self.share)
        except ValueError:
            pass  # a gradient is zero: the weights have not moved, or there is nothing to learn
        finally:
            model.train()


def accuracy(prediction: Any) -> dict[str, float]:
    """The accuracy over all places that have a label."""
    counted = prediction.label_ids != -100
    right = prediction.predictions == prediction.label_ids
    return {"accuracy": float(right[counted].mean()) if counted.any() else math.nan}


def steps_of_training(args: TrainingArguments, rows: int) -> int:
    """The number of optimizer steps that the arguments ask for."""
    if args.max_steps > 0:
        return int(args.max_steps)
    on_a_process = rows / args.world_size / args.per_device_train_batch_size
    batches = math.floor(on_a_process) if args.dataloader_drop_last else math.ceil(on_a_process)
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def check_run(options: PruningArguments, args: TrainingArguments) -> None:
    """Refuses to resume a run that was started with other settings."""
    settings = {
        key: value
        for key, value in asdict(options).items()
        if key not in ("data", "languages", "compare")
    }
    for key in ("max_steps", "learning_rate", "gradient_accumulation_steps", "seed"):
        settings[key] = getattr(args, key)
    settings["batch"] = args.per_device_train_batch_size * args.world_size
    path = Path(args.output_dir, "settings.json")
    if path.exists():
        former = json.loads(path.read_text(encoding="utf-8"))
        for key, value in settings.items():
            if former.get(key) != value:
                raise ValueError(
                    f"{key} should be {former.get(key)}, as in the run in --output_dir "
                    f"{args.output_dir}, got {value}; another folder starts a new run"
                )
    elif args.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def prune(
    model: nn.Module,
    tokenizer: Any,
    train: Dataset,
    validation: Dataset,
    collator: Any,
    options: PruningArguments,
    args: TrainingArguments,
) -> dict[str, Any]:
    """Trains the model, prunes it on the way, and saves it in OUTPUT_DIR/model.

    Resumes from the last complete checkpoint in OUTPUT_DIR, if there is one.

    Returns:
        The totals of the alignment report: ``sparsity``, ``mean_alignment``, ``distortion``, ...
    """
    # The schedule and the Trainer have to agree on the number of steps.
    args.max_steps = steps = steps_of_training(args, len(train))
    with input_errors():
        if steps < 1:
            raise ValueError(
                f"{len(train)} training sentences should make at least one step, got none: "
                "--num_train_epochs is 0, or --dataloader_drop_last leaves no batch"
            )
        resumed = args.resume_from_checkpoint
        if resumed is not None and not Path(resumed, "trainer_state.json").is_file():
            raise ValueError(
                f"--resume_from_checkpoint should be a checkpoint's folder, got {resumed}; without "
                "it, the last complete one in --output_dir is used"
            )
        check_run(options, args)

    # Only the encoder is pruned, not the head. A resumed run makes model and pruner the same way;
    # the reference is read from the model here, before any training.
    params = tap.prunable_parameters(model)
    reference = tap.Reference.capture(params)
    penalty = make_penalty(options.regularizer, params, reference)
    begin = int(options.begin * steps)
    end = max(begin + 1, int(options.end * steps))
    schedule = SCHEDULES[options.schedule](
        0.0, options.sparsity, begin=begin, end=end, every=math.ceil((end - begin) / options.rounds)
    )
    rows = train.shuffle(seed=args.seed).select(range(min(len(train), CALIBRATED)))

    def collect() -> tap.Calibration:
        # Without a generator of its own the loader would draw from that of the training.
        batches = DataLoader(
            rows,
            batch_size=args.per_device_eval_batch_size,
            collate_fn=collator,
            generator=torch.Generator(),
        )
        return tap.Calibration.collect(model, batches, params)

    pruner = RECIPES[options.method].pruner(
        params, schedule, collect, reference, budget=options.budget, penalty=penalty
    )

    callbacks: list[TrainerCallback] = [hf.PruningCallback(pruner)]
    strength: Any = options.strength
    if penalty is not None and strength is None:
        every = max(1, steps // MEASURED)
        strength = MeasuredStrength(
            penalty, options.share, train, collator, args.per_device_train_batch_size, every
        )
        callbacks.append(strength)
    common: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": train,
        "eval_dataset": validation,
        "data_collator": collator,
        "processing_class": tokenizer,
        "compute_metrics": accuracy,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "callbacks": callbacks,
    }
    if penalty is None:
        trainer = Trainer(**common)
    else:
        trainer = hf.AlignmentTrainer(**common, penalty=penalty, strength=strength)

    checkpoint = args.resume_from_checkpoint or hf.last_complete_checkpoint(args.output_dir)
    if args.process_index == 0:
        print(f"resuming from {checkpoint}" if checkpoint else f"starting from {options.model}")
    finished = None if checkpoint is None else finished_checkpoint(checkpoint, args)
    if finished is None:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:
        state: dict[str, Tensor] = {}
        for file in finished.glob("model*.safetensors"):
            state |= load_file(file)
        model.load_state_dict(state)
    # Remove Accelerate's autocast (--bf16, --fp16): the model is saved and evaluated in float32.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    figures = dict(tap.alignment_report(params, reference).totals)
    if args.process_index == 0:
        folder = Path(args.output_dir, "model")
        tap.save_pruned(model, folder)
        tokenizer.save_pretrained(folder)
    pruner.finalize()
    return figures


def finished_checkpoint(checkpoint: str, args: TrainingArguments) -> Path | None:
    """The checkpoint with the final model if the given one is of the last step, else None.

    A run that was stopped after its last step, or that is repeated, has nothing left to train.
    """
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] < args.max_steps:
        return None
    best = state["best_model_checkpoint"] if args.load_best_model_at_end else None
    return Path(best or checkpoint)


def report(
    task: str,
    model: Any,
    tokenizer: Any,
    data: Mapping[str, DatasetDict],
    figures: Mapping[str, Any],
    options: PruningArguments,
    args: TrainingArguments,
) -> None:
    """Evaluates the pruned model in every language, and writes report.json and plots."""
    main_process = args.process_index == 0
    if distributed.is_initialized():
        # The other processes have nothing left to do.
        distributed.barrier()
        distributed.destroy_process_group()
    if not main_process:
        return
    out = Path(args.output_dir)
    settings: dict[str, Any] = {
        "batch_size": args.per_device_eval_batch_size,
        "supervised": TRAINED_ON,
        "progress": sys.stderr.isatty(),
    }
    pruned = evaluate_zero_shot(model, tokenizer, task, data, **settings)
    written: dict[str, Any] = {
        "checkpoint": str(out / "model"),
        **pruned.to_dict(),
        "weights": dict(figures),
        "settings": json.loads((out / "settings.json").read_text(encoding="utf-8")),
        "command": shlex.join(["python", *sys.argv]),
    }
    write_json(out / "report.json", written)
    pruned.plot(out / "report.png")
    if options.compare is None:
        print(pruned)
    else:
        with input_errors():
            dense = dense_report(options.compare, type(model), args.device, task, data, settings)
            comparison = pruned.compare(dense)
        written |= {"compared_with": options.compare, "comparison": comparison.to_dict()}
        write_json(out / "report.json", written)
        # How much of each language XLM-R was pretrained on.
        shares = CC100_GIB if model.config.model_type == "xlm-roberta" else None
        comparison.plot(out / "drops.png", shares=shares)
        print(comparison)
    print(f"sparsity {figures['sparsity']:.4f}  alignment {figures['mean_alignment']:.4f}")
    print(f"model: {out / 'model'}, report: {out / 'report.json'}")


def dense_report(
    source: str, kind: Any, device: torch.device, task: str, data: Any, settings: Any
) -> ZeroShotReport:
    """The report of the dense model, read from a file or made with the model in a folder."""
    if Path(source).is_file():
        return read_report(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = kind.from_pretrained(source, dtype=torch.float32).to(device)
    return evaluate_zero_shot(model, tokenizer, task, data, **settings)


def read_report(file: str) -> ZeroShotReport:
    return ZeroShotReport.from_json(Path(file).read_text(encoding="utf-8"))


def write_json(path: Path, written: Mapping[str, Any]) -> None:
    # Complete or not at all.
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
