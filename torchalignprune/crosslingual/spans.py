"""Entities as spans of words, and the counts of their F1."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["span_counts", "spans"]


def spans(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a sentence: their type, first word and the word after the last.

    Strict IOB2: an entity begins at a ``B-``, and goes on over ``I-`` of the same type; an ``I-``
    elsewhere is no entity and no part of one. That is ``seqeval`` with ``mode="strict"`` and
    ``scheme=IOB2``; its default, and ``conlleval``, let any ``I-`` begin an entity, which scores
    models higher that forget the ``B-``.

    Example:
        >>> sorted(spans(["B-PER", "I-PER", "O", "B-LOC", "I-PER", "I-ORG"]))
        [('LOC', 3, 4), ('PER', 0, 2)]
    """
    found = set()
    start = None
    for place, label in enumerate([*labels, "O"]):
        goes_on = start is not None and label == f"I-{labels[start][2:]}"
        if start is not None and not goes_on:
            found.add((labels[start][2:], start, place))
            start = None
        if label.startswith("B-"):
            start = place
    return found


def span_counts(gold: Sequence[str], predicted: Sequence[str]) -> tuple[int, int]:
    """Twice the number of entities that were found, and the number of both sides' entities.

    The ratio of their sums over sentences is the micro-averaged F1.

    Raises:
        ValueError: the two differ in length.

    Example:
        >>> span_counts(["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "I-PER", "O", "O"])
        (2, 3)
    """
    if len(gold) != len(predicted):
        raise ValueError(f"predicted should have {len(gold)} labels, got {len(predicted)}")
    there, claimed = spans(gold), spans(predicted)
    return 2 * len(there & claimed), len(there) + len(claimed)
