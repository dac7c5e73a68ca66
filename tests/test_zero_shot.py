"""Zero-shot evaluation: scores counted by hand, intervals against a slow twin, reports."""

from __future__ import annotations

import io
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import reference as twin
from test_crosslingual_readers import tagged, write
from tiny_xlmr import SENTENCES, Lookup, unigram, wordpiece, xlmr
from torchalignprune import prunable_parameters
from torchalignprune.crosslingual import (
    CC100_GIB,
    TASKS,
    Comparison,
    Estimate,
    LanguageScore,
    Task,
    ZeroShotReport,
    bootstrap,
    encode_words,
    evaluate_zero_shot,
    load_task,
    plot_heat_map,
    plot_retention,
)
from torchalignprune.crosslingual.bootstrap import quantiles, resampled_sums
from torchalignprune.crosslingual.inputs import longest_input
from torchalignprune.crosslingual.spans import span_counts, spans

LABELS = ("A", "B", "C")
WORDS = Task("own", "words", LABELS)
ENTITIES = Task("entities", "words", ("O", "B-X", "I-X", "B-Y", "I-Y"), metric="span_f1")
TEXTS = Task("texts", "text", LABELS, parallel=True)
PAIRS = Task("pairs", "pair", LABELS, parallel=True)


def dataset(task: Task, columns: dict[str, Any], split: str = "test") -> datasets.DatasetDict:
    label = datasets.ClassLabel(names=list(task.labels))
    string = datasets.Value("string")
    kinds = {
        "tokens": datasets.Sequence(string),
        "labels": datasets.Sequence(label),
        "label": label,
    }
    features = datasets.Features({key: kinds.get(key, string) for key in columns})
    return datasets.DatasetDict({split: datasets.Dataset.from_dict(columns, features=features)})


def first_id(word: str) -> int:
    """The first subword of a word."""
    ids = wordpiece()([word], is_split_into_words=True, add_special_tokens=False).input_ids
    return int(ids[0])


def lookup(task: Task, **labels: str) -> Lookup:
    """A tagger that knows the first subwords of some words, and else says the first label."""
    table = torch.zeros(len(wordpiece()), dtype=torch.long)
    for word, label in labels.items():
        table[first_id(word)] = task.labels.index(label)
    return Lookup(table, task.labels, words=task.kind == "words")


def counts(score: LanguageScore) -> tuple[list[int], list[int]]:
    return score.hits.tolist(), score.out_of.tolist()


# The words' first subwords are all different ones.
KNOWN = {"The": "A", "Hùng": "B", "محاطة": "C"}


def test_the_first_subwords_of_the_known_words_differ() -> None:
    assert len({first_id(word) for word in KNOWN}) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_accuracy_over_words(batch_size: int) -> None:
    model = lookup(WORDS, **KNOWN)
    data = {
        "en": dataset(
            WORDS,
            {
                "tokens": [["The", "Hùng"], ["Hùng"], ["The", "Hùng", "محاطة", "The"]],
                "labels": [["A", "B"], ["A"], ["B", "B", "C", "A"]],
            },
        ),
        "ar": dataset(WORDS, {"tokens": [["محاطة", "محاطة"]], "labels": [["C", "B"]]}),
    }
    report = evaluate_zero_shot(model, wordpiece(), WORDS, data, batch_size=batch_size)
    assert counts(report.languages["en"]) == ([2, 0, 3], [2, 1, 4])
    assert counts(report.languages["ar"]) == ([1], [2])
    assert report.scores["en"].value == 5 / 7 and report.scores["ar"].value == 1 / 2
    assert report.supervised_score == report.scores["en"]
    assert report.zero_shot_mean == report.scores["ar"] == Estimate(0.5, 0.5, 0.5)
    assert report.gap is not None and report.gap.value == pytest.approx(5 / 7 - 1 / 2)
    assert not report.parallel and report.task == "own" and report.split == "test"
    assert all(rows <= batch_size for rows, _ in model.batches)
    assert not any(score.cut_off or score.unmapped for score in report.languages.values())


def test_words_that_the_model_never_sees_are_wrong() -> None:
    words = ["The", "", "Hùng", "The", "The"]
    data = {"en": dataset(WORDS, {"tokens": [words, ["The"]], "labels": [["A"] * 5, ["A"]]})}
    sizes = [len(encode_words(wordpiece(), [[word]])[0].labels) - 2 for word in words]
    length = 2 + sum(sizes[:4])
    report = evaluate_zero_shot(lookup(WORDS, **KNOWN), wordpiece(), WORDS, data, max_length=length)
    # "" has no subword, "Hùng" is taken for a B, the last "The" is cut off.
    assert counts(report.languages["en"]) == ([2, 1], [5, 1])
    assert report.languages["en"].cut_off == report.languages["en"].unmapped == 1
    assert str(report).splitlines()[0].split()[-3:] == ["cut", "off", "unmapped"]
    whole = evaluate_zero_shot(lookup(WORDS, **KNOWN), wordpiece(), WORDS, data)
    assert counts(whole.languages["en"]) == ([3, 1], [5, 1])


def test_span_f1() -> None:
    model = lookup(ENTITIES, Hùng="B-X", محاطة="I-X", The="O")
    data = {
        "en": dataset(
            ENTITIES,
            {
                "tokens": [["Hùng", "محاطة", "The"], ["محاطة", "The", "Hùng"], ["The"]],
                "labels": [["B-X", "I-X", "O"], ["B-X", "O", "B-Y"], ["O"]],
            },
        )
    }
    report = evaluate_zero_shot(model, wordpiece(), ENTITIES, data)
    # Found: the one of sentence 1; in sentence 2 an X where a Y is, and an I-X that begins nothing.
    assert counts(report.languages["en"]) == ([2, 0, 0], [2, 3, 0])
    assert report.scores["en"].value == pytest.approx(2 / 5)
    assert report.metric == "span_f1" and report.zero_shot_mean is None and report.gap is None


def test_entities_that_are_cut_off_are_not_found() -> None:
    model = lookup(ENTITIES, Hùng="B-X", The="O")
    data = {"en": dataset(ENTITIES, {"tokens": [["The", "Hùng"]], "labels": [["O", "B-X"]]})}
    length = len(encode_words(wordpiece(), [["The"]])[0].labels)
    report = evaluate_zero_shot(model, wordpiece(), ENTITIES, data, max_length=length)
    assert counts(report.languages["en"]) == ([0], [1]) and report.languages["en"].cut_off == 1


@pytest.mark.parametrize("task", [TEXTS, PAIRS])
def test_accuracy_over_texts(task: Task) -> None:
    model = lookup(task, **KNOWN)
    texts = {"text": ["The Hùng", "Hùng", "محاطة", "The"], "label": ["A", "B", "B", "A"]}
    other = {"text": ["Hùng", "Hùng Hùng", "Hùng", "Hùng"], "label": ["A", "B", "B", "A"]}
    for columns in (texts, other):
        columns["id"] = ["7", "8", "9", "10"]
        if task is PAIRS:
            columns["text_pair"] = ["Hùng The"] * 4
    data = {"en": dataset(task, texts), "vi": dataset(task, other)}
    report = evaluate_zero_shot(model, wordpiece(), task, data, batch_size=3)
    assert counts(report.languages["en"]) == ([1, 1, 0, 1], [1] * 4)
    assert counts(report.languages["vi"]) == ([0, 1, 1, 0], [1] * 4)
    assert report.parallel
    for length in (5, 7, 48):
        model.batches.clear()
        report = evaluate_zero_shot(model, wordpiece(), task, data, max_length=length)
        sizes = [
            len(wordpiece()(text, *["Hùng The"] * (task is PAIRS)).input_ids)
            for text in texts["text"]
        ]
        assert report.languages["en"].cut_off == sum(size > length for size in sizes)
        assert max(columns for _, columns in model.batches) <= length
    assert sum(size > 5 for size in sizes) > 0


def test_it_is_parallel_only_with_the_same_ids() -> None:
    columns = {"text": ["The", "Hùng"], "label": ["A", "B"], "id": ["1", "2"]}
    data = {"en": dataset(TEXTS, columns), "vi": dataset(TEXTS, columns | {"id": ["2", "1"]})}
    assert not evaluate_zero_shot(lookup(TEXTS), wordpiece(), TEXTS, data).parallel


@pytest.mark.parametrize(
    ("make", "bare"), [(unigram, "skip"), (unigram, "label"), (wordpiece, "skip")]
)
def test_every_script_by_a_model_of_transformers(make: Callable[[], Any], bare: Any) -> None:
    """The batched, padded run gives what one sentence at a time gives, word by word."""
    tokenizer = make()
    model = xlmr(LABELS)
    data = {}
    expected = {}
    for language, words in SENTENCES.items():
        sentences = [words, words[::-1], words[:1]]
        found = []
        for sentence in sentences:
            encoded = tokenizer(sentence, is_split_into_words=True, return_tensors="pt")
            with torch.no_grad():
                logits = model(**encoded).logits[0]
            pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
            ids = encoded.word_ids(0)
            places = [
                [at for at, word in enumerate(ids) if word == i] for i in range(len(sentence))
            ]
            firsts = [
                own[bare == "skip" and pieces[own[0]] == "▁" and len(own) > 1] for own in places
            ]
            found.append([LABELS[logits[at].argmax()] for at in firsts])
        # Every second word is labelled with what the model does not say.
        labels = [
            [label if i % 2 else LABELS[LABELS.index(label) - 1] for i, label in enumerate(row)]
            for row in found
        ]
        expected[language] = [len(row) // 2 for row in labels]
        data[language] = dataset(WORDS, {"tokens": sentences, "labels": labels})
    report = evaluate_zero_shot(
        model, tokenizer, WORDS, data, supervised=None, batch_size=2, bare_pieces=bare
    )
    for language, score in report.languages.items():
        assert score.hits.tolist() == expected[language]
    assert report.zero_shot == list(SENTENCES) and report.supervised_score is None
    assert report.gap is None and report.zero_shot_mean is not None


def test_the_models_labels_may_be_in_another_order() -> None:
    data = {"en": dataset(WORDS, {"tokens": [["The", "Hùng"]], "labels": [["A", "B"]]})}
    straight, turned = lookup(WORDS, **KNOWN), lookup(WORDS, **KNOWN)
    turned.config.id2label = {0: "c", 1: "b", 2: "a", 3: "D"}
    turned.table = nn.Parameter(
        torch.cat([straight.table.flip(1), torch.zeros(len(straight.table), 1)], 1),
        requires_grad=False,
    )
    for model in (straight, turned):
        report = evaluate_zero_shot(model, wordpiece(), WORDS, data)
        assert counts(report.languages["en"]) == ([2], [2])
    turned.table[first_id("The"), 3] = 2  # a label that the task does not have
    report = evaluate_zero_shot(turned, wordpiece(), WORDS, data)
    assert counts(report.languages["en"]) == ([1], [2])
    straight.config.id2label = {i: f"LABEL_{i}" for i in range(3)}
    assert evaluate_zero_shot(straight, wordpiece(), WORDS, data).scores["en"].value == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["LABEL_0", "LABEL_1"], "should have the 3 labels of own, got 2 without names"),
        (["A", "B", "D"], "should have the labels of own, A, B, C, got A, B, D"),
    ],
)
def test_labels_that_do_not_fit(names: list[str], message: str) -> None:
    model = lookup(WORDS)
    model.config.id2label = dict(enumerate(names))
    data = {"en": dataset(WORDS, {"tokens": [["The"]], "labels": [["A"]]})}
    with pytest.raises(ValueError, match=message):
        evaluate_zero_shot(model, wordpiece(), WORDS, data)


def test_the_model_is_left_as_it_was() -> None:
    model = xlmr(LABELS).train()
    model.roberta.embeddings.eval()
    before = {name: module.training for name, module in model.named_modules()}
    data = {"en": dataset(WORDS, {"tokens": [["The"]], "labels": [["A"]]})}
    first = evaluate_zero_shot(model, wordpiece(), WORDS, data)
    assert {name: module.training for name, module in model.named_modules()} == before
    again = evaluate_zero_shot(model, wordpiece(), WORDS, data, progress=True)
    assert first.to_json() == again.to_json()
    with pytest.raises(TypeError):
        evaluate_zero_shot(model, object(), WORDS, data)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_bad_input() -> None:
    model, tokenizer = lookup(WORDS), wordpiece()
    data = {"en": dataset(WORDS, {"tokens": [["The"]], "labels": [["A"]]})}

    def refused(error: type[Exception], message: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=message):
            evaluate_zero_shot(*(arguments or (model, tokenizer, WORDS, data)), **options)
        assert not model.batches

    refused(
        ValueError,
        "supervised should be one of the languages, en, or None, got 'fr'",
        supervised="fr",
    )
    refused(ValueError, "batch_size should be at least 1, got 0", batch_size=0)
    refused(ValueError, "max_length should be from 1 to 48, .* got 49", max_length=49)
    refused(ValueError, "bare_pieces should be 'skip' or 'label', got 'x'", bare_pieces="x")
    refused(ValueError, "own in en has no split 'dev', only test", split="dev")
    refused(ValueError, "data goes with language codes", data="/")
    refused(ValueError, "should be one or more different codes", model, tokenizer, WORDS, [])
    refused(
        ValueError, "should be one or more different codes", model, tokenizer, "pos", ["en", "en"]
    )
    refused(TypeError, "should be a list of codes, got 'en'", model, tokenizer, "pos", "en")
    refused(ValueError, "level should be between 0 and 1, got 95", level=95)
    refused(ValueError, "resamples should be at least 1, got 0", resamples=0)
    refused(ValueError, "seed should be at least 0, got -1", seed=-1)
    other = {"en": dataset(TEXTS, {"text": ["a"], "label": ["A"]})}
    refused(ValueError, "should have a column tokens, got", model, tokenizer, WORDS, other)
    empty = {"en": dataset(WORDS, {"tokens": [], "labels": []})}
    refused(ValueError, "own in en has no sentences in 'test'", model, tokenizer, WORDS, empty)
    turned = Task("turned", "words", LABELS[::-1])
    refused(ValueError, "should have the labels C, B, A, got A, B", model, tokenizer, turned, data)


def test_a_model_of_another_kind() -> None:
    data = {"en": dataset(WORDS, {"tokens": [["The"]], "labels": [["A"]]})}
    with pytest.raises(ValueError, match=r"give 3 logits for each subword, got shape \(1, 3\)"):
        evaluate_zero_shot(xlmr(LABELS, "SequenceClassification"), wordpiece(), WORDS, data)


@pytest.mark.parametrize("task", [WORDS, TEXTS])
def test_a_model_that_gives_nan(task: Task) -> None:
    model = lookup(task, **KNOWN)
    columns = {
        "words": {"tokens": [["The", "Hùng"]], "labels": [["A", "B"]]},
        "text": {"text": ["The Hùng"], "label": ["A"]},
    }
    data = {"en": dataset(task, columns[task.kind])}
    assert evaluate_zero_shot(model, wordpiece(), task, data).scores["en"].value == 1
    model.table[first_id("The")] = float("nan")
    with pytest.raises(ValueError, match=f"should give numbers, got NaN for {task.name}"):
        evaluate_zero_shot(model, wordpiece(), task, data)


def test_longest_input() -> None:
    tokenizer = wordpiece()
    assert longest_input(xlmr(LABELS), tokenizer) == 48  # 50 positions, of which two are not used
    endless = SimpleNamespace(model_max_length=int(1e30))
    assert longest_input(xlmr(LABELS), endless) == 48
    assert longest_input(lookup(WORDS), endless) == 48
    assert longest_input(nn.Linear(2, 2), endless) == 512
    assert longest_input(xlmr(LABELS), SimpleNamespace(model_max_length=20)) == 20
    # As many as that do go through the model.
    long = {"en": dataset(TEXTS, {"text": ["The . " * 60], "label": ["A"]})}
    report = evaluate_zero_shot(xlmr(LABELS, "SequenceClassification"), tokenizer, TEXTS, long)
    assert report.languages["en"].cut_off == 1


# Counting


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], set()),
        (["O", "O"], set()),
        (["B-X"], {("X", 0, 1)}),
        (["B-X", "I-X", "I-X"], {("X", 0, 3)}),
        (["B-X", "B-X"], {("X", 0, 1), ("X", 1, 2)}),
        (["I-X", "I-X"], set()),
        (["O", "I-X", "B-Y", "I-X"], {("Y", 2, 3)}),
        (["B-X", "I-Y", "I-X"], {("X", 0, 1)}),
        (["B-X", "O", "I-X"], {("X", 0, 1)}),
    ],
)
def test_spans(labels: list[str], expected: set[tuple[str, int, int]]) -> None:
    assert spans(labels) == expected == twin.spans(labels)


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), max_size=9))
def test_spans_of_random_labels(labels: list[str]) -> None:
    assert spans(labels) == twin.spans(labels)
    assert span_counts(labels, labels) == (2 * len(spans(labels)),) * 2
    with pytest.raises(ValueError, match="predicted should have"):
        span_counts(labels, [*labels, "O"])


@pytest.mark.parametrize("at_a_time", [1, 10, 1 << 20])
def test_resampled_sums(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.array([[1, 2], [0, 5], [7, 7], [3, 0]])
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_A_TIME", at_a_time)
    found = resampled_sums(rows, 25, 3, "de")
    generator = np.random.default_rng([3, zlib.crc32(b"de")])
    step = max(1, at_a_time // 4)
    drawn: list[list[int]] = []
    while len(drawn) < 25:
        drawn += generator.integers(4, size=(min(step, 25 - len(drawn)), 4)).tolist()
    assert found.tolist() == twin.resampled_sums(rows.tolist(), drawn)
    assert not np.array_equal(found, resampled_sums(rows, 25, 3, "fr"))
    assert not np.array_equal(found, resampled_sums(rows, 25, 4, "de"))


def test_an_interval_is_as_wide_as_it_should_be() -> None:
    """Against the normal approximation, which is good for 4,000 sentences."""
    hits = np.random.default_rng(0).random(4000) < 0.7
    report = make({"en": (hits, np.ones(4000))})
    p = hits.mean()
    half = 1.96 * np.sqrt(p * (1 - p) / 4000)
    score = report.scores["en"]
    assert score.value == pytest.approx(p)
    assert score.low == pytest.approx(p - half, abs=0.1 * half)
    assert score.high == pytest.approx(p + half, abs=0.1 * half)


# Reports


def make(
    languages: dict[str, tuple[Any, Any]], parallel: bool = False, **options: Any
) -> ZeroShotReport:
    scores = {
        language: LanguageScore(
            np.asarray(hits, np.int64), np.asarray(out_of, np.int64), 0, 0, language, "ids"
        )
        for language, (hits, out_of) in languages.items()
    }
    return ZeroShotReport("own", "accuracy", "test", scores, parallel=parallel, **options)


N = 40


def two_models(parallel: bool, **options: Any) -> tuple[ZeroShotReport, ZeroShotReport]:
    generator = np.random.default_rng(1)
    out_of = {language: generator.integers(3, 9, N) for language in ("de", "en", "vi")}
    dense, pruned = (
        {
            language: (generator.binomial(words, share[language]), words)
            for language, words in out_of.items()
        }
        for share in (
            {"de": 0.8, "en": 0.95, "vi": 0.6},
            {"de": 0.6, "en": 0.9, "vi": 0.3},
        )
    )
    return make(dense, parallel, **options), make(pruned, parallel, **options)


def draws(report: ZeroShotReport) -> dict[str, list[list[int]]]:
    """The sentences drawn for each language."""
    found = {}
    for language in report.languages:
        group = "" if report.parallel else language
        generator = np.random.default_rng([report.seed, zlib.crc32(group.encode())])
        found[language] = generator.integers(N, size=(report.resamples, N)).tolist()
    return found


def score(report: ZeroShotReport, language: str, times: list[int]) -> float:
    counted = report.languages[language]
    return sum(int(counted.hits[i]) for i in times) / sum(int(counted.out_of[i]) for i in times)


@pytest.mark.parametrize("parallel", [False, True])
def test_every_figure_against_a_slow_twin(parallel: bool) -> None:
    dense, pruned = two_models(parallel, resamples=200, seed=5, level=0.9)
    drawn = draws(pruned)
    everything = list(range(N))

    def estimate(figure: Callable[[Callable[[ZeroShotReport, str], float]], float]) -> Estimate:
        """A figure of scores: of all sentences, and its interval over the draws."""
        values = [
            figure(lambda report, language, r=r: score(report, language, drawn[language][r]))
            for r in range(200)
        ]
        low, high = (twin.percentile(sorted(values), share) for share in (0.05, 0.95))
        return Estimate(
            figure(lambda report, language: score(report, language, everything)), low, high
        )

    def same(found: Estimate | None, expected: Estimate) -> None:
        assert found is not None
        for key in ("value", "low", "high"):
            assert getattr(found, key) == pytest.approx(getattr(expected, key), abs=1e-12)

    for report in (dense, pruned):
        for language in report.languages:
            same(report.scores[language], estimate(lambda s, r=report, x=language: s(r, x)))
        same(
            report.zero_shot_mean,
            estimate(lambda s, r=report: (s(r, "de") + s(r, "vi")) / 2),
        )
        same(
            report.gap,
            estimate(lambda s, r=report: s(r, "en") - (s(r, "de") + s(r, "vi")) / 2),
        )
    comparison = pruned.compare(dense)

    def drop(s: Any, language: str) -> float:
        return float(s(dense, language) - s(pruned, language))

    def relative(s: Any, language: str) -> float:
        return drop(s, language) / float(s(dense, language))

    for kind, drops in ((drop, comparison.drops), (relative, comparison.relative_drops)):
        for language in ("de", "en", "vi"):
            same(drops[language], estimate(lambda s, k=kind, x=language: k(s, x)))

    def mean(s: Any) -> float:
        return (drop(s, "de") + drop(s, "vi")) / 2

    def relative_mean(s: Any) -> float:
        return 2 * mean(s) / float(s(dense, "de") + s(dense, "vi"))

    same(comparison.supervised_drop, estimate(lambda s: drop(s, "en")))
    same(comparison.relative_supervised_drop, estimate(lambda s: relative(s, "en")))
    same(comparison.zero_shot_drop, estimate(mean))
    same(comparison.relative_zero_shot_drop, estimate(relative_mean))
    same(comparison.excess_drop, estimate(lambda s: mean(s) - drop(s, "en")))
    same(
        comparison.relative_excess_drop,
        estimate(lambda s: relative_mean(s) - relative(s, "en")),
    )


def test_pairs_make_intervals_narrower() -> None:
    """Where a hard sentence is hard in every language, and for both models."""
    generator = np.random.default_rng(0)
    easy = generator.random(500) < 0.6
    noise = generator.random((2, 500)) < 0.02
    languages = {"en": easy, "de": easy ^ noise[0], "fr": easy ^ noise[1]}
    ones = np.ones(500)
    paired = make({code: (hits, ones) for code, hits in languages.items()}, parallel=True)
    alone = make({code: (hits, ones) for code, hits in languages.items()})
    assert paired.gap is not None and alone.gap is not None
    assert paired.gap.high - paired.gap.low < 0.5 * (alone.gap.high - alone.gap.low)
    worse = {code: (hits & (np.arange(500) % 50 > 0), ones) for code, hits in languages.items()}
    drop = make(worse).compare(alone).drops["de"]
    assert drop.high - drop.low < 0.5 * (alone.scores["de"].high - alone.scores["de"].low)


def test_a_model_compared_with_itself_lost_nothing() -> None:
    dense, _ = two_models(False)
    comparison = dense.compare(dense)
    nothing = Estimate(0.0, 0.0, 0.0)
    assert all(drop == nothing for drop in comparison.drops.values())
    assert comparison.excess_drop == comparison.relative_excess_drop == nothing


def test_scores_of_nothing() -> None:
    report = make({"en": ([0, 0], [0, 0]), "de": ([0, 1], [2, 2])})
    assert report.scores["en"] == Estimate(0.0, 0.0, 0.0)
    assert report.compare(report).relative_drops["en"] == Estimate(0.0, 0.0, 0.0)


def test_without_a_supervised_language() -> None:
    dense, pruned = (
        make({"de": (hits, [2, 2]), "fr": (hits, [2, 2])}, supervised=None)
        for hits in ([2, 2], [1, 2])
    )
    comparison = pruned.compare(dense)
    assert comparison.supervised_drop is comparison.excess_drop is None
    assert comparison.relative_supervised_drop is comparison.relative_excess_drop is None
    assert comparison.zero_shot_drop is not None and comparison.zero_shot_drop.value == 0.25
    assert "supervised" not in str(comparison) and "supervised" not in str(pruned)
    json.loads(comparison.to_json())


def test_reports_that_do_not_fit() -> None:
    dense, pruned = two_models(False)
    with pytest.raises(ValueError, match="same parallel, False, got True"):
        pruned.compare(two_models(True)[0])
    with pytest.raises(ValueError, match="same supervised, 'en', got 'de'"):
        pruned.compare(two_models(False, supervised="de")[0])
    with pytest.raises(ValueError, match="same languages, de, en, vi, got en"):
        pruned.compare(make({"en": ([1], [1])}))
    for key, value in (("digest", "other"), ("out_of", np.ones(3, np.int64))):
        changed = vars(dense.languages["de"]) | {key: value}
        if key == "out_of":
            changed["hits"] = value
        languages = dense.languages | {"de": LanguageScore(**changed)}
        other = ZeroShotReport("own", "accuracy", "test", languages)
        with pytest.raises(ValueError, match="same sentences; those in de differ"):
            pruned.compare(other)


def test_counts_that_make_no_sense() -> None:
    for hits, out_of in (([2], [1]), ([-1], [1])):
        with pytest.raises(ValueError, match="hits should be from 0 to out_of"):
            make({"en": (hits, out_of)})
    with pytest.raises(ValueError, match="one number for each sentence"):
        make({"en": ([1], [1, 1])})
    with pytest.raises(ValueError, match="languages should have at least one language, got none"):
        make({})
    with pytest.raises(ValueError, match="supervised should be one of the languages, de, or None"):
        make({"de": ([1], [1])})
    one, other = (LanguageScore(np.ones(1, int), np.ones(1, int), 0, 0, "", ids) for ids in "ab")
    with pytest.raises(ValueError, match="same sentence ids in a parallel task"):
        ZeroShotReport("own", "accuracy", "test", {"en": one, "de": other}, parallel=True)


@pytest.mark.parametrize("parallel", [False, True])
def test_json(parallel: bool) -> None:
    dense, pruned = two_models(parallel, seed=2, resamples=50, level=0.8)
    text = pruned.to_json()
    again = ZeroShotReport.from_json(text)
    assert again.to_json() == text and str(again) == str(pruned)
    found = json.loads(text)
    assert found["languages"]["de"]["score"]["value"] == pruned.scores["de"].value
    assert [*map(int, found["languages"]["de"]["hits"].split())] == pruned.languages[
        "de"
    ].hits.tolist()
    comparison = again.compare(ZeroShotReport.from_json(dense.to_json()))
    assert comparison.to_json() == pruned.compare(dense).to_json()
    drops = json.loads(comparison.to_json())
    assert drops["excess_drop"]["value"] == comparison.excess_drop.value  # type: ignore[union-attr]
    for broken in ("[]", "{}", '{"languages": {"en": {}}}', "no JSON"):
        with pytest.raises(ValueError):
            ZeroShotReport.from_json(broken)


def test_the_order_of_the_languages_changes_nothing() -> None:
    dense, pruned = two_models(True)
    turned = ZeroShotReport(
        "own", "accuracy", "test", dict(reversed(dense.languages.items())), parallel=True
    )
    assert pruned.compare(turned).to_json() == pruned.compare(dense).to_json()
    assert turned.scores == dense.scores


def test_tables() -> None:
    dense, pruned = two_models(False)
    comparison = pruned.compare(dense)
    for shown, names in (
        (pruned, ["en (supervised)", "de", "vi", "zero-shot mean", "gap"]),
        (comparison, ["en (supervised)", "de", "vi", "zero-shot mean", "excess over supervised"]),
    ):
        header, *lines = str(shown).splitlines()
        assert header.startswith("language")
        assert [line.partition("  ")[0] for line in lines if line] == names
        file = io.StringIO()
        Console(file=file, width=120).print(shown)
        printed = file.getvalue().split()
        for line in str(shown).splitlines():
            assert all(cell in printed for cell in line.split())
    (row,) = (line.split() for line in str(pruned).splitlines() if line.startswith("de"))
    assert row[1] == f"{100 * pruned.scores['de'].value:.1f}" and row[-1] == str(N)
    (row,) = (line.split() for line in str(comparison).splitlines() if line.startswith("vi"))
    assert row[3] == f"{100 * comparison.drops['vi'].value:+.1f}"
    assert repr(pruned).startswith("ZeroShotReport(own, 3 languages: en ")
    assert repr(comparison).startswith("Comparison(own (test), drop in points: en +")


def test_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned = two_models(False)
    frame = pruned.to_pandas()
    assert list(frame.index) == ["de", "en", "vi"]
    assert frame.loc["vi", "score"] == pruned.scores["vi"].value
    comparison = pruned.compare(dense)
    frame = comparison.to_pandas()
    assert frame.loc["vi", "drop_low"] == comparison.drops["vi"].low
    assert frame.loc["de", "dense"] == dense.scores["de"].value
    monkeypatch.setitem(sys.modules, "pandas", None)
    for shown in (pruned, comparison):
        with pytest.raises(ImportError, match=r'"torchalignprune\[pandas\]"'):
            shown.to_pandas()


# Pictures


def labels_of(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_pictures_of_reports(tmp_path: Path) -> None:
    dense, pruned = two_models(False)
    figure = pruned.plot(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert labels_of(figure.axes[0]) == ["vi", "de", "en (supervised)"]
    comparison = pruned.compare(dense)
    figure = comparison.plot(tmp_path / "drops.svg", "a title", shares=CC100_GIB)
    assert "<svg" in (tmp_path / "drops.svg").read_text()
    assert figure.get_suptitle() == "a title"
    left, right = figure.axes
    assert labels_of(left) == ["en (supervised)", "de", "vi"]
    assert right.get_xscale() == "log" and "CC-100" in right.get_xlabel()
    assert {text.get_text() for text in right.texts} == {"de", "en*", "vi"}
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["Latn"]
    shares = {"de": 0.5, "xx": 1.0}
    figure = comparison.plot(shares=shares, shares_label="verses")
    assert [text.get_text() for text in figure.axes[1].texts] == ["de"]
    assert len(comparison.plot().axes) == 1
    with pytest.raises(ValueError, match="shares_label should say"):
        comparison.plot(shares=shares)
    with pytest.raises(ValueError, match="shares should be above 0"):
        comparison.plot(shares={"de": 0.0}, shares_label="verses")


def test_heat_map_and_retention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned = two_models(False)
    sweep = {0.0: dense, 0.7: pruned, 0.3: dense}
    figure = plot_heat_map(sweep, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert labels_of(axes) == ["en (supervised)", "vi", "de"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["30%", "70%"]
    drops = pruned.compare(dense).drops
    assert axes.images[0].get_array()[1].tolist() == pytest.approx([0, 100 * drops["vi"].value])
    figure = plot_retention({"magnitude": sweep, "aligned": sweep}, tmp_path / "curves.png")
    zero_shot, supervised, *_ = figure.axes[0].lines
    lost = pruned.compare(dense)
    assert lost.relative_zero_shot_drop is not None and lost.relative_supervised_drop is not None
    left = [100, 100, 100 * (1 - lost.relative_zero_shot_drop.value)]
    assert zero_shot.get_ydata().tolist() == pytest.approx(left)
    assert supervised.get_ydata()[2] == pytest.approx(
        100 * (1 - lost.relative_supervised_drop.value)
    )
    assert zero_shot.get_xdata().tolist() == [0, 30, 70] and supervised.get_linestyle() == "--"
    for broken, message in (
        ({0.5: pruned}, "dense model's report at sparsity 0"),
        ({0.0: dense}, "a report of a pruned model too"),
        ({0.0: dense, 70: pruned}, "sparsities should be from 0 to 1, got 70"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_heat_map(broken)
    with pytest.raises(ValueError, match="at least one method"):
        plot_retention({})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pictures need matplotlib"):
        plot_heat_map(sweep)


# From files to figures


def test_from_files(tmp_path: Path) -> None:
    for language in ("en", "vi", "ar"):
        words = SENTENCES[language]
        tags = ["PROPN", "VERB", "ADP", "PUNCT", "X", "NOUN"]
        sentences = [list(zip(words, tags, strict=False)), [(words[0], "NOUN")]]
        write(tmp_path / "udpos" / f"test.{language}.tsv.gz", tagged(sentences))
    labels = TASKS["pos"].labels
    dense, pruned = xlmr(labels), xlmr(labels)
    for module, name in prunable_parameters(pruned):
        torch.nn.utils.prune.l1_unstructured(module, name, amount=0.9)
    reports = [
        evaluate_zero_shot(model, wordpiece(), "pos", ["ar", "en", "vi"], data=tmp_path)
        for model in (dense, pruned)
    ]
    assert [score.sentences for score in reports[0].languages.values()] == [2, 2, 2]
    assert isinstance(reports[1].compare(reports[0]), Comparison)
    read = {language: load_task("pos", language, tmp_path) for language in ("ar", "en", "vi")}
    again = evaluate_zero_shot(dense, wordpiece(), "pos", read)
    assert again.to_json() == reports[0].to_json()


def test_quantiles() -> None:
    assert quantiles(np.arange(101.0), 0.9) == pytest.approx((5.0, 95.0))
