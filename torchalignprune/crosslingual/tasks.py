"""The tasks: their labels, and where and how the hub holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torchalignprune.crosslingual.languages import LANGUAGES

__all__ = ["TASKS", "Task", "get_task"]

UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN",
    "PUNCT", "SCONJ", "SYM", "VERB", "X",
)  # fmt: skip
# The order in which the hub's copies of Universal Dependencies number the tags. "_" tags a
# contraction such as French "du", before its words "de" and "le".
_HUB_UPOS = (
    "NOUN", "PUNCT", "ADP", "NUM", "SYM", "SCONJ", "ADJ", "PART", "DET", "CCONJ", "PROPN", "PRON",
    "X", "_", "ADV", "INTJ", "VERB", "AUX",
)  # fmt: skip
_TOPICS = (
    "entertainment", "geography", "health", "politics", "science/technology", "sports", "travel",
)  # fmt: skip
_ENTITIES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")


@dataclass(frozen=True)
class Task:
    """What to predict, and where the data is.

    :func:`load_task` gives all tasks the same columns, whatever the data calls them.

    Attributes:
        name: its name on the command line.
        kind: ``"words"``: a label for each word; ``"text"``: one for each sentence; ``"pair"``: one
            for each pair of sentences.
        labels: the labels, in the order of their ids.
        metric: ``"accuracy"`` over words, sentences or pairs; or ``"span_f1"``, micro-averaged over
            entities.
        parallel: whether row ``i`` of a split is the same sentence in every language, so that
            languages can be compared on the same sentences.
        repository: the data set on the hub, if it is there.
        configs: for each language, the name of its configuration there.
        columns: the names that ``tokens``, ``text``, ``text_pair``, ``label``, ``labels`` and
            ``id`` may have in the data.
        folder: its subfolder in a folder with the data of several tasks.
        stored_labels: the labels that numbers stand for, in order, if the data does not name them.
        ignored: a label whose words are left out.
    """

    name: str
    kind: Literal["words", "text", "pair"]
    labels: tuple[str, ...]
    metric: Literal["accuracy", "span_f1"] = "accuracy"
    parallel: bool = False
    repository: str | None = None
    configs: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folder: str | None = None
    stored_labels: tuple[str, ...] = ()
    ignored: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("words", "text", "pair"):
            raise ValueError(f"kind should be words, text or pair, got {self.kind!r}")
        if self.metric not in ("accuracy", "span_f1"):
            raise ValueError(f"metric should be accuracy or span_f1, got {self.metric!r}")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise ValueError(f"labels should be at least two different ones, got {self.labels}")
        if self.metric == "span_f1":
            if self.kind != "words":
                raise ValueError(f"span_f1 goes with kind='words', got {self.kind!r}")
            odd = [label for label in self.labels if label != "O" and label[:2] not in ("B-", "I-")]
            if odd or "O" not in self.labels:
                raise ValueError(f"labels of spans should be O, B-... and I-..., got {self.labels}")


def _configs(languages: str) -> dict[str, str]:
    return {language: language for language in languages.split()}


_POS_COLUMNS = {"tokens": ("tokens",), "labels": ("upos", "labels"), "id": ("sent_id", "idx", "id")}

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "pos",
            "words",
            UPOS,
            repository="universal-dependencies/universal_dependencies",
            configs={
                code: language.treebank
                for code, language in LANGUAGES.items()
                if language.treebank is not None
            },
            columns=_POS_COLUMNS,
            folder="udpos",
            stored_labels=_HUB_UPOS,
            ignored="_",
        ),
        Task(
            "pud",
            "words",
            UPOS,
            parallel=True,
            repository="universal-dependencies/universal_dependencies",
            configs={
                code: f"{code.partition('-')[0]}_pud"
                for code, language in LANGUAGES.items()
                if language.pud
            },
            columns=_POS_COLUMNS,
            folder="pud",
            stored_labels=_HUB_UPOS,
            ignored="_",
        ),
        Task(
            "topics",
            "text",
            _TOPICS,
            parallel=True,
            repository="Davlan/sib200",
            configs={code: language.flores for code, language in LANGUAGES.items()},
            columns={"text": ("text",), "label": ("category", "label"), "id": ("index_id", "id")},
            folder="sib200",
        ),
        Task(
            "xnli",
            "pair",
            ("entailment", "neutral", "contradiction"),
            parallel=True,
            repository="facebook/xnli",
            configs=_configs("ar bg de el en es fr hi ru sw th tr ur vi zh"),
            columns={
                "text": ("premise", "text"),
                "text_pair": ("hypothesis", "text_pair"),
                "label": ("label",),
                "id": ("id",),
            },
            folder="xnli",
        ),
        Task(
            "pawsx",
            "pair",
            ("0", "1"),
            parallel=True,
            repository="google-research-datasets/paws-x",
            configs=_configs("de en es fr ja ko zh"),
            columns={
                "text": ("sentence1", "text"),
                "text_pair": ("sentence2", "text_pair"),
                "label": ("label",),
                "id": ("id",),
            },
            folder="paws-x",
        ),
        Task(
            "ner",
            "words",
            _ENTITIES,
            metric="span_f1",
            repository="unimelb-nlp/wikiann",
            configs=_configs(
                "af ar bg bn cs da de el en es et eu fa fi fr he hi hu id is it ja ka kk ko lt ml "
                "mr my nl pl pt ro ru sv sw ta te th tr uk ur vi zh"
            ),
            columns={"tokens": ("tokens",), "labels": ("ner_tags", "labels"), "id": ("id",)},
            folder="wikiann",
        ),
    )
}


def get_task(task: str | Task) -> Task:
    """The task of that name; a :class:`Task` is returned as it is.

    Raises:
        ValueError: there is no task of that name.

    Example:
        >>> get_task("topics").labels[:3]
        ('entertainment', 'geography', 'health')
    """
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"task should be one of {', '.join(TASKS)}, got {task!r}")
    return TASKS[task]
