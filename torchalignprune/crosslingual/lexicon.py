"""Word vectors for a multilingual vocabulary, taken from an encoder of one language.

A piece of the encoder's own language has the vector of its spelling. A piece of another language
has the mean of the vectors of its translations, weighted by their probabilities (Tran 2020, "From
English to foreign languages: transferring pre-trained language models", section 2). The
probabilities are those of IBM Model 1 (Brown et al. 1993) on parallel text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import scipy.sparse

__all__ = ["piece_vectors", "transferred_vectors", "translation_table"]

Array = np.ndarray[Any, np.dtype[Any]]

# Less probable translations are left out.
_LEAST = 1e-3
# The least probability with which known pieces must translate a piece for it to have a vector.
_LEAST_KNOWN = 0.05


def translation_table(
    source: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
    vocabulary: int,
    *,
    iterations: int = 4,
) -> scipy.sparse.csr_matrix:
    """The probability of each target word given a source word, by IBM Model 1.

    The model takes each word of a target sentence for the translation of one word of the source
    sentence, or of none. A word counts once per sentence. Expectation maximization starts from
    Dice's coefficients.

    Args:
        source: the ids of the words of each sentence.
        target: the ids of the words of its translation.
        vocabulary: the number of ids.
        iterations: of the expectation maximization.

    Returns:
        Shape ``(vocabulary, vocabulary)``: rows are source words; probabilities below 0.001 are 0.

    Raises:
        ValueError: source and target differ in length.
        ImportError: scipy is not installed (``pip install "torchalignprune[matching]"``).

    Example:
        >>> table = translation_table([[0, 1], [0, 2]], [[3, 4], [3, 5]], 6)
        >>> table.toarray().argmax(1)[:3]
        array([3, 4, 5])
    """
    try:
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise ImportError(
            'word alignment needs scipy: pip install "torchalignprune[matching]"', name="scipy"
        ) from error

    if len(source) != len(target):
        raise ValueError(
            f"target should have as many sentences as source, {len(source)}, got {len(target)}"
        )
    # Words that translate none are linked to an additional one, which all source sentences have.
    none = vocabulary
    words = [np.append(np.unique(np.asarray(ids, np.int64)), none) for ids in source]
    others = [np.unique(np.asarray(ids, np.int64)) for ids in target]
    if not words:
        return csr_matrix((vocabulary, vocabulary))
    pairs, places, at = [], [], 0
    for own, other in zip(words, others, strict=True):
        pairs.append((own[:, None] * vocabulary + other).ravel())
        places.append(np.tile(np.arange(at, at + len(other), dtype=np.int32), len(own)))
        at += len(other)
    # For each possible link: its pair of words, and the index of its target word in the whole text.
    kinds, pair = np.unique(np.concatenate(pairs), return_inverse=True)
    place = np.concatenate(places)
    of_source, of_target = kinds // vocabulary, kinds % vocabulary
    together = np.bincount(pair, minlength=len(kinds)).astype(np.float64)
    own_counts = np.bincount(np.concatenate(words), minlength=vocabulary + 1)
    other_counts = np.bincount(np.concatenate(others), minlength=vocabulary)
    weight = 2 * together / (own_counts[of_source] + other_counts[of_target])
    for _ in range(iterations):
        weight = _normalized(weight, of_source, vocabulary + 1)
        linked = _normalized(weight[pair], place, at)
        weight = np.bincount(pair, linked, minlength=len(kinds))
    weight = _normalized(weight, of_source, vocabulary + 1)
    kept = (weight > _LEAST) & (of_source != none)
    return csr_matrix(
        (weight[kept], (of_source[kept], of_target[kept])), shape=(vocabulary, vocabulary)
    )


def piece_vectors(tokenizer: Any, encoder_tokenizer: Any, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """For each piece of a vocabulary, the vector of its spelling in a WordPiece encoder.

    A piece that begins a word (``▁hospital``) is spelled as a word, any other (``ing``) as a
    continuation (``##ing``) if the encoder has that. If the spelling takes several of the encoder's
    pieces, the vector is their mean.

    Args:
        tokenizer: the tokenizer of the vocabulary.
        encoder_tokenizer: the encoder's tokenizer, like BERT's.
        vectors: the encoder's word vectors, shape ``(its vocabulary, width)``.

    Returns:
        The vectors, shape ``(vocabulary, width)``, and which of them are known, bool, shape
        ``(vocabulary,)``.
    """
    known = torch.zeros(len(tokenizer), dtype=torch.bool)
    found = torch.zeros(len(tokenizer), vectors.shape[1])
    ids = encoder_tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    lower = getattr(encoder_tokenizer, "do_lower_case", True)
    for piece, place in tokenizer.get_vocab().items():
        word = piece.removeprefix("▁")
        word = word.lower() if lower else word
        if place in special or not word:
            continue
        if not piece.startswith("▁") and f"##{word}" in ids:
            spelled = [ids[f"##{word}"]]
        else:
            spelled = encoder_tokenizer(word, add_special_tokens=False)["input_ids"]
        if spelled and encoder_tokenizer.unk_token_id not in spelled:
            known[place] = True
            found[place] = vectors[spelled].float().mean(0)
    return found, known


def transferred_vectors(
    tokenizer: Any,
    parallel: Sequence[Mapping[str, Mapping[str, str]]],
    vectors: Tensor,
    known: Tensor,
    *,
    pivot: str = "en",
    most: int = 12_000,
) -> tuple[Tensor, Tensor]:
    """Vectors for the pieces of all languages, from those of one, the pivot.

    A piece of several languages gets the mean over them, weighted by how often it occurs in each.

    Args:
        tokenizer: of all the languages.
        parallel: parallel texts: for each language, its sentences by id.
        vectors: of the pivot's pieces, shape ``(vocabulary, width)``.
        known: which pieces have such a vector, bool, shape ``(vocabulary,)``.
        pivot: the language of the vectors.
        most: the most sentences to align of each text and language, sampled with a fixed seed.

    Returns:
        The vectors, centered, shape ``(vocabulary, width)``, zeros for a piece that has none; and
        how often each piece was seen, float64, shape ``(vocabulary,)``.

    Raises:
        ValueError: a text lacks the pivot.
        ImportError: scipy is not installed (``pip install "torchalignprune[matching]"``).
    """
    for text in parallel:
        if pivot not in text:
            raise ValueError(f"a text should have the pivot {pivot}, got {', '.join(text)}")
    size, own = len(tokenizer), known.numpy()
    given = vectors.float().numpy()
    given = np.where(own[:, None], given - given[own].mean(0), 0.0)
    counts = np.zeros(size)
    for text in parallel:
        counts += _counts(_encoded(tokenizer, list(text[pivot].values())), size)
    total, weight = given * (counts * own)[:, None], counts * own
    for language in sorted({code for text in parallel for code in text} - {pivot}):
        source: list[list[int]] = []
        target: list[list[int]] = []
        for text in parallel:
            names = sorted(text.get(language, {}).keys() & text[pivot].keys())
            np.random.default_rng(0).shuffle(names)
            names = names[:most]
            source += _encoded(tokenizer, [text[language][name] for name in names])
            target += _encoded(tokenizer, [text[pivot][name] for name in names])
        table = translation_table(source, target, size)
        covered = table @ own.astype(np.float64)
        here = _counts(source, size)
        counts += here
        here *= covered > _LEAST_KNOWN
        total += (here / np.maximum(covered, _LEAST_KNOWN))[:, None] * (table @ given)
        weight += here
    aligned = weight > 0
    found = np.where(aligned[:, None], total / np.maximum(weight, 1)[:, None], given)
    there = aligned | own
    found[there] -= found[there].mean(0)
    return torch.from_numpy(found).float(), torch.from_numpy(counts)


def _normalized(weight: Array, group: Array, groups: int) -> Array:
    """The weights, divided by their sum in each group."""
    sums = np.bincount(group, weight, minlength=groups)
    return np.asarray(weight / np.maximum(sums, 1e-300)[group])


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return found


def _counts(sentences: Sequence[Sequence[int]], size: int) -> Array:
    ids = np.concatenate([np.zeros(0, np.int64), *(np.asarray(s, np.int64) for s in sentences)])
    return np.bincount(ids, minlength=size).astype(np.float64)
