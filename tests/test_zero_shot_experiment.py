"""The sweep through the sparsities, the methods by name, and the log of runs."""

from __future__ import annotations

import functools
import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import torchalignprune as tap
from test_crosslingual_readers import jsonl, write
from tiny_xlmr import wordpiece, xlmr
from torchalignprune.crosslingual import (
    GENERATED_TOPICS,
    GeneratedCorpus,
    ZeroShotReport,
    evaluate_zero_shot,
    finetune,
    finetune_and_prune,
    generate_corpus,
)
from torchalignprune.crosslingual.experiment import DENSE, Experiment, Training
from torchalignprune.crosslingual.recipes import (
    RECIPES,
    REGULARIZERS,
    SumOfPenalties,
    make_penalty,
)
from torchalignprune.crosslingual.run_log import RunLog

TRAINING = Training(epochs=1, retraining_epochs=0.5, batch_size=4, learning_rate=1e-3)
LEVELS = (0.5, 0.9)


@functools.cache
def corpus() -> GeneratedCorpus:
    return generate_corpus(train=32, validation=0, test=20, raw=0)


def sweep(model: Any, pruner: Any, **options: Any) -> tuple[dict[float, ZeroShotReport], Any]:
    measured = []
    params = tap.prunable_parameters(model)

    def evaluate() -> ZeroShotReport:
        entries = sum(getattr(*pair).numel() for pair in params)
        measured.append(1 - sum(int((getattr(*pair) != 0).sum()) for pair in params) / entries)
        return evaluate_zero_shot(
            model, wordpiece(), GENERATED_TOPICS, corpus().topics, supervised="source"
        )

    settings = {"sparsities": LEVELS, "epochs": 1, "batch_size": 8} | options
    rows = corpus().topics["source"]["train"]
    found = finetune_and_prune(
        model, wordpiece(), GENERATED_TOPICS, rows, evaluate, pruner=pruner, **settings
    )
    return found, measured


def topics_model() -> Any:
    return xlmr(GENERATED_TOPICS.labels, "SequenceClassification")


def test_every_stage_is_evaluated_at_its_sparsity() -> None:
    model = topics_model()
    params = tap.prunable_parameters(model)
    found, measured = sweep(model, lambda s: tap.Pruner(params, tap.AlignedMagnitude, s))
    assert list(found) == [0.0, *LEVELS]
    assert measured == pytest.approx([0.0, *LEVELS], abs=1e-3)
    # Without a pruner it trains on the same batches, and the dense stages are the same.
    control, dense = sweep(topics_model(), None)
    assert dense == [0.0, 0.0, 0.0]
    assert control[0.0].to_json() == found[0.0].to_json()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": []}, "sparsities should rise from above 0 to below 1"),
        ({"sparsities": [0.5, 0.3]}, r"at least one, got \[0.5, 0.3\]"),
        ({"sparsities": [0.5, 1.0]}, "sparsities should rise"),
        ({"retraining_epochs": 0}, "retraining_epochs should be a number above 0, got 0"),
        ({"epochs": -1}, "epochs should be a number above 0, got -1"),
    ],
)
def test_bad_sweeps(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(topics_model(), None, **options)


def test_a_pruner_instead_of_a_function_is_refused() -> None:
    model = topics_model()
    schedule = tap.schedules.constant(0.0)
    made: Any = tap.Pruner(tap.prunable_parameters(model), tap.Magnitude, schedule)
    with pytest.raises(TypeError, match="should be a function that makes the Pruner"):
        sweep(model, made)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of real labels in words that the tiny tokenizer knows, and a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("data")
    words = {
        "en": ["The", "units", "were", "kept", "unbending", "."],
        "ar": ["تركيا", "محاطة", "بالبحار", ".", "محاطة", "تركيا"],
        "ru": ["Это", "книга", ".", "книга", "Это", "."],
    }
    for split, count in (("train", 16), ("dev", 6), ("test", 8)):
        for code, own in words.items():
            rows = [
                f"{i}\t{('sports', 'travel', 'health')[i % 3]}\t{own[i % 6]} {own[i // 3 % 6]}"
                for i in range(count)
            ]
            write(folder / "sib200" / f"{split}.{code}.tsv.gz", "\n".join(rows) + "\n")
    xlmr(("A", "B")).base_model.save_pretrained(folder / "model")
    wordpiece().save_pretrained(folder / "model")
    return folder


def load(data: Path, **options: Any) -> Experiment:
    return Experiment.load(data / "model", "topics", "topics", data, **options)


def counts(sweep: dict[float, ZeroShotReport]) -> list[Any]:
    return [
        (sparsity, code, score.hits.tolist())
        for sparsity, report in sweep.items()
        for code, score in report.languages.items()
    ]


@pytest.mark.parametrize("method", [DENSE, *RECIPES])
def test_every_method_reaches_every_sparsity(
    data: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    first = tap.Pruner.__init__

    def remember(self: Any, *args: Any, **options: Any) -> None:
        first(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(tap.Pruner, "__init__", remember)
    found = load(data).run(method, "both", 1.0, 0, TRAINING, sparsities=LEVELS)
    assert list(found) == [0.0, *LEVELS] and list(found[0.9].languages) == ["en", "ar", "ru"]
    assert len(made) == (method != DENSE)
    for pruner in made:
        # Rounded in every unit where the budget is per unit.
        assert pruner.sparsity() == pytest.approx(0.9, abs=0.04 if "wanda" in method else 1e-3)


@pytest.mark.parametrize("method", ["aligned", "wanda-en", "taylor", DENSE])
@pytest.mark.parametrize("regularizer", ["none", "cosine"])
def test_dense_training_that_is_taken_over_changes_nothing(
    data: Path, method: str, regularizer: str
) -> None:
    alone = load(data).run(method, regularizer, 10.0, 3, TRAINING, sparsities=LEVELS)
    shared = load(data)
    shared.run("magnitude", regularizer, 10.0, 3, TRAINING, sparsities=LEVELS)
    other = shared.run(method, regularizer, 10.0, 3, TRAINING, sparsities=LEVELS)
    assert counts(alone) == counts(other)
    # And not that of another seed.
    again = shared.run(method, regularizer, 10.0, 4, TRAINING, sparsities=LEVELS)
    assert counts(again) == counts(
        load(data).run(method, regularizer, 10.0, 4, TRAINING, sparsities=LEVELS)
    )


def test_dense_training_is_not_taken_over_by_a_run_of_other_stages(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def remember(*args: Any, seed: int, **options: Any) -> None:
        seeds.append(seed)
        finetune(*args, seed=seed, **options)

    monkeypatch.setattr("torchalignprune.crosslingual.sweep.finetune", remember)
    experiment = load(data)
    for levels in ((0.5,), (0.9,), (0.5, 0.9)):
        experiment.run("magnitude", "none", 0.0, 3, TRAINING, sparsities=levels)
    assert seeds == [6, 7, 7, 9, 10, 11]


def test_an_experiment_has_the_data_of_its_languages(data: Path) -> None:
    experiment = load(data, languages=["ru"], sentences=4)
    assert list(experiment.test) == ["en", "ru"]
    assert experiment.test["ru"]["test"]["id"] == ["0", "2", "4", "6"]
    assert experiment.validation is not None and len(experiment.validation) == 4
    # Topics 0, 2, 1, 0 of three.
    assert experiment.chance() == {"en": 0.5, "ru": 0.5}
    texts = experiment.calibration
    assert sorted(texts["english"]) == sorted(experiment.train["text"])
    assert len(texts["multilingual"]) == 256
    assert {"Это", "The"} <= {word for text in texts["multilingual"] for word in text.split()}
    report = experiment.run("magnitude", "none", 0.0, 0, TRAINING, validation=True)[0.95]
    assert report.split == "validation" and list(report.languages) == ["en"]
    dense = experiment.run("dense", "none", 0.0, 0, TRAINING, sparsities=LEVELS)[0.0]
    assert experiment.digests() == {c: own.digest for c, own in dense.languages.items()}
    assert experiment.digest() == load(data).digest()
    with pytest.raises(ValueError, match="languages should be among those of topics, ar, en, ru"):
        load(data, languages=["xx"])
    with pytest.raises(ValueError, match="method should be one of dense, magnitude, "):
        experiment.run("best", "none", 0.0, 0, TRAINING)
    with pytest.raises(ValueError, match="name should be one of none, cosine, frobenius, both"):
        experiment.run("magnitude", "best", 0.0, 0, TRAINING)
    model = experiment.new_model(0)
    with pytest.raises(
        ValueError, match=r"collect should .* which Wanda, English inputs needs, got None"
    ):
        RECIPES["wanda-en"].pruner(tap.prunable_parameters(model), tap.schedules.constant(0.0))
    with pytest.raises(
        ValueError, match=r"reference should .* which aligned with pretrained needs, got None"
    ):
        RECIPES["aligned-pretrained"].pruner(
            tap.prunable_parameters(model), tap.schedules.constant(0.0)
        )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("train.en", "topics in en should have a split 'train' to learn from, got only validation"),
        ("test.ru", r"topics in ru, .*, has no split 'test', only train, validation"),
        ("train.ar", r"topics in ar, .*, has no split 'train', only validation, test"),
    ],
)
def test_splits_that_are_missing(missing: str, message: str, data: Path, tmp_path: Path) -> None:
    for file in (data / "sib200").iterdir():
        if not file.name.startswith(missing):
            write(tmp_path / file.name, gzip.decompress(file.read_bytes()).decode())
    with pytest.raises(ValueError, match=message):
        Experiment.load(data / "model", "topics", "topics", tmp_path)


def test_a_treebank_that_is_no_language_is_read_if_it_is_named(data: Path, tmp_path: Path) -> None:
    for config in ("en_ewt", "de_gsd", "de_hdt"):
        for split in ("train", "test"):
            row = {"tokens": ["The", "units"], "upos": ["DET", "NOUN"]}
            jsonl(tmp_path / "udpos" / config / f"{split}.jsonl", [row])

    def load(**options: Any) -> list[str]:
        experiment = Experiment.load(
            data / "model", "pos", "pos", tmp_path, multilingual=False, **options
        )
        return list(experiment.test)

    assert load() == ["en", "de"]
    assert load(languages=["de_hdt"]) == ["en", "de_hdt"]


@pytest.mark.parametrize("method", ["magnitude", "lamp", "wanda-en", "aligned"])
def test_another_budget(data: Path, method: str) -> None:
    experiment = load(data)
    model = experiment.new_model(0)
    params = tap.prunable_parameters(model)
    batches = experiment._calibration_batches(model, "english")
    collect = functools.partial(tap.Calibration.collect, model, batches, params)
    penalty = tap.CosineAlignment(params, tap.Reference.capture(params))
    pruner = RECIPES[method].pruner(
        params, tap.schedules.constant(0.5), collect, budget="layer", penalty=penalty
    )
    assert pruner.penalty is penalty
    for module, _ in params:
        assert int(module.weight_mask.sum()) == round(0.5 * module.weight.numel())


def test_methods_differ(data: Path) -> None:
    """Each name stands for masks of its own on the same weights."""
    masks = {}
    for method, recipe in RECIPES.items():
        experiment = load(data)
        model = experiment.new_model(0)
        params = tap.prunable_parameters(model)
        batches = (
            experiment._calibration_batches(model, recipe.calibration) if recipe.calibration else []
        )
        collect = functools.partial(tap.Calibration.collect, model, batches, params)
        reference = tap.Reference.capture(params)
        torch.manual_seed(0)
        with torch.no_grad():
            for module, _ in params:
                module.weight.add_(0.5 * module.weight.std() * torch.randn_like(module.weight))
        pruner = recipe.pruner(params, tap.schedules.one_shot(0.5, at=2), collect, reference)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        encoded = experiment.tokenizer(["The units"], return_tensors="pt")
        for _ in range(2):
            model(**encoded).logits.square().sum().backward()
            optimizer.step()
            pruner.step()
        masks[method] = torch.cat([module.weight_mask.flatten() for module, _ in params])
    names = list(masks)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert not torch.equal(masks[name], masks[other]), (name, other)


def test_penalties() -> None:
    model = topics_model()
    params = tap.prunable_parameters(model)
    reference = tap.Reference.capture(params)
    with torch.no_grad():
        for module, _ in params:
            module.weight.add_(0.01 * torch.randn_like(module.weight))
    found = {name: make_penalty(name, params, reference) for name in REGULARIZERS}
    assert found.pop("none") is None
    values = {name: penalty().item() for name, penalty in found.items() if penalty is not None}
    assert values["both"] == pytest.approx(values["cosine"] + values["frobenius"])
    assert min(values.values()) > 0
    both = found["both"]
    assert isinstance(both, SumOfPenalties)
    weights = [module.weight for module, _ in params]
    task_loss = torch.stack([(weight**2).sum() for weight in weights]).sum()
    norms = {}
    for what, value in (("task", task_loss), ("penalty", both())):
        gradients = torch.autograd.grad(value, weights, retain_graph=True)
        norms[what] = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    reached = both.suggest_strength(task_loss, 0.3) * norms["penalty"] / norms["task"]
    assert 0.2 < reached <= 0.3 * (1 + 1e-5)


def test_a_log_that_was_cut_off(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new" / "runs.jsonl")
    assert log.lines() == []
    log.append({"a": 1})
    whole = log.path.read_bytes()
    for cut in range(len(whole) + 1):
        log.path.write_bytes(whole + whole[:cut])
        expected = [{"a": 1}] * (2 if cut >= len(whole) - 1 else 1)
        assert log.lines() == expected
        log.append({"b": "ä"})
        assert log.lines() == [*expected, {"b": "ä"}]
    with pytest.raises(ValueError, match="Out of range float"):
        log.append({"c": float("nan")})
