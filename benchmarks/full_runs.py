"""What the full runs of examples/xnli_xlmr.py, pawsx_mbert.py and pos_xlmr.py take.

    python benchmarks/full_runs.py            # measure, then write the tables of docs/full_runs.md
    python benchmarks/full_runs.py --tables   # the tables only, from the JSON

Models of the real size with random weights, 70% of the encoder's weights pruned, batches of 32
without padding. A step is what the Trainer does in one: forward, backward, the gradient of
CosineAlignment, clipping, AdamW and the pruner's step. Timed are a step at 64 subwords in float32
and under autocast to bfloat16, one at 128 under autocast, and a round of pruning. Each model runs
in its own process, whose peak memory is given without what the libraries take.

Times are processor time of one thread, medians of --repeats. Other processes on the machine slow
them down through caches and memory, but waiting does not count.

torch's own counter counts the floating-point operations. The times on GPUs are calculated from
these, with the assumptions in ASSUMED; nothing was measured there.

Writes results/full_runs.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
)

import torchalignprune as tap
from common import (
    RESULTS,
    fresh_process,
    median,
    peak_memory,
    save,
    start_memory,
    write_tables,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "full_runs.md"
BATCH = 32
LENGTHS = (64, 128)
SPARSITY = 0.7
# The dtypes and lengths of the steps that are timed.
STEPS = [("float32", 64), ("bfloat16", 64), ("bfloat16", 128)]

# The configurations of the hub's xlm-roberta-base and bert-base-multilingual-cased. A head for
# words instead of the one for pairs adds less than 0.01% to the operations.
MODELS: dict[str, tuple[Any, Any]] = {
    "XLM-R base": (
        XLMRobertaForSequenceClassification,
        XLMRobertaConfig(
            vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
        ),
    ),
    "mBERT base": (BertForSequenceClassification, BertConfig(vocab_size=119547)),
}
# For each run: the model, the number of English training sentences or pairs, and the epochs.
RUNS = {
    "xnli_xlmr.py": ("XLM-R base", 392_702, 5),
    "pawsx_mbert.py": ("mBERT base", 49_401, 5),
    "pos_xlmr.py": ("XLM-R base", 12_544, 10),
}

# From the data sheets: operations per second in 16 bits (dense), and memory bytes per second.
GPUS = {
    "V100 (fp16)": (125e12, 0.9e12),
    "RTX 4090": (165e12, 1.0e12),
    "A100": (312e12, 1.555e12),
    "H100": (989e12, 3.35e12),
}
ASSUMED = {
    "of_peak_operations": 0.3,
    "of_peak_bandwidth": 0.6,
    # For each parameter: its gradient is made and clipped (8, 12), AdamW reads four numbers and
    # writes three (28).
    "bytes_a_parameter": 48,
    # For each entry with a mask: it is masked in the forward and its gradient in the backward (9
    # each), and cast to 16 bits (6); the penalty reads it, the reference and the mask twice, and
    # adds a gradient (30).
    "bytes_a_masked_entry": 54,
}


def steps_of(run: str) -> int:
    _, rows, epochs = RUNS[run]
    return epochs * math.ceil(rows / BATCH)


def batch_of(model: Any, length: int) -> dict[str, Tensor]:
    ids = torch.randint(5, model.config.vocab_size, (BATCH, length))
    return {"input_ids": ids, "labels": torch.randint(model.config.num_labels, (BATCH,))}


def loss_of(model: nn.Module, batch: dict[str, Tensor], dtype: str = "float32") -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss: Tensor = model(**batch).loss
    return loss


def counted(name: str, length: int) -> int:
    """The floating-point operations of a forward and a backward, counted on the meta device."""
    kind, config = MODELS[name]
    with torch.device("meta"):
        model = kind(config)
        batch = batch_of(model, length)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, batch).backward()
    return int(counter.get_total_flops())


def timed(call: Callable[[], Any], times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return found


def measure(name: str, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = start_memory()
    kind, config = MODELS[name]
    model = kind(config).train()
    params = tap.prunable_parameters(model)
    reference = tap.Reference.capture(params)
    penalty = tap.CosineAlignment(params, reference)
    schedule = tap.schedules.one_shot(SPARSITY, at=1)
    pruner = tap.Pruner(params, tap.Magnitude, schedule, reference=reference, penalty=penalty)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prunable": sum(getattr(*pair).numel() for pair in params),
        "round": timed(pruner.step, 1),
        "steps": {},
    }
    assert abs(pruner.sparsity() - SPARSITY) < 1e-6

    def step(batch: dict[str, Tensor], dtype: str) -> None:
        loss_of(model, batch, dtype).backward()
        penalty().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()

    step(batch_of(model, 64), "bfloat16")  # allocates memory and the optimizer's state
    for dtype, length in STEPS:
        batch = batch_of(model, length)
        found["steps"][f"{dtype} {length}"] = timed(
            lambda batch=batch, dtype=dtype: step(batch, dtype), repeats
        )
    return found | {"peak_bytes": peak_memory() - before}


def on_paper(measured: dict[str, Any], length: int, gpu: str) -> float:
    """The seconds of a step on a GPU, if the assumptions hold."""
    operations = measured["operations"][str(length)]
    peak, bandwidth = GPUS[gpu]
    moved = measured["parameters"] * ASSUMED["bytes_a_parameter"]
    moved += measured["prunable"] * ASSUMED["bytes_a_masked_entry"]
    return operations / (peak * ASSUMED["of_peak_operations"]) + moved / (
        bandwidth * ASSUMED["of_peak_bandwidth"]
    )


def everything(repeats: int) -> dict[str, Any]:
    found = {}
    for name in MODELS:
        found[name] = fresh_process("--model", name, "--repeats", str(repeats))
        found[name]["operations"] = {str(length): counted(name, length) for length in LENGTHS}
        print(name, found[name]["steps"], flush=True)
    return found


def tables(found: dict[str, Any]) -> dict[str, str]:
    rows = ["| | parameters | of them pruned | TFLOP a step, 64 | 128 | memory |"]
    rows += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        cells = [f"{one[key] / 1e6:.1f} M" for key in ("parameters", "prunable")]
        cells += [f"{one['operations'][str(length)] / 1e12:.2f}" for length in LENGTHS]
        rows.append(f"| {name} | {' | '.join(cells)} | {one['peak_bytes'] / 1e9:.1f} GB |")
    made = {"models": "\n".join(rows)}

    steps = [f"{dtype} {length}" for dtype, length in STEPS]
    rows = [f"| | {' | '.join(steps)} | a round of pruning |"]
    rows += ["| --- |" + " ---: |" * (1 + len(steps))]
    for name, one in found.items():
        times = [*(one["steps"][key] for key in steps), one["round"]]
        rows.append(f"| {name} | {' | '.join(f'{median(each):.2f} s' for each in times)} |")
    made["steps"] = "\n".join(rows)

    rows = [f"| | sentences | epochs | steps | {' | '.join(steps)} |"]
    rows += ["| --- |" + " ---: |" * (3 + len(steps))]
    for run, (name, sentences, epochs) in RUNS.items():
        days = [steps_of(run) * median(found[name]["steps"][key]) / 86400 for key in steps]
        cells = [f"{sentences:,}", str(epochs), f"{steps_of(run):,}"]
        cells += [f"{each:.1f} days" for each in days]
        rows.append(f"| `{run}` | {' | '.join(cells)} |")
    made["days"] = "\n".join(rows)

    rows = [f"| | {' | '.join(GPUS)} |", "| --- |" + " ---: |" * len(GPUS)]
    for run, (name, _, _) in RUNS.items():
        cells = []
        for gpu in GPUS:
            hours = [
                steps_of(run) * on_paper(found[name], length, gpu) / 3600 for length in LENGTHS
            ]
            cells.append(" / ".join(f"{each:.2f} h" for each in hours))
        rows.append(f"| `{run}` | {' | '.join(cells)} |")
    made["paper"] = "\n".join(rows)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    parser.add_argument("--repeats", type=int, default=3, help="times that a step is timed")
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        print(json.dumps(measure(options.model, options.repeats)))
        return
    if options.tables:
        found = json.loads((RESULTS / "full_runs.json").read_text())["models"]
    else:
        found = everything(options.repeats)
        save(
            "full_runs",
            {"threads": 1, "load_average": os.getloadavg(), "assumed": ASSUMED, "models": found},
        )
    write_tables(DOCUMENT, tables(found))
    for name, table in tables(found).items():
        print(f"\n{name}\n{table}")


if __name__ == "__main__":
    main()
