"""Pretrains a small cross-lingual encoder on parallel and plain text.

Three losses share one encoder. *Masked language modelling* (Devlin et al. 2019) on single
sentences teaches each language. *Translation language modelling* (Conneau and Lample 2019), the
same on a sentence beside its translation, ties words to words. *Translation ranking* (Guo et al.
2018, in the symmetric form of Feng et al. 2022) ties sentences to sentences: a sentence's
translation is to be found in the batch by the mean of its states.

With a teacher, a linear map of the state of a sentence's first token also follows the teacher's
embedding of the sentence in the teacher's language, whatever language the sentence is in (Reimers
and Gurevych 2020). With lexicons, words are ranked like sentences (after Cao, Kitaev and Klein
2020). With a teacher of words, another linear map of a word's state follows the teacher's state of
the word or of its translation (the hidden states of Jiao et al. 2020, taken across languages).
"""

from __future__ import annotations

import io
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from torchalignprune import schedules
from torchalignprune.crosslingual.inputs import longest_input
from torchalignprune.crosslingual.retrieval import sentence_means
from torchalignprune.weight_files import flush

if TYPE_CHECKING:
    import scipy.sparse
    from transformers import PreTrainedTokenizerFast

__all__ = ["ParallelText", "pretrain", "train_tokenizer"]

_RANKING, _TRANSLATION, _PLAIN = "ranking", "translation", "plain"
# How often each kind of step is taken.
_KINDS = {_RANKING: 0.4, _TRANSLATION: 0.35, _PLAIN: 0.25}
_MASKED = {_RANKING: 0.15, _TRANSLATION: 0.25, _PLAIN: 0.15}
# The ids of XLM-R's special tokens, and of the first piece.
_BEGIN, _PAD, _END, _FIRST = 0, 1, 2, 4
_STATE = "state.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# How many translations of a word are kept, and the least probability of one to be linked.
_TRANSLATIONS, _SURE = 8, 0.2
# The most linked pairs of words of a batch that are ranked.
_LINKS = 512
_WORD_TEMPERATURE = 0.1
# A batch is drawn from this many times as many sentences of similar length.
_WINDOW = 4


@dataclass(frozen=True)
class ParallelText:
    """The same sentences in several languages.

    Attributes:
        texts: for each language, its sentences by id. A language may lack some.
        weight: how often this text is drawn from, relative to other parallel texts.
    """

    texts: Mapping[str, Mapping[str, str]]
    weight: float = 1.0


def train_tokenizer(texts: Iterable[str], vocabulary: int = 12000) -> PreTrainedTokenizerFast:
    """Trains a tokenizer like XLM-R's: SentencePiece's Unigram (Kudo 2018).

    Args:
        texts: what to learn the pieces from.
        vocabulary: number of pieces, special tokens included; fewer if the texts have fewer.

    Returns:
        The tokenizer, with XLM-R's special tokens under XLM-R's ids (``<mask>`` is the last).

    Raises:
        ValueError: the texts are empty, or have more different characters than ``vocabulary``.
        ImportError: transformers or sentencepiece is not installed.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace("\u200b", ""),
            normalizers.Replace(Regex(r"\s+"), " "),
        ]
    )
    # As in XLM-R, <pad> is at 1, where SentencePiece has no place for it, and <mask> comes last.
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += _unigram_pieces(map(normalizer.normalize_str, texts), vocabulary - 2)
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


def _unigram_pieces(texts: Iterable[str], count: int) -> list[tuple[str, float]]:
    """SentencePiece's pieces and their scores, without its three special ones."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(
            'train_tokenizer needs sentencepiece: pip install "torchalignprune[crosslingual]"'
        ) from error
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=count,
            hard_vocab_limit=False,
            character_coverage=0.9998,
            split_digits=True,
            normalization_rule_name="identity",
            max_sentence_length=1_000_000,
            # Each thread adds up its own sums: the same number of threads gives the same pieces.
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocabulary should fit the texts, got {count + 2}: {error}") from None
    found = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [(found.id_to_piece(i), found.get_score(i)) for i in range(3, len(found))]


@dataclass
class _Sentences:
    """Encoded sentences without special tokens, concatenated in one array."""

    tokens: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]

    @classmethod
    def encode(cls, tokenizer: Any, texts: Sequence[str], longest: int) -> _Sentences:
        encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [np.array(ids[:longest], np.int32) for ids in encoded]
        lengths = [0, *(len(ids) for ids in pieces)]
        return cls(np.concatenate([np.zeros(0, np.int32), *pieces]), np.cumsum(lengths))

    def __getitem__(self, row: int) -> list[int]:
        found: list[int] = self.tokens[self.starts[row] : self.starts[row + 1]].tolist()
        return found

    def lengths(self) -> np.ndarray[Any, Any]:
        return np.diff(self.starts)


class _Parallel:
    """A parallel text, encoded; sentences sorted by length."""

    def __init__(self, text: ParallelText, tokenizer: Any, longest: int) -> None:
        self.weight = text.weight
        self.sentences = {
            code: _Sentences.encode(tokenizer, list(own.values()), longest)
            for code, own in text.texts.items()
        }
        self.rows: dict[str, dict[str, int]] = {}
        lengths: dict[str, list[int]] = {}
        for code, own in text.texts.items():
            for row, (name, length) in enumerate(
                zip(own, self.sentences[code].lengths().tolist(), strict=True)
            ):
                self.rows.setdefault(name, {})[code] = row
                lengths.setdefault(name, []).append(length)
        self.targets: dict[str, int] = {}
        several = [name for name, rows in self.rows.items() if len(rows) > 1]
        self.names = sorted(several, key=lambda name: (max(lengths[name]), name))
        self.longest = [max(lengths[name]) for name in self.names]


class _Plain:
    """Plain text, encoded; sentences of all languages sorted by length."""

    def __init__(self, texts: Mapping[str, Sequence[str]], tokenizer: Any, longest: int) -> None:
        self.sentences = {
            code: _Sentences.encode(tokenizer, own, longest) for code, own in texts.items()
        }
        self.order = {
            code: np.argsort(own.lengths(), kind="stable").tolist()
            for code, own in self.sentences.items()
        }
        self.lengths = {
            code: np.sort(own.lengths()).tolist() for code, own in self.sentences.items()
        }
        self.targets: dict[tuple[str, int], int] = {}


class _Lexicon:
    """The most probable translations of a language's words."""

    def __init__(self, table: scipy.sparse.csr_matrix) -> None:
        size = table.shape[0]
        self.words = np.full((size, _TRANSLATIONS), -1, np.int64)
        self.probabilities = np.zeros((size, _TRANSLATIONS), np.float32)
        for row in range(size):
            own = slice(table.indptr[row], table.indptr[row + 1])
            best = np.argsort(-table.data[own], kind="stable")[:_TRANSLATIONS]
            self.words[row, : len(best)] = table.indices[own][best]
            self.probabilities[row, : len(best)] = table.data[own][best]

    def links(self, source: Sequence[int], target: Sequence[int]) -> list[tuple[int, int]]:
        """The positions of words and of their translations, if these are probable enough."""
        ids = np.asarray(source, np.int64)
        there = self.words[ids][:, :, None] == np.asarray(target, np.int64)
        scores = (there * self.probabilities[ids][:, :, None]).max(1)
        if not scores.size:
            return []
        best = scores.argmax(1)
        sure = np.nonzero(scores[np.arange(len(ids)), best] >= _SURE)[0]
        return [(int(i), int(best[i])) for i in sure]


@dataclass
class _Batch:
    rows: list[list[int]]
    # For each row, the index of the teacher's embedding, -1 if it has none.
    targets: list[int] = field(default_factory=list)
    # Words that translate each other: row and column of the one, row and column of the other.
    links: list[tuple[int, int, int, int]] = field(default_factory=list)
    # Words that the teacher of words knows: row, column, its sentence, and the word there.
    known: list[tuple[int, int, int, int]] = field(default_factory=list)


class _Sampler:
    """Draws the batch of a step, which depends only on the seed and the number of the step."""

    def __init__(
        self,
        parallel: Sequence[_Parallel],
        plain: _Plain | None,
        lexicons: Mapping[str, _Lexicon],
        pivot: str,
        tokens: int,
        seed: int,
    ) -> None:
        self.parallel, self.plain, self.lexicons = parallel, plain, lexicons
        self.pivot, self.tokens, self.seed = pivot, tokens, seed

    def __call__(self, step: int) -> tuple[str, _Batch]:
        draw = random.Random(f"{self.seed}/{step}")
        kinds = {kind: share for kind, share in _KINDS.items() if kind != _PLAIN or self.plain}
        (kind,) = draw.choices(list(kinds), list(kinds.values()))
        if kind == _PLAIN:
            return kind, self._plain(draw)
        (text,) = draw.choices(self.parallel, [text.weight for text in self.parallel])
        chosen = _alike(draw, text.longest, self.tokens // 2)
        names = [text.names[i] for i in chosen]
        pairs = [self._languages(draw, list(text.rows[name])) for name in names]
        first, second = (
            [
                text.sentences[pair[side]][text.rows[name][pair[side]]]
                for name, pair in zip(names, pairs, strict=True)
            ]
            for side in (0, 1)
        )
        if kind == _TRANSLATION:
            both = zip(first, second, strict=True)
            return kind, _Batch([[_BEGIN, *a, _END, _END, *b, _END] for a, b in both])
        targets = [text.targets.get(name, -1) for name in names]
        links: list[tuple[int, int, int, int]] = []
        known: list[tuple[int, int, int, int]] = []
        for row, (name, pair) in enumerate(zip(names, pairs, strict=True)):
            if self.pivot not in text.rows[name]:
                continue
            pivot = text.sentences[self.pivot][text.rows[name][self.pivot]]
            for side, other in ((0, 1), (1, 0)):
                mine, its = row + side * len(names), row + other * len(names)
                if pair[side] == self.pivot:
                    found = [(i, i) for i in range(len(pivot))]
                elif pair[side] in self.lexicons:
                    found = self.lexicons[pair[side]].links((first, second)[side][row], pivot)
                    if pair[other] == self.pivot:
                        # Every row begins with a special token.
                        links += [(mine, i + 1, its, j + 1) for i, j in found]
                else:
                    continue
                if targets[row] >= 0:
                    known += [(mine, i + 1, targets[row], j) for i, j in found]
        links = draw.sample(links, min(len(links), _LINKS))
        rows = [[_BEGIN, *row, _END] for row in first + second]
        return kind, _Batch(rows, targets * 2, links, known)

    def _languages(self, draw: random.Random, there: list[str]) -> tuple[str, str]:
        """Two different languages; the pivot has three times the weight of any other."""
        first, second = "", ""
        while first == second:
            first, second = draw.choices(
                there, [3 if code == self.pivot else 1 for code in there], k=2
            )
        return first, second

    def _plain(self, draw: random.Random) -> _Batch:
        assert self.plain is not None
        codes = list(self.plain.sentences)
        # A compromise between equal shares of the languages and shares by their size.
        weights = [math.sqrt(len(self.plain.order[code])) for code in codes]
        (code,) = draw.choices(codes, weights)
        places = _alike(draw, self.plain.lengths[code], self.tokens)
        chosen = [self.plain.order[code][i] for i in places]
        rows = [[_BEGIN, *self.plain.sentences[code][row], _END] for row in chosen]
        targets = [self.plain.targets.get((code, row), -1) for row in chosen]
        known = [
            (row, i + 1, target, i)
            for row, target in enumerate(targets)
            if target >= 0
            for i in range(len(rows[row]) - 2)
        ]
        return _Batch(rows, targets, known=known)


def _alike(draw: random.Random, lengths: Sequence[int], tokens: int) -> list[int]:
    """Indices of sentences of similar length, with about ``tokens`` tokens; lengths are sorted."""
    end = int(draw.random() * len(lengths)) + 1
    count = max(8, tokens // _rounded(lengths[end - 1] + 2))
    window = range(max(0, end - _WINDOW * count), end)
    return draw.sample(window, min(count, len(window)))


def pretrain(
    model: Any,
    tokenizer: Any,
    parallel: Sequence[ParallelText],
    plain: Mapping[str, Sequence[str]] | None = None,
    *,
    steps: int,
    teacher: Callable[[Sequence[str]], Tensor] | None = None,
    word_teacher: Callable[[Sequence[str]], Sequence[Tensor]] | None = None,
    lexicons: Mapping[str, scipy.sparse.csr_matrix] | None = None,
    pivot: str = "en",
    tokens: int = 6144,
    longest: int = 126,
    learning_rate: float = 1e-3,
    warmup: float = 0.05,
    decay: float = 0.25,
    weight_decay: float = 0.01,
    temperature: float = 0.05,
    teacher_weight: float = 5.0,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    save_every: int = 500,
    progress: bool = False,
) -> list[dict[str, float]]:
    """Pretrains a masked language model on parallel and plain text, in place.

    There are three kinds of steps: 40% rank translations and predict masked tokens (15%) in single
    sentences; 35% predict them (25%) in pairs of a sentence and its translation; 25% predict them
    (15%) in plain sentences of one language, if there are any. The teachers take part in the first
    and the last kind. The optimizer is AdamW, with a learning rate that rises, stays and falls
    linearly to 0, and gradients clipped to a norm of 1.

    A step's batch depends only on the seed and the number of the step. With a ``folder`` the state
    is saved there, and a killed run resumes from the last state; on the CPU, with the same number
    of threads, it ends as if it had not been killed.

    Args:
        model: a model with a ``base_model`` and an ``lm_head``, such as ``XLMRobertaForMaskedLM``,
            on any device. It is left in evaluation mode.
        tokenizer: such as :func:`train_tokenizer` returns, with XLM-R's ids of special tokens.
        parallel: at least one parallel text.
        plain: for each language, sentences without a translation.
        steps: number of steps.
        teacher: returns the embeddings, shape ``(sentences, width)``, of sentences in the pivot
            language; called once.
        word_teacher: returns for each sentence in the pivot language the states of its first
            pieces, shape ``(pieces, width)``, as :func:`torchalignprune.crosslingual.piece_states`
            does; called once. Every component is standardised. Words of other languages follow
            the states of their translations in the pivot language, which the lexicons give.
        lexicons: for each other language, the probabilities that a piece of the pivot translates
            one of its pieces (:func:`torchalignprune.crosslingual.translation_table`). A word is
            then ranked too: its state should be nearest to that of its translation in the batch.
        pivot: the language of the teachers, drawn three times as often as any other.
        tokens: of a batch, approximately, both sentences of a pair included.
        longest: the most tokens of a sentence, special tokens not included; the rest is cut off. A
            pair takes up to ``2 * longest + 4``.
        learning_rate: its maximum.
        warmup: the share of the steps in which the learning rate rises.
        decay: the share of the steps in which it falls, at the end.
        weight_decay: of AdamW.
        temperature: divides the cosines when sentences are ranked.
        teacher_weight: the weight of the losses by which the maps follow the teachers, one minus
            the cosine. The loss that ranks the teacher's embeddings of the batch has weight 1.
        autocast: ``torch.bfloat16`` for :func:`torch.autocast`, or None.
        seed: of everything random, dropout included.
        folder: where to keep the state and ``log.jsonl``; None: nowhere. Use it for one run: a
            state from other texts, teachers or lexicons is not noticed.
        save_every: steps between two saved states.
        progress: show a progress bar on standard error; needs tqdm.

    Returns:
        A dict for every 100 steps: ``step``, ``tokens`` so far, and the means of those of the
        losses ``ranking_mlm``, ``translation_mlm``, ``plain_mlm``, ``ranking``, ``words``,
        ``teacher``, ``teacher_ranking`` and ``word_teacher`` that there are.

    Raises:
        ValueError: there is no parallel text, or one in a single language; a number is out of
            range; the model takes fewer tokens; the state in the folder was made with other
            options or has parameters of other shapes. The model has not changed then.
        RuntimeError: the loss is not finite.
        ImportError: safetensors is missing, for a folder, or tqdm, for ``progress``.

    Example:
        >>> from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM
        >>> from torchalignprune.crosslingual import generate_corpus
        >>> corpus = generate_corpus(train=0, validation=0, test=0, raw=200)
        >>> tokenizer = train_tokenizer(sum(corpus.raw.values(), []), 600)
        >>> config = XLMRobertaConfig(
        ...     vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, intermediate_size=32, max_position_embeddings=130,
        ... )
        >>> text = ParallelText(
        ...     {code: dict(enumerate(own)) for code, own in corpus.raw.items()}
        ... )
        >>> log = pretrain(
        ...     XLMRobertaForMaskedLM(config), tokenizer, [text], pivot="source", longest=60,
        ...     steps=100, tokens=512,
        ... )
        >>> sorted(log[-1])
        ['ranking', 'ranking_mlm', 'step', 'tokens', 'translation_mlm']
    """
    settings = {
        "steps": steps, "pivot": pivot, "tokens": tokens, "longest": longest,
        "learning_rate": learning_rate, "warmup": warmup, "decay": decay,
        "weight_decay": weight_decay, "temperature": temperature,
        "teacher_weight": teacher_weight, "seed": seed,
        "autocast": None if autocast is None else str(autocast),
    }  # fmt: skip
    _check(model, tokenizer, parallel, settings)
    device = next(model.parameters()).device
    texts = [_Parallel(text, tokenizer, longest) for text in parallel]
    raw = _Plain(plain, tokenizer, longest) if plain else None
    sentences = _taught(parallel, texts, plain or {}, raw, pivot)
    targets = teacher(sentences).float() if teacher else None
    states = _WordStates(word_teacher(sentences)) if word_teacher else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        width = model.config.hidden_size
        heads = nn.ModuleDict()
        if targets is not None:
            heads["teacher"] = nn.Linear(width, targets.shape[1])
        if states is not None:
            heads["word_teacher"] = nn.Linear(width, states.width)
        heads.to(device)
        named = {**dict(model.named_parameters()), **dict(heads.named_parameters())}
        optimizer = torch.optim.AdamW(
            named.values(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay,
            fused=True,
        )  # fmt: skip
        run = _Run(Path(folder) if folder is not None else None, named, optimizer, settings)
        begin = run.resume()
        known = {language: _Lexicon(table) for language, table in (lexicons or {}).items()}
        sampler = _Sampler(texts, raw, known, pivot, tokens, seed)
        rise = schedules.linear(0.0, 1.0, end=max(1, round(warmup * steps)))
        fall = schedules.linear(
            1.0, 0.0, begin=min(round((1 - decay) * steps), steps - 1), end=steps
        )
        model.train()
        for step in _bar(begin, steps, progress):
            torch.manual_seed(seed * 1_000_003 + step)
            losses, count = _losses(
                model, heads, targets, states, tokenizer, sampler(step), temperature, autocast
            )
            loss = sum(
                (teacher_weight if name in heads else 1.0) * own for name, own in losses.items()
            )
            assert isinstance(loss, Tensor)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(rise(step + 1), fall(step))
            loss.backward()
            nn.utils.clip_grad_norm_(named.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.log(step, losses, count)
            if (step + 1) % save_every == 0 or step + 1 == steps:
                run.save(step + 1)
    model.eval()
    return run.lines


def _check(
    model: Any, tokenizer: Any, parallel: Sequence[ParallelText], settings: Mapping[str, Any]
) -> None:
    for name in ("steps", "tokens", "longest", "learning_rate", "temperature"):
        if not settings[name] > 0:
            raise ValueError(f"{name} should be greater than 0, got {settings[name]}")
    for name in ("warmup", "decay"):
        if not 0 <= settings[name] <= 1:
            raise ValueError(f"{name} should be from 0 to 1, got {settings[name]}")
    for name in ("weight_decay", "teacher_weight"):
        if settings[name] < 0:
            raise ValueError(f"{name} should be at least 0, got {settings[name]}")
    if not parallel:
        raise ValueError("parallel should have at least one text, got none")
    for text in parallel:
        if len(text.texts) < 2:
            raise ValueError(
                f"a parallel text should have at least two languages, got {', '.join(text.texts)}"
            )
        if not text.weight > 0:
            raise ValueError(f"weight should be greater than 0, got {text.weight}")
    ids = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
    if ids != [_BEGIN, _PAD, _END]:
        raise ValueError(
            f"the tokenizer should have <s>, <pad> and </s> at {[_BEGIN, _PAD, _END]}, got {ids}"
        )
    limit = longest_input(model, tokenizer)
    if 2 * settings["longest"] + 4 > limit:
        raise ValueError(
            f"longest should be at most {(limit - 4) // 2}, since the model and the tokenizer take "
            f"{limit} tokens, got {settings['longest']}"
        )


def _losses(
    model: Any,
    heads: nn.ModuleDict,
    targets: Tensor | None,
    word_states: _WordStates | None,
    tokenizer: Any,
    drawn: tuple[str, _Batch],
    temperature: float,
    autocast: torch.dtype | None,
) -> tuple[dict[str, Tensor], int]:
    """The losses of a step, and the number of its tokens."""
    kind, batch = drawn
    ids, attention = _padded(batch.rows)
    inputs, places = _masked(ids, attention, tokenizer, _MASKED[kind])
    device = next(model.parameters()).device
    count = int(attention.sum())
    inputs, attention, ids, places = (t.to(device) for t in (inputs, attention, ids, places))
    wanted = ids.flatten()[places]
    with torch.autocast(device.type, autocast) if autocast else nullcontext():
        states = model.base_model(input_ids=inputs, attention_mask=attention).last_hidden_state
        logits = model.lm_head(states.flatten(0, 1).index_select(0, places))
    losses = {f"{kind}_mlm": cross_entropy(logits.float(), wanted)}
    if kind == _RANKING:
        left, right = normalize(sentence_means(states, ids <= _END), dim=1).chunk(2)
        scores = left @ right.T / temperature
        order = torch.arange(len(scores), device=device)
        losses["ranking"] = (cross_entropy(scores, order) + cross_entropy(scores.T, order)) / 2
        if batch.links:
            losses["words"] = _word_ranking(states, ids, torch.tensor(batch.links).to(device))
    if targets is not None and kind != _TRANSLATION:
        aims = torch.tensor(batch.targets)
        known = aims >= 0
        if known.any():
            given = heads["teacher"](states[known.to(device), 0].float())
            # A sentence and its translation have the same target.
            rows, target = aims[known].unique(return_inverse=True)
            scores = normalize(given, dim=1) @ normalize(targets[rows], dim=1).to(device).T
            target = target.to(device)
            losses["teacher"] = 1 - scores.gather(1, target[:, None]).mean()
            losses["teacher_ranking"] = cross_entropy(scores / temperature, target)
    if word_states is not None:
        places, wanted = word_states.of(batch.known)
        if len(places):
            row, column = places.to(device).T
            given = heads["word_teacher"](states[row, column].float())
            losses["word_teacher"] = 1 - cosine_similarity(given, wanted.to(device).float()).mean()
    return losses, count


def _word_ranking(states: Tensor, ids: Tensor, links: Tensor) -> Tensor:
    """The loss of finding each word's translation, among those of the batch, by its state."""
    row, column, other_row, other_column = links.T
    left = normalize(states[row, column].float(), dim=1)
    right = normalize(states[other_row, other_column].float(), dim=1)
    scores = left @ right.T / _WORD_TEMPERATURE
    words, others = ids[row, column], ids[other_row, other_column]
    # The same word in another pair is not a wrong answer.
    same = (words[:, None] == words) | (others[:, None] == others)
    scores = scores.masked_fill(same.fill_diagonal_(False), -torch.inf)
    order = torch.arange(len(links), device=states.device)
    return (cross_entropy(scores, order) + cross_entropy(scores.T, order)) / 2


def _taught(
    parallel: Sequence[ParallelText],
    texts: Sequence[_Parallel],
    plain: Mapping[str, Sequence[str]],
    raw: _Plain | None,
    pivot: str,
) -> list[str]:
    """All sentences in the teachers' language; fills the ``targets`` of the texts with indices."""
    sentences: list[str] = []
    for given, own in zip(parallel, texts, strict=True):
        for name, text in given.texts.get(pivot, {}).items():
            own.targets[name] = len(sentences)
            sentences.append(text)
    if raw is not None:
        for row, text in enumerate(plain.get(pivot, ())):
            raw.targets[pivot, row] = len(sentences)
            sentences.append(text)
    return sentences


class _WordStates:
    """The states that the teacher of words gives all words, standardised and concatenated."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.starts = np.cumsum([0, *map(len, states)])
        self.states = torch.cat(list(states))
        self.width = self.states.shape[1]
        deviation, mean = torch.std_mean(self.states[:: max(1, len(self.states) >> 17)].float(), 0)
        for part in self.states.split(1 << 16):
            part.copy_((part.float() - mean) / deviation.clamp(min=1e-6))

    def of(self, known: Sequence[tuple[int, int, int, int]]) -> tuple[Tensor, Tensor]:
        """Rows and columns in the batch, shape ``(words, 2)``, and the states to follow there."""
        rows = np.array(known, np.int64).reshape(-1, 4)
        places = self.starts[rows[:, 2]] + rows[:, 3]
        there = places < self.starts[rows[:, 2] + 1]
        return torch.from_numpy(rows[there, :2]), self.states[torch.from_numpy(places[there])]


class _Run:
    """What a run keeps in its folder: its last state, and its losses."""

    def __init__(
        self,
        folder: Path | None,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        settings: Mapping[str, Any],
    ) -> None:
        self.folder, self.named, self.optimizer = folder, named, optimizer
        self.settings = json.dumps(settings)
        self.sums: dict[str, list[float]] = {}
        self.tokens = 0
        self.lines: list[dict[str, float]] = []

    def resume(self) -> int:
        """Restores the last state, if there is one; returns the number of steps it had taken."""
        if self.folder is None or not (self.folder / _STATE).exists():
            return 0
        from safetensors import SafetensorError, safe_open

        path = self.folder / _STATE
        try:
            opened = safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is not the state of a run: {error}") from error
        with opened as file:
            metadata = file.metadata() or {}
            if metadata.get("settings") != self.settings:
                raise ValueError(
                    f"{path} should be of a run with {self.settings}, got "
                    f"{metadata.get('settings')}"
                )
            names = set(file.keys())
            shapes = {
                name: file.get_slice(name).get_shape() for name in self.named if name in names
            }
            for name, own in self.named.items():
                if shapes.get(name) != list(own.shape):
                    raise ValueError(
                        f"{path} should have {name} of shape {tuple(own.shape)}, got "
                        f"{shapes.get(name)}"
                    )
            for name, own in self.named.items():
                own.data.copy_(file.get_tensor(name))
                # A head that has had no gradient yet has no moments.
                if f"{name}/step" in names:
                    state = {key: file.get_tensor(f"{name}/{key}") for key in _MOMENTS}
                    self.optimizer.state[own] = {
                        key: value.to(own.device) for key, value in state.items()
                    }
        self.tokens = int(metadata["tokens"])
        self.lines, self.sums = json.loads(metadata["log"]), json.loads(metadata["sums"])
        return int(metadata["step"])

    def log(self, step: int, losses: Mapping[str, Tensor], tokens: int) -> None:
        self.tokens += tokens
        for name, loss in losses.items():
            value = loss.item()
            if not math.isfinite(value):
                raise RuntimeError(f"the loss {name} is {value} in step {step}")
            self.sums.setdefault(name, []).append(value)
        if (step + 1) % 100 == 0:
            means = {name: round(sum(own) / len(own), 4) for name, own in self.sums.items()}
            self.lines.append({"step": step + 1, "tokens": self.tokens, **means})
            self.sums = {}

    def save(self, step: int) -> None:
        if self.folder is None:
            return
        from safetensors.torch import save_file

        tensors = {}
        for name, own in self.named.items():
            tensors[name] = own.detach().contiguous()
            for key in _MOMENTS if own in self.optimizer.state else ():
                tensors[f"{name}/{key}"] = self.optimizer.state[own][key].contiguous()
        metadata = {
            "step": str(step),
            "tokens": str(self.tokens),
            "log": json.dumps(self.lines),
            "sums": json.dumps(self.sums),
            "settings": self.settings,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{_STATE}.partial"
        save_file(tensors, partial, metadata)
        flush(partial)
        os.replace(partial, self.folder / _STATE)
        lines = "".join(f"{json.dumps(line)}\n" for line in self.lines)
        (self.folder / "log.jsonl").write_text(lines)


def _rounded(length: int) -> int:
    """Rounds up, for fewer different shapes: some CPUs compile a matrix product for each."""
    return -(-length // 8) * 8


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = _rounded(max(map(len, rows)))
    ids = torch.tensor([[*row, *[_PAD] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long()


def _masked(ids: Tensor, attention: Tensor, tokenizer: Any, share: float) -> tuple[Tensor, Tensor]:
    """The inputs, and the indices into the flattened batch of the tokens to predict.

    Of those, 80% are masked, 10% replaced and 10% kept (Devlin et al. 2019).
    """
    # A multiple of 64, so that the products that follow have few different shapes too.
    count = max(1, int(share * attention.sum()) // 64 * 64)
    places = (torch.rand(ids.shape) * (ids > _END)).flatten().topk(count).indices
    chosen = torch.zeros(ids.numel(), dtype=torch.bool)
    chosen[places] = True
    chosen = chosen.view_as(ids)
    fate = torch.rand(ids.shape)
    other = torch.randint(_FIRST, len(tokenizer) - 1, ids.shape)
    inputs = torch.where(chosen & (fate < 0.8), tokenizer.mask_token_id, ids)
    return torch.where(chosen & (fate >= 0.9), other, inputs), places


def _bar(begin: int, steps: int, visible: bool) -> Iterable[int]:
    if not visible:
        return range(begin, steps)
    from tqdm import tqdm

    bar: Iterable[int] = tqdm(range(begin, steps), desc="pretraining", initial=begin, total=steps)
    return bar
