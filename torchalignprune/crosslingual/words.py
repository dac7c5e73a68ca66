"""Labels of words on the subwords of a tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["IGNORED", "BarePieces", "EncodedWords", "check_bare_pieces", "encode_words"]

IGNORED = -100  # the ignore_index of torch's cross entropy
# A space before a word, as SentencePiece and byte-level BPE write it.
_BLANKS = ["▁", "Ġ"]

BarePieces = Literal["skip", "label"]
"""What becomes of a bare ``▁`` at the beginning of a word: see :func:`encode_words`."""


@dataclass(frozen=True)
class EncodedWords:
    """A sentence of words, encoded for a model.

    Attributes:
        inputs: ``input_ids`` and whatever else the tokenizer makes for the model, as lists.
        labels: a label id for each subword: on a word's first subword (with a character, unless
            bare pieces are labelled) that of the word, elsewhere :data:`IGNORED`; all
            :data:`IGNORED` without labels.
        first: for each word, the index of that subword, -1 if it has none.
        cut_off: how many words at the end have none because the sentence was too long.
        unmapped: how many have none because the tokenizer gives them no subword.
    """

    inputs: dict[str, list[int]]
    labels: list[int]
    first: list[int]
    cut_off: int
    unmapped: int


def encode_words(
    tokenizer: Any,
    sentences: Sequence[Sequence[str]],
    labels: Sequence[Sequence[int]] | None = None,
    *,
    max_length: int | None = None,
    bare_pieces: BarePieces = "skip",
) -> list[EncodedWords]:
    """Splits words into subwords, and puts each word's label on its first one.

    The words are those of the data: a space within one (as in Vietnamese) does not end it, and
    right-to-left text needs nothing special, since it is stored in reading order. A bare ``▁`` is
    skipped, unless the word has nothing else: XLM-R's tokenizer puts one before words in scripts
    without spaces, and before digits and punctuation in all scripts. XTREME (Hu et al. 2020) and
    Transformers' ``run_ner.py`` label it like any first subword; a model fine-tuned on English then
    takes Chinese words, nearly all of which begin with it, for punctuation. **A model that was
    fine-tuned in that way** has never learned to label what comes after a bare ``▁``: encode for it
    with ``bare_pieces="label"``.

    A sentence with more subwords than ``max_length`` is cut after the last word that fits in whole,
    whichever side the tokenizer truncates on.

    Args:
        tokenizer: a fast tokenizer of Transformers; one with byte-level BPE needs
            ``add_prefix_space=True``: without it, words lack their spaces, and a warning says so.
        sentences: the words of each sentence.
        labels: the label ids of the words of each sentence.
        max_length: the most subwords of a sentence, special tokens included. Default: no limit.
        bare_pieces: ``"skip"``: a word's label is on its first subword with a character;
            ``"label"``: on its first subword, even if that is a bare ``▁``.

    Returns:
        One for each sentence.

    Raises:
        TypeError: the tokenizer is not a fast one, or a sentence is one string.
        ValueError: there are more or fewer labels than words; ``max_length`` is too small for the
            special tokens; an unknown ``bare_pieces``.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> subwords = {"[UNK]": 0, "un": 1, "##it": 2, "##s": 3, "bend": 4}
        >>> plain = Tokenizer(models.WordPiece(subwords, unk_token="[UNK]"))
        >>> plain.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
        >>> (sentence,) = encode_words(tokenizer, [["units", "bend"]], [[7, 15]])
        >>> sentence.inputs["input_ids"], sentence.labels, sentence.first
        ([1, 2, 3, 4], [7, -100, -100, 15], [0, 3])
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            "tokenizer should be a fast one (PreTrainedTokenizerFast), which knows the word of "
            f"each subword, got {type(tokenizer).__name__}"
        )
    check_bare_pieces(bare_pieces)
    if labels is not None and len(labels) != len(sentences):
        raise ValueError(f"labels should be for {len(sentences)} sentences, got {len(labels)}")
    texts = []
    for i, words in enumerate(sentences):
        if isinstance(words, str):
            raise TypeError(f"sentence {i} should be a list of words, got {words!r}")
        if labels is not None and len(labels[i]) != len(words):
            raise ValueError(f"sentence {i} has {len(words)} words and {len(labels[i])} labels")
        texts.append(list(words))
    if not texts:
        return []
    if _drops_spaces(tokenizer):
        warnings.warn(
            "the tokenizer puts no space before words, so that it splits them as if they were "
            "joined: make it with add_prefix_space=True (in tokenizer_config.json), unless the "
            "model was fine-tuned in this way",
            stacklevel=2,
        )
    encoded = _tokenize(tokenizer, texts)
    skipped: set[Any] = set()
    if bare_pieces == "skip":
        skipped = {*tokenizer.convert_tokens_to_ids(_BLANKS)} - {tokenizer.unk_token_id, None}
    made = []
    for i, words in enumerate(texts):
        inputs, word_ids = encoded[i]
        present = {word for word in word_ids if word is not None}
        kept = len(words)
        if max_length is not None and len(word_ids) > max_length:
            kept = _fitting(word_ids, max_length)
            ((inputs, word_ids),) = _tokenize(tokenizer, [words[:kept]])
            if len(word_ids) > max_length:
                raise ValueError(
                    f"max_length should be at least {len(word_ids)}, the special tokens of a "
                    f"sentence, got {max_length}"
                )
        first = [-1] * len(words)
        on_subwords = [IGNORED] * len(word_ids)
        ids = inputs["input_ids"]
        for place, word in enumerate(word_ids):
            if word is None:
                continue
            if first[word] < 0 or (ids[first[word]] in skipped and ids[place] not in skipped):
                first[word] = place
        if labels is not None:
            for place, label in zip(first, labels[i], strict=True):
                if place >= 0:
                    on_subwords[place] = label
        cut_off = sum(word in present for word in range(kept, len(words)))
        unmapped = len(words) - len(present)
        made.append(EncodedWords(inputs, on_subwords, first, cut_off, unmapped))
    return made


def check_bare_pieces(bare_pieces: str) -> None:
    """Checks that ``bare_pieces`` is one of :data:`BarePieces`.

    Raises:
        ValueError: it is neither ``"skip"`` nor ``"label"``.
    """
    if bare_pieces not in ("skip", "label"):
        raise ValueError(f"bare_pieces should be 'skip' or 'label', got {bare_pieces!r}")


def _drops_spaces(tokenizer: Any) -> bool:
    """Whether a tokenizer is byte-level BPE, where spaces belong to words, and adds none itself."""
    own = tokenizer.backend_tokenizer.pre_tokenizer
    try:
        state = {} if own is None else json.loads(own.__getstate__())
    except Exception:  # all that tokenizers raises for a pre-tokenizer written in Python
        return False
    return any(
        step["type"] == "ByteLevel" and not step["add_prefix_space"]
        for step in state.get("pretokenizers", [state])
        if step
    )


def _tokenize(
    tokenizer: Any, texts: list[list[str]]
) -> list[tuple[dict[str, list[int]], list[int | None]]]:
    # A tokenizer takes an empty list of words for a text that is not split.
    filled = [words or [""] for words in texts]
    encoded = tokenizer(filled, is_split_into_words=True, truncation=False, verbose=False)
    return [
        ({key: list(values[i]) for key, values in encoded.items()}, encoded.word_ids(i))
        for i in range(len(texts))
    ]


def _fitting(word_ids: list[int | None], max_length: int) -> int:
    """How many words fit in whole beside the special tokens, which are always there."""
    left = max_length - word_ids.count(None)
    for word in word_ids:
        if word is not None:
            left -= 1
            if left < 0:
                return word
    # There are no words: not even the special tokens fit.
    return 0
