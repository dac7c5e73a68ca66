"""Fine-tune a text classifier with the Trainer of Transformers, and prune it on the way.

    pip install "torchalignprune[demo,trainer]" datasets
    python examples/trainer_pruning.py --out results
    python examples/trainer_pruning.py --out results --model FOLDER_OR_NAME --data reviews.csv

The data is a csv or json file with the columns ``text`` and ``label``; a fifth is held out. Without
``--data``, sentences are made up. The encoder is all-MiniLM-L6-v2, or any model of Transformers. It
is pruned along a cubic schedule in the middle of training, and a penalty keeps its units aligned
with those of the pretrained encoder (``--strength 0``: no penalty, and an ordinary ``Trainer``).

``--resume`` continues a killed run from its last complete checkpoint. At the end
``results/pruned`` is an ordinary checkpoint folder for ``from_pretrained``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from safetensors.torch import load_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import torchalignprune as tap
from torchalignprune import hf

SUBJECTS = {
    "food": ["the soup", "this bread", "our dinner", "a ripe mango", "her pancake"],
    "weather": ["the storm", "this fog", "our summer", "a cold wind", "her umbrella"],
}
VERBS = ["was", "turned out", "seemed", "remained", "became"]
WORDS = ["wonderful", "a bit heavy", "better than yesterday", "not what we wanted", "quite mild"]


def made_up() -> Dataset:
    rows = [
        {"text": f"{subject} {verb} {word}.", "label": label}
        for label, subjects in SUBJECTS.items()
        for subject, verb, word in itertools.product(subjects, VERBS, WORDS)
    ]
    random.Random(0).shuffle(rows)
    return Dataset.from_list(rows)


def read(path: Path) -> Dataset:
    kind = {".csv": "csv", ".json": "json", ".jsonl": "json"}.get(path.suffix)
    if kind is None:
        raise SystemExit(f"--data should be a .csv, .json or .jsonl file, got {path}")
    data = load_dataset(kind, data_files=str(path), split="train")
    if missing := {"text", "label"} - set(data.column_names):
        raise SystemExit(f"--data {path} has no column {min(missing)}")
    return data


def accuracy(prediction: Any) -> dict[str, float]:
    right = prediction.predictions.argmax(axis=-1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


def last_step(checkpoint: str) -> int:
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return int(state["global_step"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and model")
    parser.add_argument("--model", help="folder or name on the hub (default: all-MiniLM-L6-v2)")
    parser.add_argument("--data", type=Path, help="csv or json with text and label")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--strength", type=float, default=1000.0, help="of the penalty")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="continue a killed run")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps should be at least 1, got {options.steps}")
    if not options.resume and any(options.out.glob("checkpoint-*")):
        # A resumed run would take these checkpoints for its own.
        parser.error(
            "--out should be a folder without checkpoints unless --resume is given, got "
            f"{options.out}"
        )
    if options.model is None:
        from torchalignprune.demo import encoder_folder

        options.model = str(encoder_folder())

    set_seed(42)
    data = read(options.data) if options.data else made_up()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = data.class_encode_column("label")
    names = data.features["label"].names
    data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128))
    split = data.train_test_split(test_size=0.2, seed=0)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )

    # Only the encoder is pruned, not the new classifier. A resumed run makes model and pruner the
    # same way; the reference is read from the pretrained weights here, before any training.
    params = tap.prunable_parameters(model.base_model)
    reference = tap.Reference.capture(params)
    penalty = tap.CosineAlignment(params, reference)
    schedule = tap.schedules.cubic(
        0.0,
        options.sparsity,
        begin=options.steps // 10,
        end=max(options.steps // 10 + 1, 7 * options.steps // 10),
        every=max(1, options.steps // 40),
    )
    pruner = tap.Pruner(
        params, tap.AlignedMagnitude, schedule, reference=reference, penalty=penalty
    )

    settings = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        logging_steps=max(1, options.steps // 12),
        eval_strategy="steps",
        eval_steps=options.save_every,
        save_steps=options.save_every,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )
    common: dict[str, Any] = {
        "model": model,
        "args": settings,
        "train_dataset": split["train"],
        "eval_dataset": split["test"],
        "data_collator": DataCollatorWithPadding(tokenizer),
        "processing_class": tokenizer,
        "compute_metrics": accuracy,
        "callbacks": [hf.PruningCallback(pruner)],
    }
    trainer = (
        hf.AlignmentTrainer(**common, penalty=penalty, strength=options.strength)
        if options.strength > 0
        else Trainer(**common)
    )
    checkpoint = hf.last_complete_checkpoint(options.out) if options.resume else None
    if checkpoint is not None and last_step(checkpoint) >= options.steps:
        # The run was killed after its last step. The pruner has put its masks into the model, so
        # the names fit.
        print(f"training had finished in {checkpoint}")
        load_model(model, Path(checkpoint) / "model.safetensors")
    else:
        print(f"resuming from {checkpoint}" if checkpoint else "starting from the pretrained model")
        trainer.train(resume_from_checkpoint=checkpoint)

    figures = {"sparsity": pruner.sparsity(), "alignment": pruner.log()["pruning/alignment"]}
    pruner.finalize()
    figures["accuracy"] = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(str(options.out / "pruned"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
