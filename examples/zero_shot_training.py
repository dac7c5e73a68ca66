"""What xnli_xlmr.py, pawsx_mbert.py and pos_xlmr.py have in common.

Arguments, data and model, training with pruning, and the report at the end; the scripts say what is
trained on what. ``run`` is the whole of it; each function is a few calls of the library.
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
# The training data is in one language, and so is what calibration looks at.
METHODS = [name for name, recipe in RECIPES.items() if recipe.calibration != "multilingual"]
SCHEDULES: dict[str, Any] = {
    "cubic": tap.schedules.cubic,
    "linear": tap.schedules.linear,
    "exponential": tap.schedules.exponential,
}
MEASURED = 20  # times that a strength is measured
CALIBRATED = 256  # training sentences that calibration looks at


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
        metadata={"help": "codes of the languages to evaluate in, besides English, instead of all"},
    )
    compare: str | None = field(
        default=None,
        metadata={
            "help": "the dense model to compare with: a folder, or the report.json of its run"
        },
    )
    max_length: int = field(default=128, metadata={"help": "the most subwords that are trained on"})
    sparsity: float = field(default=0.7, metadata={"help": "at the end; 0: the dense baseline"})
    method: str = field(
        default="magnitude",
        metadata={"help": "what entries are ranked by", "choices": METHODS},
    )
    budget: Literal["global", "layer", "unit"] | None = field(
        default=None, metadata={"help": "where sparsity is counted, instead of as the method does"}
    )
    schedule: Literal["cubic", "linear", "exponential"] = field(
        default="cubic",
        metadata={"help": "how the sparsity rises; exponential: by the same share of what remains"},
    )
    rounds: int = field(
        default=10, metadata={"help": "how many times is pruned; between them is retrained"}
    )
    begin: float = field(
        default=0.1, metadata={"help": "the share of the steps before the first round"}
    )
    end: float = field(
        default=0.7, metadata={"help": "the share of the steps after which the last round is done"}
    )
    regularizer: Literal["none", "cosine", "frobenius", "both"] = field(
        default="cosine",
        metadata={
            "help": "keeps the units aligned with those of the model that training began with"
        },
    )
    strength: float | None = field(
        default=None,
        metadata={"help": "of the regularizer, instead of one that is measured (--share)"},
    )
    share: float = field(
        default=0.1,
        metadata={
            "help": "the regularizer's gradient norm as a share of the task's, for which the "
            "strength is measured again and again"
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"--sparsity should be from 0 to below 1, got {self.sparsity}")
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(
                f"0 <= --begin < --end <= 1 should hold, got {self.begin} and {self.end}"
            )
        if self.rounds < 1:
            raise ValueError(f"--rounds should be at least 1, got {self.rounds}")
        if self.sparsity == 0 and self.regularizer != "none":
            raise ValueError("--sparsity 0, the dense baseline, goes with --regularizer none")
        if self.strength is not None and not 0 <= self.strength < math.inf:
            raise ValueError(f"--strength should be finite, not negative, got {self.strength}")
        if self.strength is not None and self.regularizer == "none":
            raise ValueError("--strength goes with a regularizer, got --regularizer none")
        if not 0 < self.share < math.inf:
            raise ValueError(f"--share should be a positive number, got {self.share}")
        if self.compare is not None and not Path(self.compare).exists():
            raise ValueError(f"--compare should be a folder or a file, got {self.compare}")
        if self.compare is not None and Path(self.compare).is_file():
            try:
                read_report(self.compare)
            except ValueError as error:
                raise ValueError(f"--compare {self.compare} is no report: {error}") from error


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the defaults of the arguments."""


@contextmanager
def input_errors() -> Iterator[None]:
    """What is wrong with the input ends the script with one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {error}") from error


def parse(
    description: str | None, defaults: Mapping[str, Any], arguments: Sequence[str] | None
) -> tuple[PruningArguments, TrainingArguments]:
    """The arguments of the command line: ours, and all those of the Trainer.

    Args:
        description: for ``--help``.
        defaults: of the script. ``batch`` is how many sentences a step trains on, by all processes
            together.
        arguments: instead of those of the command line.
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
        # Of all steps: 20 checkpoints, 100 lines in the log.
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
            raise ValueError("--output_dir is needed: the folder for checkpoints and results")
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
        task: of :data:`torchalignprune.crosslingual.TASKS`.
        kind: the class of the model.
        collator: makes what puts rows into batches, from the tokenizer.
        encode: inputs and labels of some rows, from the tokenizer, the rows, and the most subwords
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
    """English with all its splits, and the test sentences of the other languages."""
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
    """The model, with the labels of the task, where it is trained, and its tokenizer."""
    labels = TASKS[task].labels
    with input_errors():
        of_ids = AutoConfig.from_pretrained(options.model).id2label or {}
        own = [name for _, name in sorted(of_ids.items())]
        # CONTRADICTION is contradiction, as in an evaluation: a head that was fine-tuned with the
        # labels in another order would be taken for one with ours.
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
        # Every process draws the same new head.
        set_seed(args.seed)
        model = kind.from_pretrained(
            options.model,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            dtype=torch.float32,
        )
    return model.to(args.device), tokenizer


class MeasuredStrength(TrainerCallback, ExportableState):
    """A strength that gives the penalty's gradient a share of the task's, measured anew at times.

    The penalty's gradient grows as the weights move, and there is none before they do. The loss is
    that of a batch drawn by the number of the step: the same on all processes, and in a run that
    is resumed. Checkpoints hold the strength.
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
        model.eval()  # without dropout, which would draw from the generator of the training
        try:
            loss = model(**{key: value.to(args.device) for key, value in batch.items()}).loss
            self.strength = self.penalty.suggest_strength(loss, self.share)
        except ValueError:
            pass  # a gradient that is zero: the weights have not moved, or nothing is to be learned
        finally:
            model.train()


def accuracy(prediction: Any) -> dict[str, float]:
    """Over whatever has a label."""
    counted = prediction.label_ids != -100
    right = prediction.predictions == prediction.label_ids
    return {"accuracy": float(right[counted].mean()) if counted.any() else math.nan}


def steps_of_training(args: TrainingArguments, rows: int) -> int:
    """How many steps of the optimizer the arguments ask for."""
    if args.max_steps > 0:
        return int(args.max_steps)
    on_a_process = rows / args.world_size / args.per_device_train_batch_size
    batches = math.floor(on_a_process) if args.dataloader_drop_last else math.ceil(on_a_process)
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def check_run(options: PruningArguments, args: TrainingArguments) -> None:
    """Refuses to go on with a run that was started with other settings."""
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
                    f"--output_dir {args.output_dir} holds a run with {key}={former.get(key)}, "
                    f"which {value} does not go on with: take another folder"
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
    """Trains the model and prunes it on the way; saves it in OUTPUT_DIR/model.

    Goes on from the last complete checkpoint in OUTPUT_DIR, if there is one.

    Returns:
        What became of the weights: ``sparsity``, ``mean_alignment``, ``distortion``, ...
    """
    # One number, for the pruning as for the Trainer.
    args.max_steps = steps = steps_of_training(args, len(train))
    with input_errors():
        if steps < 1:
            raise ValueError(
                f"{len(train)} training sentences should make a step at least: --num_train_epochs "
                "is 0, or --dataloader_drop_last leaves no batch"
            )
        resumed = args.resume_from_checkpoint
        if resumed is not None and not Path(resumed, "trainer_state.json").is_file():
            raise ValueError(
                f"--resume_from_checkpoint should be a checkpoint's folder, got {resumed}: without "
                "it the last complete one in --output_dir is taken"
            )
        check_run(options, args)

    # The encoder, not the head on top. Model and pruner are made the same way when a run is
    # resumed; the reference is read from the model here, before any training.
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
        # A loader draws from the generator of the training, unless it has its own.
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
    # What is saved is in float32; under --bf16 or --fp16 the model still has Accelerate's autocast.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    figures = dict(tap.alignment_report(params, reference).totals)
    if args.process_index == 0:
        folder = Path(args.output_dir, "model")
        tap.save_pruned(model, folder)
        tokenizer.save_pretrained(folder)
    pruner.finalize()
    return figures


def finished_checkpoint(checkpoint: str, args: TrainingArguments) -> Path | None:
    """What the training came to, if the checkpoint is of its last step: a run that was stopped
    after it, or is repeated, has nothing to train."""
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
    """Evaluates the pruned model in every language; writes report.json and pictures."""
    main_process = args.process_index == 0
    if distributed.is_initialized():
        # The others have nothing to do here, and need not wait.
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
    """The report of the dense model: read from a file, or made of the model in a folder."""
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
