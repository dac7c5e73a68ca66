"""Pretraining on generated languages: what is drawn, what is learned, and what a kill costs."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

from torchalignprune.crosslingual import (
    LanguageSpec,
    ParallelText,
    generate_corpus,
    pretrain,
    pretraining,
    retrieval_hits,
    sentence_embeddings,
    train_tokenizer,
    translation_table,
)

LANGUAGES = {"source": LanguageSpec(0.0), "other": LanguageSpec(1.0, "Cyrl")}


@functools.cache
def corpus() -> dict[str, list[str]]:
    return generate_corpus(LANGUAGES, train=0, validation=0, test=0, raw=300).raw


@functools.cache
def tokenizer() -> Any:
    return train_tokenizer((text for own in corpus().values() for text in own), 300)


def parallel(rows: slice = slice(250), weight: float = 1.0) -> ParallelText:
    texts = {code: {str(i): t for i, t in enumerate(own[rows])} for code, own in corpus().items()}
    return ParallelText(texts, weight)


def make_model(dropout: float = 0.0) -> XLMRobertaForMaskedLM:
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=130,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    return XLMRobertaForMaskedLM(config)


def run(model: XLMRobertaForMaskedLM, **options: Any) -> list[dict[str, float]]:
    settings: dict[str, Any] = {"pivot": "source", "longest": 60, "steps": 12, "tokens": 512}
    texts = options.pop("parallel", [parallel()])
    return pretrain(model, tokenizer(), texts, **settings | options)


def teacher(texts: Sequence[str]) -> Tensor:
    """Embeddings that depend only on the words."""
    vectors = torch.Generator().manual_seed(0)
    pieces = torch.randn(len(tokenizer()), 8, generator=vectors)
    encoded = tokenizer()(list(texts), add_special_tokens=False)["input_ids"]
    return torch.stack([pieces[ids].mean(0) for ids in encoded])


def word_teacher(texts: Sequence[str]) -> list[Tensor]:
    """States that depend on a word and the one before, but for the last piece of a sentence."""
    vectors = torch.Generator().manual_seed(1)
    pieces = torch.randn(len(tokenizer()), 8, generator=vectors)
    encoded = tokenizer()(list(texts), add_special_tokens=False)["input_ids"]
    states = [pieces[ids] + 0.5 * pieces[ids].roll(1, 0) for ids in encoded]
    return [(3 + 2 * own[:-1]).to(torch.bfloat16) for own in states]


def test_the_tokenizer_is_as_that_of_xlm_r() -> None:
    tok = tokenizer()
    assert len(tok) == 300
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tok.convert_tokens_to_ids(special) == [0, 1, 2, 3, 299]
    text = corpus()["other"][0]
    assert tok.decode(tok(text)["input_ids"], skip_special_tokens=True) == text
    assert tok("a", "b")["input_ids"][0] == 0
    pair = tok.convert_ids_to_tokens(tok(text, text)["input_ids"])
    assert pair[0] == "<s>" and pair.count("</s>") == 3


def test_frequent_words_are_pieces_and_punctuation_and_digits_are_their_own() -> None:
    texts = ["This is very good.", "Very, very good!", "It was very bad in 1984.", "very: 1984"] * 9
    tok = train_tokenizer(texts, 60)
    assert "▁very" in tok.tokenize("It is very, very good.")
    assert tok.tokenize("very.")[-1] == "." and tok.tokenize("1984")[-4:] == list("1984")
    again = train_tokenizer(texts, 60)
    assert again.backend_tokenizer.to_str() == tok.backend_tokenizer.to_str()
    assert len(train_tokenizer(texts, 5000)) < 5000
    # Blanks, compatibility characters and characters that were not there.
    assert tok("\uff56ery  good")["input_ids"] == tok("very good")["input_ids"]
    assert tok.tokenize("ж")[-1] != tok.mask_token and tok("ж")["input_ids"][-2] == 3


@pytest.mark.parametrize("texts", [[], ["", " "], ["abcdefghijklmnop"]])
def test_texts_without_pieces(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="vocabulary should fit the texts, got 8: "):
        train_tokenizer(texts, 8)


def test_it_learns_words_and_translations() -> None:
    model = make_model()
    held = [own[250:] for own in corpus().values()]
    embedded = [sentence_embeddings(model, tokenizer(), own) for own in held]
    before = retrieval_hits(*embedded).float().mean()
    log = run(model, steps=400, learning_rate=5e-3, teacher=teacher)
    assert [line["step"] for line in log] == [100, 200, 300, 400]
    assert not model.training
    for name in ("ranking_mlm", "translation_mlm", "ranking", "teacher", "teacher_ranking"):
        assert log[-1][name] < 0.95 * log[0][name], name
    embedded = [sentence_embeddings(model, tokenizer(), own) for own in held]
    after = retrieval_hits(*embedded).float().mean()
    assert after > before + 0.1, (before, after)


def test_plain_text_is_learned_from_too() -> None:
    log = run(make_model(), steps=100, plain={"other": corpus()["other"][:50]}, teacher=teacher)
    assert log[0].keys() >= {"plain_mlm", "ranking_mlm", "translation_mlm", "teacher"}


def test_a_step_depends_on_its_number_alone() -> None:
    texts = [pretraining._Parallel(parallel(), tokenizer(), 60)]
    first = pretraining._Sampler(texts, None, {}, "source", 512, 0)
    second = pretraining._Sampler(texts, None, {}, "source", 512, 0)
    drawn = [first(step) for step in range(20)]
    assert [second(step) for step in reversed(range(20))] == drawn[::-1]
    other = pretraining._Sampler(texts, None, {}, "source", 512, 1)
    assert [other(step) for step in range(20)] != drawn
    for kind, batch in drawn:
        assert kind in ("ranking", "translation")
        assert all(row[0] == 0 and row[-1] == 2 for row in batch.rows)
        assert all((row.count(2) == 3) == (kind == "translation") for row in batch.rows)


def test_pairs_are_translations() -> None:
    texts = [pretraining._Parallel(parallel(), tokenizer(), 60)]
    draw = pretraining._Sampler(texts, None, {}, "source", 512, 0)
    same: dict[str, str] = {}
    for own in parallel().texts.values():
        for name, text in own.items():
            same[tokenizer().decode(tokenizer()(text)["input_ids"][1:-1])] = name
    for step in range(10):
        kind, batch = draw(step)
        if kind == "ranking":
            half = len(batch.rows) // 2
            names = [same[tokenizer().decode(row[1:-1])] for row in batch.rows]
            assert names[:half] == names[half:]
            assert len(set(names)) == half


@functools.cache
def lexicon() -> Any:
    sides = (corpus()["other"][:250], corpus()["source"][:250])
    ids = [tokenizer()(side, add_special_tokens=False)["input_ids"] for side in sides]
    return translation_table(*ids, len(tokenizer()))


def test_links_are_between_words_that_translate_each_other() -> None:
    texts = [pretraining._Parallel(parallel(), tokenizer(), 60)]
    known = {"other": pretraining._Lexicon(lexicon())}
    draw = pretraining._Sampler(texts, None, known, "source", 512, 0)
    seen = 0
    for step in range(10):
        kind, batch = draw(step)
        assert kind == "ranking" or not batch.links
        for row, column, other_row, other_column in batch.links:
            assert abs(row - other_row) == len(batch.rows) // 2
            word, other = batch.rows[row][column], batch.rows[other_row][other_column]
            assert lexicon()[word, other] >= 0.2
            # No other word of the translation is more probable.
            assert lexicon()[word, other] == lexicon()[word][:, batch.rows[other_row]].max()
            seen += 1
    assert seen > 20


def test_ranking_of_words() -> None:
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 10, 11, 12, 2], [0, 20, 21, 22, 2]])
    links = torch.tensor([[1, 1, 0, 1], [1, 2, 0, 2], [1, 3, 0, 3]])
    left = torch.nn.functional.normalize(states[1, 1:4], dim=1)
    right = torch.nn.functional.normalize(states[0, 1:4], dim=1)
    scores = left @ right.T / 0.1
    order = torch.arange(3)
    expected = (
        torch.nn.functional.cross_entropy(scores, order)
        + torch.nn.functional.cross_entropy(scores.T, order)
    ) / 2
    torch.testing.assert_close(pretraining._word_ranking(states, ids, links), expected)
    # Two of the words are the same: neither is a wrong answer for the other.
    ids[0, 2] = 10
    scores[0, 1] = scores[1, 0] = -torch.inf
    expected = (
        torch.nn.functional.cross_entropy(scores, order)
        + torch.nn.functional.cross_entropy(scores.T, order)
    ) / 2
    torch.testing.assert_close(pretraining._word_ranking(states, ids, links), expected)


def test_lexicons_are_learned_from() -> None:
    log = run(make_model(), steps=200, learning_rate=5e-3, lexicons={"other": lexicon()})
    assert log[-1]["words"] < 0.9 * log[0]["words"]


def test_words_that_the_teacher_knows() -> None:
    texts = [pretraining._Parallel(parallel(), tokenizer(), 60)]
    plain = {"source": corpus()["source"][250:]}
    raw = pretraining._Plain(plain, tokenizer(), 60)
    taught = pretraining._taught([parallel()], texts, plain, raw, "source")
    assert taught == corpus()["source"]
    known = {"other": pretraining._Lexicon(lexicon())}
    draw = pretraining._Sampler(texts, raw, known, "source", 512, 0)
    of_pivot = [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in taught]
    states = pretraining._WordStates(word_teacher(taught))
    flat = torch.cat(word_teacher(taught)).float()
    expected = (flat - flat.mean(0)) / flat.std(0)
    starts = torch.tensor([0] + [len(ids) - 1 for ids in of_pivot]).cumsum(0)
    same = translated = 0
    for step in range(30):
        kind, batch = draw(step)
        assert (kind == "translation") == (not batch.known)
        places, wanted = states.of(batch.known)
        kept = [entry for entry in batch.known if entry[3] < len(of_pivot[entry[2]]) - 1]
        assert 0 < len(kept) < len(batch.known) or kind == "translation"
        assert places.tolist() == [[row, column] for row, column, _, _ in kept]
        for (row, column, sentence, place), own in zip(kept, wanted, strict=True):
            torch.testing.assert_close(
                own.float(), expected[starts[sentence] + place], atol=2e-2, rtol=2e-2
            )
            word, other = batch.rows[row][column], of_pivot[sentence][place]
            if batch.rows[row][1:-1] == of_pivot[sentence]:
                assert word == other
                same += 1
            else:
                assert lexicon()[word, other] >= 0.2
                translated += 1
    assert same > 100 and translated > 100


def test_the_teacher_of_words_is_followed_in_both_languages() -> None:
    options: dict[str, Any] = {"word_teacher": word_teacher, "learning_rate": 5e-3, "steps": 200}
    log = run(make_model(), lexicons={"other": lexicon()}, **options)
    assert log[-1]["word_teacher"] < 0.8 * log[0]["word_teacher"]
    assert "teacher" not in log[0]


def test_what_is_masked() -> None:
    torch.manual_seed(0)
    rows = [[0, *range(4, 40), 2]] * 64
    ids, attention = pretraining._padded(rows)
    assert ids.shape == (64, 40) and attention.sum() == 64 * 38
    inputs, places = pretraining._masked(ids, attention, tokenizer(), 0.15)
    assert len(places) == len(set(places.tolist())) == int(0.15 * 64 * 38) // 64 * 64
    assert (ids.flatten()[places] > 3).all()
    changed = inputs != ids
    allowed = torch.zeros(ids.numel(), dtype=torch.bool)
    allowed[places] = True
    assert not (changed.flatten() & ~allowed).any()
    masked = (inputs == tokenizer().mask_token_id).sum() / len(places)
    kept = 1 - changed.sum() / len(places)
    assert 0.7 < masked < 0.9 and 0.03 < kept < 0.2


def weights(model: XLMRobertaForMaskedLM) -> dict[str, Tensor]:
    return {name: own.detach().clone() for name, own in model.named_parameters()}


def test_a_killed_run_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"save_every": 5, "teacher": teacher, "steps": 120}
    options["word_teacher"] = word_teacher
    whole = make_model(dropout=0.1)
    log = run(whole, **options, folder=tmp_path / "whole")
    save = pretraining._Run.save

    def killed(self: Any, step: int) -> None:
        save(self, step)
        if step == 85:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretraining._Run, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(make_model(dropout=0.1), **options, folder=tmp_path / "killed")
    monkeypatch.undo()
    torch.manual_seed(123)
    again = make_model(dropout=0.1)
    assert run(again, **options, folder=tmp_path / "killed") == log
    for name, own in weights(whole).items():
        assert torch.equal(own, weights(again)[name]), name
    lines = (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == log
    assert not list(tmp_path.glob("*/*.partial"))


def test_random_numbers_of_others_are_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    model = make_model()
    torch.manual_seed(7)
    run(model, steps=3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps should be greater than 0, got 0"),
        ({"tokens": 0}, "tokens should be greater than 0, got 0"),
        ({"warmup": 1.5}, "warmup should be from 0 to 1, got 1.5"),
        ({"decay": -0.1}, "decay should be from 0 to 1, got -0.1"),
        ({"teacher_weight": -1.0}, "teacher_weight should be at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature should be greater than 0, got 0.0"),
        ({"parallel": []}, "parallel should have at least one text, got none"),
        ({"parallel": [parallel(weight=0.0)]}, "weight should be greater than 0, got 0.0"),
        (
            {"parallel": [ParallelText({"source": {"0": "a"}})]},
            "a parallel text should have at least two languages, got source",
        ),
        ({"longest": 63}, "longest should be at most 62, since .* take 128 tokens, got 63"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model = make_model()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        run(model, **options)
    assert all(torch.equal(own, before[name]) for name, own in model.named_parameters())


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    run(make_model(), folder=tmp_path)
    model = make_model()
    before = weights(model)
    with pytest.raises(ValueError, match=r'should be of a run with .*"seed": 1.* got .*"seed": 0'):
        run(model, folder=tmp_path, seed=1)
    state = load_file(tmp_path / "state.safetensors")
    assert not any(torch.equal(before[name], state[name]) for name in before if "bias" not in name)
    with pytest.raises(
        ValueError, match=r"should have teacher.weight of shape \(8, 32\), got None"
    ):
        run(model, folder=tmp_path, teacher=teacher)
    assert all(torch.equal(own, before[name]) for name, own in model.named_parameters())


def test_a_loss_that_is_not_finite() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.bias[5] = float("nan")
    with pytest.raises(RuntimeError, match=r"the loss \w+_mlm is nan in step 0"):
        run(model)


def test_another_tokenizer_is_refused() -> None:
    other = train_tokenizer(corpus()["other"], 400)
    other.pad_token = "<unk>"
    model = make_model()
    with pytest.raises(ValueError, match=r"should have <s>, <pad> and </s> at \[0, 1, 2\], got"):
        pretrain(model, other, [parallel()], steps=1, longest=60)


def test_states_are_safetensors(tmp_path: Path) -> None:
    run(make_model(), folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "state.safetensors"]
    state = load_file(tmp_path / "state.safetensors")
    save_file(state, tmp_path / "state.safetensors", {"step": "1"})
    with pytest.raises(ValueError, match="got None"):
        run(make_model(), folder=tmp_path)
    save_file(state, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="got None"):
        run(make_model(), folder=tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"state\.safetensors is not the state of a run: "):
        run(make_model(), folder=tmp_path)
