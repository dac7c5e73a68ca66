"""Realignment on a real encoder, against other weight updates, and by language.

    python benchmarks/realign.py             # English: 256 sentences to calibrate, 256 to evaluate
    python benchmarks/realign.py --data DIR  # also calibrate and evaluate by language

The encoder is all-MiniLM-L6-v2 (36 matrices), pruned once and not trained. The figure is the mean
cosine between the pruned and the dense encoder's sentence embeddings. Every method sees the inputs
of the dense encoder's layers, so SparseGPT does without what it gains by pruning layer after layer.
DIR holds sib200/{train,test}.LANGUAGE.tsv.gz (SIB-200: id, label and text, separated by tabs).
Prints tables and writes results/realign.json and results/realign_languages.json.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import torchalignprune as tap
from common import save
from sentences import Encoder, cosine, embed
from torchalignprune.demo import bootstrap_interval, prose_sentences

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
RIDGE = 0.01
Params = tap.PrunableParameters
Solver = Callable[[Tensor, Tensor, Tensor], Tensor]


def wanda(params: Params, calibration: tap.Calibration, sparsity: float) -> None:
    scores = tap.criteria.wanda(params, calibration)
    tap.global_unstructured(
        params, tap.Magnitude, importance_scores=scores, amount=sparsity, budget="unit"
    )


def aligned(budget: str) -> Callable[[Params, tap.Calibration, float], None]:
    def masks(params: Params, calibration: tap.Calibration, sparsity: float) -> None:
        tap.global_unstructured(
            params,
            tap.AlignedMagnitude,
            amount=sparsity,
            input_norms=calibration,
            budget=budget,
        )

    return masks


MASKS = {
    "Wanda": wanda,
    "aligned + inputs": aligned("global"),
    "aligned + inputs, per unit": aligned("unit"),
}


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    mask: Tensor | None = None,
    *,
    sparsity: float = 0.5,
    block: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Frantar and Alistarh 2023, "SparseGPT", algorithm 1.

    Columns are visited from left to right. The columns to the right make up for what one loses,
    by the inverse of the inputs' second moments. Unless the mask is given, it is chosen block by
    block, by w^2 / [H^-1]_jj over the remaining columns.

    Args:
        weight: shape (outputs, inputs).
        hessian: the second moments of the inputs, shape (inputs, inputs).
        mask: bool, shaped like the weight.

    Returns:
        The new weights, 0 where pruned, and the mask.
    """
    w, n = weight.clone(), weight.size(1)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(n)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    factor = torch.linalg.cholesky(inverse, upper=True).to(w.dtype)
    kept = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.clone()
    for start in range(0, n, block):
        end = min(start + block, n)
        if mask is None:
            worth = (w[:, start:end] / factor.diagonal()[start:end]).square()
            count = round(sparsity * worth.numel())
            kept[:, start:end] = tap.ops.select_global([worth], count, score="value")[0]
        errors = torch.zeros(w.size(0), end - start)
        for j in range(start, end):
            error = w[:, j] * ~kept[:, j] / factor[j, j]
            w[:, j:end].addr_(error, factor[j, j:end], alpha=-1)
            errors[:, j - start] = error
        w[:, end:] -= errors @ factor[start:end, end:]
    return w * kept, kept


def exact(weight: Tensor, products: Tensor, mask: Tensor) -> Tensor:
    """Solves for every unit separately, in float64."""
    w, products = weight.double(), products.double()
    shift = RIDGE * products.diagonal().mean()
    v = torch.zeros_like(w)
    for i in range(len(w)):
        s = mask[i].nonzero().flatten()
        a = products[s][:, s] + shift * torch.eye(len(s), dtype=torch.float64)
        v[i, s] = torch.linalg.solve(a, products[s] @ w[i] + shift * w[i, s])
    return v.to(weight.dtype)


def admm(weight: Tensor, products: Tensor, mask: Tensor, steps: int = 20) -> Tensor:
    """Boza 2024, "Fast and effective weight update for pruned large language models".

    Features are scaled to the same size, the penalty is 1, and the mask is fixed.
    """
    damped = products + RIDGE * products.diagonal().mean() * torch.eye(len(products))
    scale = damped.diagonal().rsqrt()
    scaled = damped * scale * scale[:, None]
    factor = torch.linalg.inv(scaled + torch.eye(len(scaled)))
    goal = (weight / scale) @ scaled
    z = weight / scale * mask
    u = torch.zeros_like(z)
    for _ in range(steps):
        v = (goal + z - u) @ factor
        z = (v + u) * mask
        u += v - z
    return z * scale


def solved(solver: Solver, *, centered: bool) -> Callable[..., None]:
    """Another weight update, followed by the update of the bias."""

    def update(encoder: Encoder, params: Params, calibration: tap.Calibration) -> None:
        for (module, name), dense in encoder.dense(params).items():
            found = calibration[module, name]
            products = found.covariance if centered else found.second_moment
            new = solver(dense, products, getattr(module, f"{name}_mask"))
            set_weight(module, name, new)
        tap.realign(params, calibration, "bias", encoder.dense(params))

    return update


def set_weight(module: nn.Module, name: str, new: Tensor) -> None:
    with torch.no_grad():
        getattr(module, f"{name}_orig").copy_(new)
        setattr(module, name, new)


def nothing(encoder: Encoder, params: Params, calibration: tap.Calibration) -> None:
    pass


def sequential(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    return sparsegpt(weight, hessian, mask)[0]


UPDATES: dict[str, Callable[..., None]] = {
    "": nothing,
    "+ bias": lambda encoder, params, known: tap.realign(params, known, "bias"),
    "+ weights": lambda encoder, params, known: tap.realign(params, known),
}
PEERS: dict[str, Callable[..., None]] = {
    "+ weights solved one by one": solved(exact, centered=True),
    "+ weights by ADMM (Boza)": solved(admm, centered=True),
    "+ SparseGPT's update, bias": solved(sequential, centered=False),
}


def sparsegpt_alone(
    encoder: Encoder, params: Params, calibration: tap.Calibration, sparsity: float
) -> float:
    """SparseGPT with its own masks: the same sparsity in every layer, biases unchanged."""
    start = time.perf_counter()
    for (module, name), dense in encoder.dense(params).items():
        moments = calibration[module, name].second_moment
        assert moments is not None
        new, mask = sparsegpt(dense, moments, sparsity=sparsity)
        prune.custom_from_mask(module, name, mask)
        set_weight(module, name, new)
    return time.perf_counter() - start


def in_english(encoder: Encoder, sparsities: list[float], sentences: int) -> dict[str, Any]:
    prose = prose_sentences()
    judged = encoder.batches(prose[:sentences])
    text = prose[sentences : 2 * sentences]
    dense = embed(encoder.model, judged)
    start = time.perf_counter()
    norms = tap.Calibration.collect(encoder.model, encoder.batches(text), encoder.params)
    norms_seconds = time.perf_counter() - start
    start = time.perf_counter()
    calibration = encoder.calibrate(text)
    seconds = time.perf_counter() - start
    print(f"{norms!r}: {norms_seconds:.1f} s\n{calibration!r}: {seconds:.1f} s")
    results = []
    for sparsity in sparsities:
        rows: list[tuple[str, Callable[..., float]]] = [
            (f"{name} {update}".strip(), both(masks, run))
            for name, masks in MASKS.items()
            for update, run in {**UPDATES, **(PEERS if name == "Wanda" else {})}.items()
        ]
        rows.append(("SparseGPT", sparsegpt_alone))
        for label, run in rows:
            model, params, known = encoder.copy(calibration)
            took = run(encoder, params, known, sparsity)
            zeros = sum(int((getattr(*pair) == 0).sum()) for pair in params)
            reached = zeros / sum(getattr(*pair).numel() for pair in params)
            assert abs(reached - sparsity) < 0.003, (label, reached)
            cosines = cosine(model, judged, dense)
            low, high = bootstrap_interval(cosines)
            results.append(
                {
                    "method": label,
                    "sparsity": sparsity,
                    "cosine": float(cosines.mean()),
                    "low": low,
                    "high": high,
                    "update_s": took,
                }
            )
            print(
                f"{sparsity:.0%}  {label:38} {results[-1]['cosine']:.3f}  "
                f"({low:.3f} to {high:.3f})  {took:6.2f} s",
                flush=True,
            )
    return {
        "sentences": {"judged": sentences, "calibration": len(text)},
        "calibration_s": {"norms": norms_seconds, "covariance": seconds},
        "results": results,
    }


def both(masks: Callable[..., None], update: Callable[..., None]) -> Callable[..., float]:
    """Masks, then an update, whose seconds are returned."""

    def run(
        encoder: Encoder, params: Params, calibration: tap.Calibration, sparsity: float
    ) -> float:
        masks(params, calibration, sparsity)
        start = time.perf_counter()
        update(encoder, params, calibration)
        return time.perf_counter() - start

    return run


def languages(folder: Path) -> list[str]:
    """The languages of SIB-200 in the folder, English first."""
    found = sorted(path.name.split(".")[1] for path in folder.glob("sib200/train.*.tsv.gz"))
    return sorted(found, key=lambda language: (language != "en", language))


def sib200(folder: Path, split: str, language: str) -> list[str]:
    with gzip.open(
        folder / "sib200" / f"{split}.{language}.tsv.gz", "rt", encoding="utf-8"
    ) as file:
        return [line.rstrip("\n").split("\t")[2] for line in file]


def by_language(
    encoder: Encoder, folder: Path, sparsities: list[float], sentences: int
) -> dict[str, Any]:
    every = languages(folder)
    judged = {
        language: encoder.batches(sib200(folder, "test", language)[:sentences])
        for language in every
    }
    dense = {language: embed(encoder.model, judged[language]) for language in every}
    share = -(-256 // len(every))
    parts = [encoder.calibrate(sib200(folder, "train", language)[:share]) for language in every]
    texts = {
        "English": encoder.calibrate(sib200(folder, "train", "en")[: share * len(every)]),
        f"{len(every)} languages": tap.Calibration.merge(parts, weights=[1.0] * len(every)),
    }
    print(f"\ncalibrated on {share * len(every)} sentences; evaluated on {sentences} per language")
    results = []
    for sparsity in sparsities:
        for name in ("Wanda", "aligned + inputs"):
            for update, run in UPDATES.items():
                for text, calibration in texts.items():
                    model, params, known = encoder.copy(calibration)
                    both(MASKS[name], run)(encoder, params, known, sparsity)
                    cosines = {
                        language: float(cosine(model, judged[language], dense[language]).mean())
                        for language in every
                    }
                    others = [value for key, value in cosines.items() if key != "en"]
                    results.append(
                        {
                            "method": f"{name} {update}".strip(),
                            "sparsity": sparsity,
                            "calibration": text,
                            "mean_of_others": sum(others) / len(others),
                            "cosine": cosines,
                        }
                    )
                    print(
                        f"{sparsity:.0%}  {results[-1]['method']:28} {text:13} "
                        f"en {cosines['en']:.3f}  others {sum(others) / len(others):.3f}  "
                        + " ".join(f"{k} {v:.2f}" for k, v in cosines.items() if k != "en"),
                        flush=True,
                    )
    return {
        "note": "all-MiniLM-L6-v2 was trained on English: its embeddings of other languages are "
        "poor, and the figures say only how well the pruned encoder follows the dense one",
        "sentences": {"judged_per_language": sentences, "calibration": share * len(every)},
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with sib200/ in it")
    parser.add_argument("--sentences", type=int, default=256, help="to evaluate, and to calibrate")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--only-languages", action="store_true", help="skip the English table")
    options = parser.parse_args()
    encoder = Encoder()
    if not options.only_languages:
        save("realign", in_english(encoder, options.sparsity, options.sentences))
    if options.data is None or not languages(options.data):
        where = "--data was not given" if options.data is None else f"no sib200/ in {options.data}"
        print(f"skipped: calibration by language needs SIB-200, and {where}")
        return
    sparsities = [sparsity for sparsity in options.sparsity if sparsity in (0.5, 0.7)]
    judged = min(100, options.sentences)
    save("realign_languages", by_language(encoder, options.data, sparsities, judged))


if __name__ == "__main__":
    main()
