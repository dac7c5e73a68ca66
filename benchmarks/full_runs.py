"""What the full runs of examples/xnli_xlmr.py, pawsx_mbert.py and pos_xlmr.py take.

    python benchmarks/full_runs.py            # measure, then write the tables of docs/full_runs.md
    python benchmarks/full_runs.py --tables   # the tables only, from the JSON

Models of the real size with random weights, batches of 32 without padding. A step is what the
Trainer makes of one: forward, backward, the gradient of the penalty, clipping, AdamW, and the
pruner's step. It is timed dense, with masks of 70% sparsity, and with masks and CosineAlignment, at
64 subwords, in float32 and under autocast to bfloat16, and the last also at 128. Beside that, what
happens now and then: a round of pruning, the measuring of the strength, an evaluation. Each variant
has a process of its own; its peak memory is on top of what the libraries take.

Times are those of the processor, on one thread: what else runs on the machine slows them down by
what it takes of caches and memory, but they do not count the waiting. Medians of --repeats.

The floating-point operations are counted by torch's own counter. What GPUs would need is worked out
from them, with the assumptions in ASSUMED: a sum on paper, nothing that was measured.

Writes results/full_runs.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
)

import torchalignprune as tap
from common import RESULTS, fresh_process, median, peak_memory, save, start_memory
from torchalignprune.crosslingual import TASKS

DOCUMENT = Path(__file__).parents[1] / "docs" / "full_runs.md"
BATCH = 32
LENGTHS = (64, 128)
SPARSITY = 0.7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The dtypes and lengths of the steps that are timed.
STEPS = {
    "dense": [("float32", 64), ("bfloat16", 64)],
    "masks": [("float32", 64), ("bfloat16", 64)],
    "penalty": [("float32", 64), ("bfloat16", 64), ("bfloat16", 128)],
}

# The configurations of the hub's xlm-roberta-base and bert-base-multilingual-cased.
XLMR = XLMRobertaConfig(
    vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
)
MBERT = BertConfig(vocab_size=119547)
# Of each run: the model, the English training sentences or pairs, and the epochs.
RUNS: dict[str, tuple[Any, Any, int, int]] = {
    "xnli": (XLMRobertaForSequenceClassification, XLMR, 392_702, 5),
    "pawsx": (BertForSequenceClassification, MBERT, 49_401, 5),
    "pos": (XLMRobertaForTokenClassification, XLMR, 12_544, 10),
}
SCRIPTS = {"xnli": "xnli_xlmr.py", "pawsx": "pawsx_mbert.py", "pos": "pos_xlmr.py"}

# Of the data sheets: operations a second in 16 bits (dense), bytes a second, bytes of memory.
GPUS = {
    "V100 (fp16)": (125e12, 0.9e12),
    "RTX 4090": (165e12, 1.0e12),
    "A100": (312e12, 1.555e12),
    "H100": (989e12, 3.35e12),
}
ASSUMED = {
    "of_peak_operations": 0.3,
    "of_peak_bandwidth": 0.6,
    # A parameter of the model: its gradient is made and clipped (8, 12), AdamW reads four numbers
    # and writes three (28).
    "bytes_a_parameter": 48,
    # An entry with a mask: masked in the forward and the gradient in the backward (9 each), made
    # 16 bits (6); the penalty reads it, the reference and the mask twice, and adds a gradient (30).
    "bytes_a_masked_entry": 54,
}


def steps_of(run: str) -> int:
    _, _, rows, epochs = RUNS[run]
    return epochs * math.ceil(rows / BATCH)


def batch_of(run: str, length: int, vocabulary: int) -> dict[str, Tensor]:
    labels = len(TASKS[run].labels)
    shape = (BATCH, length) if TASKS[run].kind == "words" else (BATCH,)
    return {
        "input_ids": torch.randint(5, vocabulary, (BATCH, length)),
        "labels": torch.randint(labels, shape),
    }


class Training:
    """One model in training, dense or pruned, with or without the penalty."""

    def __init__(self, run: str, variant: str) -> None:
        torch.manual_seed(0)
        kind, config, _, _ = RUNS[run]
        config.num_labels = len(TASKS[run].labels)
        self.model: nn.Module = kind(config).train()
        self.params = tap.prunable_parameters(self.model)
        self.pruner = self.penalty = None
        if variant != "dense":
            reference = tap.Reference.capture(self.params)
            # The first call prunes; after that only what training moves is left to do.
            schedule = tap.schedules.one_shot(SPARSITY, at=1)
            self.pruner = tap.Pruner(self.params, tap.Magnitude, schedule, reference=reference)
            if variant == "penalty":
                self.penalty = tap.CosineAlignment(self.params, reference)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, fused=True)
        self.dtype = torch.float32

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss: Tensor = self.model(**batch).loss
        return loss

    def step(self, batch: dict[str, Tensor]) -> None:
        self.loss(batch).backward()
        if self.penalty is not None:
            self.penalty().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.pruner is not None:
            self.pruner.step()

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> None:
        self.model.eval()
        self.loss(batch)
        self.model.train()


def counted(run: str, length: int) -> int:
    """The floating-point operations of a forward and a backward; nothing is computed for it."""
    with torch.device("meta"):
        training = Training(run, "dense")
        batch = batch_of(run, length, training.model.config.vocab_size)
    with FlopCounterMode(display=False) as counter:
        training.loss(batch).backward()
    return int(counter.get_total_flops())


def measure(run: str, variant: str, repeats: int) -> dict[str, Any]:
    before = start_memory()
    training = Training(run, variant)
    vocabulary = training.model.config.vocab_size
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    found: dict[str, Any] = {"parameters": parameters, "steps": {}}
    found["prunable"] = sum(getattr(*pair).numel() for pair in training.params)
    batches = {length: batch_of(run, length, vocabulary) for length in LENGTHS}

    def timed(call: Callable[[], Any], times: int = repeats) -> list[float]:
        found = []
        for _ in range(times):
            start = time.process_time()
            call()
            found.append(time.process_time() - start)
        return found

    if training.pruner is not None:
        found["round"] = timed(training.pruner.step, 1)
        assert abs(training.pruner.sparsity() - SPARSITY) < 1e-6
    training.dtype = torch.bfloat16
    training.step(batches[64])  # finds its memory, and makes the optimizer's state
    for name, length in STEPS[variant]:
        training.dtype = DTYPES[name]
        batch = batches[length]
        found["steps"][f"{name} {length}"] = timed(lambda b=batch: training.step(b))
    if training.penalty is not None:
        training.dtype, batch, penalty = torch.float32, batches[64], training.penalty
        found["strength"] = timed(lambda: penalty.suggest_strength(training.loss(batch), 0.1))
        found["evaluation"] = timed(lambda: training.evaluate(batch))
    found["peak_bytes"] = peak_memory() - before
    return found


def on_paper(measured: dict[str, Any], operations: int, gpu: str) -> float:
    """The seconds of a step on a GPU, if the assumptions hold."""
    peak, bandwidth = GPUS[gpu]
    moved = measured["parameters"] * ASSUMED["bytes_a_parameter"]
    moved += measured["prunable"] * ASSUMED["bytes_a_masked_entry"]
    return operations / (peak * ASSUMED["of_peak_operations"]) + moved / (
        bandwidth * ASSUMED["of_peak_bandwidth"]
    )


def everything(repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for run in RUNS:
        found[run] = {"operations": {str(length): counted(run, length) for length in LENGTHS}}
        for variant in ("dense", "masks", "penalty"):
            found[run][variant] = one = fresh_process(
                "--run", run, "--variant", variant, "--repeats", str(repeats)
            )
            taken = {name: f"{median(each):.2f} s" for name, each in one["steps"].items()}
            print(run, variant, taken, flush=True)
    return found


def tables(found: dict[str, Any]) -> dict[str, str]:
    rows = ["| run | model | sentences or pairs | epochs | steps | TFLOP a step, 64 / 128 |"]
    rows += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for run, (_, _, sentences, epochs) in RUNS.items():
        model = f"{found[run]['penalty']['parameters'] / 1e6:.0f} M parameters, "
        model += f"{found[run]['penalty']['prunable'] / 1e6:.1f} M of them pruned"
        work = " / ".join(f"{found[run]['operations'][str(n)] / 1e12:.2f}" for n in LENGTHS)
        numbers = f"{sentences:,} | {epochs} | {steps_of(run):,}"
        rows.append(f"| `{SCRIPTS[run]}` | {model} | {numbers} | {work} |")
    made = {"runs": "\n".join(rows)}

    rows = ["| run | dtype | dense, 64 | masks, 64 | masks and penalty, 64 | the same, 128 |"]
    rows += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for run in RUNS:
        for dtype in DTYPES:
            cells = [(variant, f"{dtype} 64") for variant in STEPS]
            cells += [("penalty", f"{dtype} 128")]
            times = [found[run][variant]["steps"].get(what) for variant, what in cells]
            texts = ["" if each is None else f"{median(each):.2f} s" for each in times]
            rows.append(f"| {run} | {dtype} | {' | '.join(texts)} |")
    made["steps"] = "\n".join(rows)

    rows = ["| run | a round of pruning | measuring the strength | evaluating 32 | memory |"]
    rows += ["| --- | ---: | ---: | ---: | ---: |"]
    for run in RUNS:
        one = found[run]["penalty"]
        texts = [f"{median(one[key]):.2f} s" for key in ("round", "strength", "evaluation")]
        rows.append(f"| {run} | {' | '.join(texts)} | {one['peak_bytes'] / 1e9:.1f} GB |")
    made["rest"] = "\n".join(rows)

    names = [f"{dtype} {length}" for dtype, length in STEPS["penalty"]]
    rows = [f"| run | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for run in RUNS:
        steps = found[run]["penalty"]["steps"]
        days = [steps_of(run) * median(steps[name]) / 86400 for name in names]
        rows.append(f"| {run} | {' | '.join(f'{each:.1f} days' for each in days)} |")
    made["days"] = "\n".join(rows)

    rows = [f"| run | {' | '.join(f'{gpu}, 64 / 128' for gpu in GPUS)} |"]
    rows += ["| --- |" + " ---: |" * len(GPUS)]
    for run in RUNS:
        cells = []
        for gpu in GPUS:
            hours = [
                steps_of(run)
                * on_paper(found[run]["penalty"], found[run]["operations"][str(length)], gpu)
                / 3600
                for length in LENGTHS
            ]
            cells.append(" / ".join(f"{each:.2f} h" for each in hours))
        rows.append(f"| {run} | {' | '.join(cells)} |")
    made["paper"] = "\n".join(rows)
    return made


def write(found: dict[str, Any]) -> None:
    """The tables into the document, between their marks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in tables(found).items():
        marks = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text, times = re.subn(marks, lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL)
        assert times == 1, f"{DOCUMENT} has no place for {name}"
    DOCUMENT.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        torch.set_num_threads(1)
        print(json.dumps(measure(options.run, options.variant, options.repeats)))
        return
    if options.tables:
        found = json.loads((RESULTS / "full_runs.json").read_text())["runs"]
    else:
        found = everything(options.repeats)
        save("full_runs", {"load_average": os.getloadavg(), "assumed": ASSUMED, "runs": found})
    write(found)
    for name, table in tables(found).items():
        print(f"\n{name}\n{table}")


if __name__ == "__main__":
    main()
