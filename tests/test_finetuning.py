"""Fine-tuning on one language: reproducible, pruned on the way, and it learns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import torchalignprune as tap
from tiny_xlmr import unigram, wordpiece, xlmr
from torchalignprune.crosslingual import (
    GENERATED_POS,
    GENERATED_TOPICS,
    TASKS,
    FineTuning,
    GeneratedCorpus,
    Task,
    encode_words,
    evaluate_zero_shot,
    finetune,
    generate_corpus,
)
from torchalignprune.crosslingual import finetuning as module
from torchalignprune.crosslingual.words import IGNORED


@functools.cache
def corpus() -> GeneratedCorpus:
    return generate_corpus(train=96, validation=0, test=40, raw=0)


def topics_model(seed: int = 0) -> Any:
    return xlmr(GENERATED_TOPICS.labels, "SequenceClassification", seed)


def topics(model: Any, **options: Any) -> FineTuning:
    rows = corpus().topics["source"]["train"]
    settings = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3} | options
    return finetune(model, wordpiece(), GENERATED_TOPICS, rows, **settings)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_same_seed_gives_the_same_weights() -> None:
    models = [topics_model() for _ in range(4)]
    found = [topics(models[0]), topics(models[1]), topics(models[2], seed=1)]
    # What a callback draws, and the mode that it leaves, change nothing.
    modes = []

    def meddle(step: int) -> None:
        modes.append(models[3].training)
        torch.rand(3)
        models[3].eval()

    state = torch.get_rng_state()
    found.append(topics(models[3], on_step=meddle))
    assert torch.equal(torch.get_rng_state(), state)
    ends = [weights(model) for model in models]
    assert equal(ends[0], ends[1]) and equal(ends[0], ends[3]) and not equal(ends[0], ends[2])
    assert found[0] == found[1] == found[3] != found[2]
    assert modes == [True] * 12 and found[0].steps == 12 and len(found[0].losses) == 2
    assert not any(model.training for model in models)
    assert all(parameter.grad is None for parameter in models[0].parameters())


def learned(task: Task, model: Any, tokenizer: Any, languages: Any, **options: Any) -> Any:
    rows = languages["source"]["train"]
    before = evaluate_zero_shot(model, tokenizer, task, languages, supervised="source")
    found = finetune(model, tokenizer, task, rows, batch_size=8, **options)
    after = evaluate_zero_shot(model, tokenizer, task, languages, supervised="source")
    assert found.losses[-1] < found.losses[0]
    return before.supervised_score, after.supervised_score


def small_model(task: Task, kind: str) -> tuple[Any, Any]:
    """A tokenizer that knows the words of the source, and a model wide enough to learn them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.WordLevelTrainer(special_tokens=specials, show_progress=False)
    rows = learnable().pos["source"]["train"]["tokens"]
    words.train_from_iterator((" ".join(sentence) for sentence in rows), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        id2label=dict(enumerate(task.labels)),
        label2id={label: i for i, label in enumerate(task.labels)},
    )
    return getattr(transformers, f"XLMRobertaFor{kind}")(config), tokenizer


@functools.cache
def learnable() -> GeneratedCorpus:
    return generate_corpus(train=400, validation=0, test=100, raw=0)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_learns_tags(autocast: torch.dtype | None) -> None:
    model, tokenizer = small_model(GENERATED_POS, "TokenClassification")
    before, after = learned(
        GENERATED_POS,
        model,
        tokenizer,
        learnable().pos,
        epochs=3,
        learning_rate=5e-3,
        autocast=autocast,
    )
    assert before.high < 0.5 and after.low > 0.8


def test_learns_topics_under_labels_of_any_order() -> None:
    order = GENERATED_TOPICS.labels[::-1]
    named = Task("reversed", "text", order)
    model, tokenizer = small_model(named, "SequenceClassification")
    before, after = learned(
        GENERATED_TOPICS, model, tokenizer, learnable().topics, epochs=6, learning_rate=3e-3
    )
    # Chance is 0.2.
    assert before.high < 0.4 and after.low > 0.5


def test_a_pair_is_learned_from_its_two_texts() -> None:
    import datasets

    task = TASKS["pawsx"]
    rows = datasets.Dataset.from_dict(
        {"text": ["The units"] * 4, "text_pair": ["were kept", "."] * 2, "label": [0, 1] * 2}
    )
    model = xlmr(task.labels, "SequenceClassification")
    seen: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    finetune(model, wordpiece(), task, rows, epochs=1)
    expected = wordpiece()(["The units"] * 4, ["were kept", "."] * 2, padding=True)["input_ids"]
    assert sorted(seen) == sorted(expected)


def test_the_pruner_is_at_its_target() -> None:
    model = topics_model()
    params = tap.prunable_parameters(model.roberta)
    schedule = tap.schedules.steps({0: 0.0, 4: 0.3, 15: 0.6})
    pruner = tap.Pruner(params, tap.AlignedMagnitude, schedule)
    sparsities = []
    topics(model, pruner=pruner, on_step=lambda step: sparsities.append(pruner.sparsity()))
    assert sparsities == pytest.approx([0.0] * 3 + [0.3] * 9, abs=1e-3)
    # It goes on in the next call.
    topics(model, pruner=pruner, seed=1)
    assert pruner.steps == 24 and pruner.sparsity() == pytest.approx(0.6, abs=1e-3)
    zeros = sum(int((getattr(*pair) == 0).sum()) for pair in params)
    assert zeros == round(0.6 * sum(getattr(*pair).numel() for pair in params))


@pytest.mark.parametrize("kind", [tap.CosineAlignment, tap.FrobeniusAlignment])
def test_the_penalty_keeps_the_weights_near_the_reference(kind: Callable[..., Any]) -> None:
    found = {}
    for strength in (0.0, 10.0):
        model = topics_model()
        params = tap.prunable_parameters(model.roberta)
        penalty = kind(params, tap.Reference.capture(params))
        found[strength] = topics(model, penalty=penalty, strength=strength)
        assert found[strength].penalty == pytest.approx(penalty().item())
    assert 0 < found[10.0].penalty < 0.5 * found[0.0].penalty
    assert topics(topics_model()).penalty is None


def test_losses_are_without_the_penalty_and_gradients_are_clipped_with_it() -> None:
    class Steep(torch.nn.Module):
        """A penalty whose value never changes, with a large gradient or none."""

        def __init__(self, weight: Tensor, slope: float) -> None:
            super().__init__()
            self.weight, self.slope = [weight], slope

        def forward(self) -> Tensor:
            (weight,) = self.weight
            return 100 + self.slope * (weight - weight.detach()).sum()

    norms: list[float] = []

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm([g for g in grads if g is not None])))

    model = topics_model()
    flat = Steep(model.classifier.dense.weight, 0.0)
    found = topics(model, penalty=flat, strength=1.0)
    assert found.losses == topics(topics_model()).losses and found.penalty == 100
    model = topics_model()
    handle = register_optimizer_step_pre_hook(look)
    topics(model, penalty=Steep(model.classifier.dense.weight, 1e3), strength=1.0)
    handle.remove()
    assert norms == pytest.approx([1.0] * 12, rel=1e-4)


@pytest.mark.parametrize("bare", ["skip", "label"])
def test_only_first_subwords_are_learned(bare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels of a batch against those of the words, and all rows once in an epoch."""
    model = xlmr(GENERATED_POS.labels)
    gold: list[list[int]] = []
    loss = module._loss

    def watched(logits: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        gold.extend(labels.tolist())
        return loss(logits, labels, *rest)

    monkeypatch.setattr(module, "_loss", watched)
    rows = corpus().pos["source"]["train"]
    finetune(model, unigram(), GENERATED_POS, rows, epochs=1, batch_size=10, bare_pieces=bare)

    def places(labels: list[int]) -> list[tuple[int, int]]:
        return [(i, label) for i, label in enumerate(labels) if label != IGNORED]

    expected, other = (
        sorted(
            places(sentence.labels)
            for sentence in encode_words(
                unigram(), rows["tokens"], rows["labels"], max_length=48, bare_pieces=kind
            )
        )
        for kind in (bare, "label" if bare == "skip" else "skip")
    )
    assert sorted(map(places, gold)) == expected != other


def test_batches_of_like_length() -> None:
    lengths = [i % 37 for i in range(205)]
    batches = module._batches(lengths, 10, seed=0)
    epoch = [next(batches) for _ in range(21)]
    assert sorted(i for batch in epoch for i in batch) == list(range(205))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in epoch]
    assert max(spread) <= 2
    again = [next(batches) for _ in range(21)]
    assert sorted(i for batch in again for i in batch) == list(range(205)) and again != epoch


def test_the_learning_rate_rises_and_falls() -> None:
    rate = module._rate(steps=10, rising=3)
    rates = [rate(step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1 - i / 7 for i in range(7)])
    assert [module._rate(1, 0)(0), module._rate(2, 1)(0), module._rate(2, 1)(1)] == [1.0, 0.5, 1.0]


def test_parameter_groups() -> None:
    model = topics_model()
    model.roberta.embeddings.requires_grad_(False)
    groups = {(g["lr"], g["weight_decay"]): g for g in module._parameter_groups(model, 1, 2, 0.1)}
    assert groups.keys() == {(1, 0.1), (1, 0.0), (2, 0.1), (2, 0.0)}
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {
        key: {named[id(parameter)] for parameter in group["params"]}
        for key, group in groups.items()
    }
    assert names[2, 0.1] == {"classifier.dense.weight", "classifier.out_proj.weight"}
    assert "roberta.encoder.layer.0.output.dense.weight" in names[1, 0.1]
    assert "roberta.encoder.layer.0.output.LayerNorm.weight" in names[1, 0.0]
    assert not any("embeddings" in name for group in names.values() for name in group)


def test_words_that_do_not_fit_are_counted() -> None:
    rows = corpus().pos["source"]["train"].select(range(4))
    found = finetune(xlmr(GENERATED_POS.labels), wordpiece(), GENERATED_POS, rows, max_length=8)
    words = encode_words(wordpiece(), rows["tokens"], max_length=8)
    assert found.cut_off == sum(sentence.cut_off for sentence in words) > 0


def finished(model: Any) -> tap.Pruner:
    params = tap.prunable_parameters(model.roberta)
    pruner = tap.Pruner(params, tap.Magnitude, tap.schedules.constant(0.0))
    pruner.finalize()
    return pruner


def other_pruner(model: Any) -> tap.Pruner:
    params = tap.prunable_parameters(topics_model().roberta)
    return tap.Pruner(params, tap.Magnitude, tap.schedules.constant(0.0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs should be a number above 0, got 0"),
        ({"epochs": math.nan}, ValueError, "epochs should be a number above 0, got nan"),
        ({"batch_size": 0}, ValueError, "batch_size should be at least 1, got 0"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate should be a number above 0"),
        ({"head_learning_rate": 0.0}, ValueError, "head_learning_rate should be a number above 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay should be a number of at least 0"),
        ({"warmup": 1.0}, ValueError, "warmup should be a share from 0 to below 1, got 1.0"),
        ({"strength": math.inf}, ValueError, "strength should be a number of at least 0, got inf"),
        ({"strength": 0.1}, ValueError, "strength goes with a penalty, got 0.1 without one"),
        ({"penalty": 0.1}, TypeError, "penalty should be a regularizer"),
        ({"autocast": torch.float16}, ValueError, "autocast should be torch.bfloat16 or None"),
        ({"max_length": 49}, ValueError, "max_length should be from 1 to 48"),
        ({"pruner": "magnitude"}, TypeError, "pruner should be a Pruner"),
        ({"pruner": finished}, ValueError, "pruner should not be finished"),
        ({"pruner": other_pruner}, ValueError, "pruner should be of this model"),
        ({"task": GENERATED_POS}, ValueError, "model should have the labels of generated_pos"),
        ({"rows": "pos"}, ValueError, "should have a column text, got id, tokens, labels"),
        ({"rows": "none"}, ValueError, "has no sentences in 'train'"),
        ({"rows": "splits"}, TypeError, "should be a datasets.Dataset, .*, got DatasetDict"),
        ({"rows": "list"}, TypeError, "should be a datasets.Dataset, .*, got list"),
    ],
)
def test_bad_input_leaves_the_model_alone(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = topics_model()
    options = {k: v(model) if k == "pruner" and callable(v) else v for k, v in options.items()}
    before = weights(model)
    rows = corpus().topics["source"]["train"]
    chosen = {"pos": corpus().pos["source"]["train"], "none": rows.select([])}
    chosen |= {"splits": corpus().topics["source"], "list": list(rows)}
    rows = chosen.get(options.pop("rows", ""), rows)
    task = options.pop("task", GENERATED_TOPICS)
    with pytest.raises(error, match=message):
        finetune(model, wordpiece(), task, rows, **options)
    assert equal(before, weights(model)) and not model.training


def test_frozen_models_and_losses_that_explode() -> None:
    with pytest.raises(ValueError, match="should have parameters that require a gradient"):
        topics(topics_model().requires_grad_(False))
    model = topics_model()
    with torch.no_grad():
        model.classifier.out_proj.bias[0] = math.nan
    with pytest.raises(RuntimeError, match="the loss is nan in epoch 1: a lower learning_rate"):
        topics(model)
    assert not model.training
