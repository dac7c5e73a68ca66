"""Fine-tune a sentence encoder in English, prune it on the way, evaluate in other languages.

    pip install "torchalignprune[demo]" scipy
    python examples/regularize_finetuning.py --data DATA --out results

DATA is a folder with ``sib200/{train,dev,test}.LANGUAGE.tsv.gz``: the topics of SIB-200
(https://github.com/dadelani/sib-200), one line ``id <TAB> topic <TAB> text`` per sentence. The
encoder is all-MiniLM-L6-v2, or any Transformers folder given by ``--model``.

With the same seed all variants train on the same batches. All but ``dense`` are pruned along the
same cubic schedule and differ only in the penalty:

    dense       not pruned
    none        pruned by AlignedMagnitude
    cosine      the same, with CosineAlignment to the pretrained weights in the loss
    frobenius   the same, with FrobeniusAlignment

The strength of a penalty is chosen so that its gradient is a given share of the task's. It is
measured repeatedly, because the penalty's gradient grows as the weights move away. Results are
written after every run. Run again, the same command skips the runs that are done.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import torchalignprune as tap

VARIANTS = ("dense", "none", "cosine", "frobenius")
TOPICS = (
    "entertainment",
    "geography",
    "health",
    "politics",
    "science/technology",
    "sports",
    "travel",
)


@dataclass
class Sentences:
    """Tokenized texts and the numbers of their topics."""

    ids: Tensor
    attention_mask: Tensor
    topics: Tensor

    def __getitem__(self, rows: Tensor) -> Sentences:
        longest = int(self.attention_mask[rows].sum(dim=1).max())
        return Sentences(
            self.ids[rows, :longest], self.attention_mask[rows, :longest], self.topics[rows]
        )

    def __len__(self) -> int:
        return len(self.topics)


class Classifier(nn.Module):
    """A linear layer on the mean of the encoder's last hidden states."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, len(TOPICS))

    def forward(self, batch: Sentences) -> Tensor:
        mask = batch.attention_mask.unsqueeze(-1)
        states = self.encoder(
            input_ids=batch.ids, attention_mask=batch.attention_mask
        ).last_hidden_state
        logits: Tensor = self.classifier((states * mask).sum(dim=1) / mask.sum(dim=1))
        return logits


def read(data: Path, split: str, language: str, tokenizer: Any) -> Sentences:
    path = data / "sib200" / f"{split}.{language}.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    encoded = tokenizer(
        [text for _, _, text in rows],
        padding=True,
        truncation=True,
        max_length=min(64, tokenizer.model_max_length),
        return_tensors="pt",
    )
    topics = torch.tensor([TOPICS.index(topic) for _, topic, _ in rows])
    return Sentences(encoded["input_ids"], encoded["attention_mask"], topics)


@torch.no_grad()
def accuracy(model: nn.Module, sentences: Sentences) -> float:
    model.eval()
    right = 0
    for rows in torch.arange(len(sentences)).split(64):
        batch = sentences[rows]
        right += int((model(batch).argmax(dim=1) == batch.topics).sum())
    return right / len(sentences)


def train(variant: str, seed: int, options: argparse.Namespace, data: dict[str, Any]) -> Any:
    """One run. Returns its figures."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    model = Classifier(options.model)
    params = tap.prunable_parameters(model.encoder)
    # The reference is memory-mapped from the checkpoint, so it takes no memory of its own.
    reference = tap.Reference.from_checkpoint(options.model, params)
    penalty: nn.Module | None = None
    if variant == "cosine":
        penalty = tap.CosineAlignment(params, reference)
    elif variant == "frobenius":
        penalty = tap.FrobeniusAlignment(params, reference)

    train_on = data["train"]
    steps = options.epochs * math.ceil(len(train_on) / options.batch)
    optimizer = torch.optim.AdamW(
        [
            {"params": model.encoder.parameters(), "lr": options.learning_rate},
            {"params": model.classifier.parameters(), "lr": 1e-3},
        ]
    )
    warm_up = tap.schedules.linear(0.0, 1.0, end=max(1, steps // 10))
    decay = tap.schedules.linear(1.0, 0.0, begin=steps // 10, end=steps)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(warm_up(step + 1), decay(step))
    )
    schedule = tap.schedules.cubic(
        0.0, options.sparsity, begin=steps // 10, end=7 * steps // 10, every=max(1, steps // 20)
    )
    pruner = None
    if variant != "dense":
        pruner = tap.Pruner(params, tap.AlignedMagnitude, schedule, reference=reference)
    strength = 0.0
    step = 0
    for _ in range(options.epochs):
        model.train()
        for rows in torch.randperm(len(train_on)).split(options.batch):
            batch = train_on[rows]
            loss = cross_entropy(model(batch), batch.topics)
            if penalty is not None and step > 0 and step % max(1, steps // 20) == 0:
                strength = penalty.suggest_strength(loss, share=options.share)
            if penalty is not None and strength:
                loss = loss + strength * penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            step += 1
            if pruner is not None:
                pruner.step()

    report = tap.alignment_report(params, reference)
    scores = {language: accuracy(model, test) for language, test in data["test"].items()}
    others = [score for language, score in scores.items() if language != "en"]
    return {
        "variant": variant,
        "seed": seed,
        "dev": accuracy(model, data["dev"]),
        "english": scores["en"],
        "others": statistics.fmean(others) if others else None,
        "languages": scores,
        "sparsity": report.totals["sparsity"],
        "alignment": report.totals["mean_alignment"],
        "distortion": report.totals["distortion"],
        "dead_units_out": report.totals["dead_units_out"],
        "strength": strength,
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
    }


def interval(values: Sequence[float]) -> str:
    """Mean and 95% interval over seeds (Student's t)."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def summary(runs: list[dict[str, Any]]) -> str:
    by = {variant: [run for run in runs if run["variant"] == variant] for variant in VARIANTS}
    keys = ["english", "others", "alignment", "dead_units_out"]
    keys = [key for key in keys if all(run[key] is not None for run in runs)]
    lines = ["".join([f"{'':24}", *(f"{key:>16}" for key in keys)])]
    for variant, own in by.items():
        if own:
            cells = "".join(f"{interval([run[key] for run in own]):>16}" for key in keys)
            lines.append(f"{variant:24}{cells}")
    lines.append("difference from none, by seed")
    base = {run["seed"]: run for run in by["none"]}
    for variant in ("cosine", "frobenius"):
        shared = [run for run in by[variant] if run["seed"] in base]
        if shared:
            cells = "".join(
                f"{interval([run[key] - base[run['seed']][key] for run in shared]):>16}"
                for key in keys
            )
            lines.append(f"{variant:24}{cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with sib200/")
    parser.add_argument("--model", help="Transformers folder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs.jsonl")
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="default: all in DATA")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--share", type=float, default=0.3, help="the penalty's gradient norm over the task's"
    )
    options = parser.parse_args(arguments)

    folder = options.data / "sib200"
    there = sorted(path.name.split(".")[1] for path in folder.glob("test.*.tsv.gz"))
    languages = options.languages or there
    missing = [code for code in ["en", *languages] if code not in there]
    if missing:
        parser.error(f"--data: {folder} has no test.{missing[0]}.tsv.gz")
    if options.model is None:
        try:
            from torchalignprune.demo import encoder_folder
        except ImportError as error:
            parser.error(f"{error}; or give --model")
        options.model = str(encoder_folder())

    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = {
        "train": read(options.data, "train", "en", tokenizer),
        "dev": read(options.data, "dev", "en", tokenizer),
        "test": {
            code: read(options.data, "test", code, tokenizer)
            for code in dict.fromkeys(["en", *languages])
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key not in ("out", "seeds", "variants")
    }
    runs = [run for run in map(json.loads, lines) if run["settings"] == settings]
    for seed in range(options.seeds):
        for variant in options.variants:
            if any(run["variant"] == variant and run["seed"] == seed for run in runs):
                continue
            run = train(variant, seed, options, data) | {"settings": settings}
            runs.append(run)
            with path.open("a") as file:
                file.write(json.dumps(run) + "\n")
            others = math.nan if run["others"] is None else run["others"]
            print(
                f"seed {seed}  {variant:10} English {run['english']:.3f}  others {others:.3f}  "
                f"alignment {run['alignment']:.3f}  {run['seconds']:.0f} s",
                flush=True,
            )
    print(summary(runs))


if __name__ == "__main__":
    main()
