"""A synthetic multilingual corpus: made-up languages at known distances, without any download.

Every sentence is first a *meaning*: a topic and a small tree of concepts, drawn from one grammar
for all languages. Each language then says it in its own words and its own word order, so that row
``i`` of a split is the same sentence in every language.

The languages lie around a first one, the source, at a distance from 0 to 1:

- **words**: for a share ``distance`` of the concepts a language has a word of its own, in its own
  script; for the others it has the source's word;
- **word order**: a share ``distance`` of the five choices below differs from the source.

Both are nested: what is foreign at a small distance is foreign at every larger one. Names, numbers
and punctuation are the same everywhere, as they mostly are in real text: together with the shared
words they are a model's only links between the languages. Some verbs are spelled like a noun of
their language, so that a tagger needs the context. Sentences also use words of other topics, so
that one word does not give the topic away.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchalignprune.crosslingual.columns import import_datasets
from torchalignprune.crosslingual.tasks import Task

if TYPE_CHECKING:
    import datasets

__all__ = [
    "DEFAULT_LANGUAGES",
    "GENERATED_POS",
    "GENERATED_TOPICS",
    "GeneratedCorpus",
    "GeneratedLanguage",
    "LanguageSpec",
    "generate_corpus",
]

_TAGS = ("ADJ", "ADP", "ADV", "CCONJ", "DET", "NOUN", "NUM", "PRON", "PROPN", "PUNCT", "VERB")
_TOPICS = ("farming", "music", "seafaring", "trade", "weather")

GENERATED_POS = Task("generated_pos", "words", _TAGS, parallel=True)
GENERATED_TOPICS = Task("generated_topics", "text", _TOPICS, parallel=True)

# The number of concepts of each tag: in each topic, and of no topic.
_IN_TOPIC = {"NOUN": 24, "VERB": 12, "ADJ": 8}
_GENERAL = {
    **{"NOUN": 40, "VERB": 20, "ADJ": 12, "ADV": 12},
    **{"ADP": 8, "DET": 6, "PRON": 6, "CCONJ": 2},
}
_NAMES = 40
# Every third verb is spelled like a noun.
_HOMOGRAPHS = 3
# The shares of content words of the sentence's topic and of no topic; the rest are of any topic.
_OF_TOPIC, _OF_NONE = 0.5, 0.35

_LETTERS = {
    "Latn": ("bdfgklmnprstvz", "aeiou"),
    "Cyrl": ("бдфгклмнпрствз", "аеиоу"),
    "Grek": ("βδφγκλμνπρστχζ", "αειου"),
    "Geor": ("ბდფგკლმნპრსტვზ", "აეიოუ"),
}
# The first is the source's choice. An adjective or determiner comes before or after its noun, an
# adposition its phrase, an adverb its verb.
_ORDERS = {
    "clause": ("SVO", "SOV", "VSO"),
    "adjective": ("before", "after"),
    "determiner": ("before", "after"),
    "adposition": ("before", "after"),
    "adverb": ("after", "before"),
}

# A concept: its tag, its topic (-1 for none), its number among those.
_Concept = tuple[str, int, int]
_Tree = tuple[Any, ...]
_Said = list[tuple[str, str]]  # words and their tags


@dataclass(frozen=True)
class LanguageSpec:
    """The specification of a language to generate.

    Attributes:
        distance: from the source, from 0 to 1.
        script: of its own words: ``"Latn"``, ``"Cyrl"``, ``"Grek"`` or ``"Geor"``.
    """

    distance: float
    script: str = "Latn"


@dataclass(frozen=True)
class GeneratedLanguage:
    """A generated language.

    Attributes:
        code: its name.
        spec: its specification.
        words: its word for each concept.
        own: the concepts that it has a word of its own for, without the verbs that are spelled
            like a noun: they follow the noun.
        order: its choice for each question of word order: ``clause`` is ``SVO``, ``SOV`` or
            ``VSO``; ``adjective``, ``determiner``, ``adposition`` and ``adverb`` are ``before`` or
            ``after`` what they belong to.
    """

    code: str
    spec: LanguageSpec
    words: Mapping[tuple[str, int, int], str]
    own: frozenset[tuple[str, int, int]]
    order: Mapping[str, str]


@dataclass(frozen=True)
class GeneratedCorpus:
    """The same sentences in every language.

    Attributes:
        languages: by their codes; the first is the source.
        pos: for each language, the data of :data:`GENERATED_POS` as
            :func:`torchalignprune.crosslingual.load_task` would return it: ``train``,
            ``validation`` and ``test``.
        topics: the same sentences as data of :data:`GENERATED_TOPICS`.
        raw: for each language, further sentences for pretraining, which are parallel too.
    """

    languages: dict[str, GeneratedLanguage]
    pos: dict[str, datasets.DatasetDict]
    topics: dict[str, datasets.DatasetDict]
    raw: dict[str, list[str]]


DEFAULT_LANGUAGES: Mapping[str, LanguageSpec] = {
    "source": LanguageSpec(0.0),
    "near": LanguageSpec(0.2),
    "middle": LanguageSpec(0.4),
    "far": LanguageSpec(0.6),
    "remote": LanguageSpec(0.8, "Cyrl"),
}


def generate_corpus(
    languages: Mapping[str, LanguageSpec] = DEFAULT_LANGUAGES,
    *,
    train: int = 2000,
    validation: int = 200,
    test: int = 500,
    raw: int = 5000,
    seed: int = 0,
) -> GeneratedCorpus:
    """Generates languages, and the same sentences in all of them.

    No meaning occurs twice in the corpus. A language depends only on the seed, the source's code,
    its own code and its spec, whatever other languages there are; the meanings depend only on the
    seed and the sizes. The corpus is the same on every platform and in every version of Python,
    since ``random.Random(...).random()`` is the only source of randomness.

    Args:
        languages: the specifications, by code. The first is the source, at distance 0.
        train: number of labelled sentences.
        validation: likewise.
        test: likewise.
        raw: number of sentences without labels.
        seed: of everything.

    Returns:
        The corpus.

    Raises:
        ValueError: there is no language; the first one is not at distance 0; a distance is not
            from 0 to 1; a script is unknown; a size is negative.
        ImportError: datasets is not installed (``pip install "torchalignprune[crosslingual]"``).

    Example:
        >>> corpus = generate_corpus(train=2, validation=1, test=1, raw=1)
        >>> row = corpus.topics["source"]["train"][0]
        >>> row["text"], GENERATED_TOPICS.labels[row["label"]]
        ('biv berifob fopibe feluzur fi biv perebis.', 'farming')
    """
    sizes = {"train": train, "validation": validation, "test": test, "raw": raw}
    _check(languages, sizes)
    concepts = list(_concepts())
    rank = _shuffled(concepts, random.Random(f"{seed}/own words"))
    questions = _shuffled(list(_ORDERS), random.Random(f"{seed}/order"))
    made: dict[str, GeneratedLanguage] = {}
    source: Mapping[_Concept, str] = {}
    names = _words_of_names(seed)
    for code, spec in languages.items():
        own = frozenset(rank[: round(spec.distance * len(rank))] if source else rank)
        letters = random.Random(f"{seed}/{code}")
        words = dict(names) | dict(source)
        words |= _own_words(own, spec.script, letters, {*source.values(), *names.values()})
        words |= _verbs_like_nouns(words)
        changed = questions[: round(spec.distance * len(questions))]
        other = {
            question: choices[1 + _below(letters, len(choices) - 1)]
            for question, choices in _ORDERS.items()
        }
        order = {
            question: other[question] if question in changed else choices[0]
            for question, choices in _ORDERS.items()
        }
        made[code] = GeneratedLanguage(code, spec, words, own if source else frozenset(), order)
        source = source or words
    meanings = _meanings(random.Random(f"{seed}/meanings"))
    parts = {part: [next(meanings) for _ in range(size)] for part, size in sizes.items()}
    pos, topics, further = {}, {}, {}
    for code, language in made.items():
        said = {part: [_say(tree, language) for _, tree in drawn] for part, drawn in parts.items()}
        further[code] = [_text(sentence) for sentence in said.pop("raw")]
        pos[code] = _pos_data(said)
        topics[code] = _topic_data(
            said, {part: [topic for topic, _ in drawn] for part, drawn in parts.items()}
        )
    return GeneratedCorpus(made, pos, topics, further)


def _check(languages: Mapping[str, LanguageSpec], sizes: Mapping[str, int]) -> None:
    if not languages:
        raise ValueError("languages should have at least one language, got none")
    for code, spec in languages.items():
        if not 0 <= spec.distance <= 1:
            raise ValueError(f"the distance of {code} should be from 0 to 1, got {spec.distance}")
        if spec.script not in _LETTERS:
            raise ValueError(
                f"the script of {code} should be one of {', '.join(_LETTERS)}, got {spec.script!r}"
            )
    first = next(iter(languages))
    if languages[first].distance != 0:
        raise ValueError(
            f"the first language should be at distance 0, got {first} at "
            f"{languages[first].distance}"
        )
    for part, size in sizes.items():
        if size < 0:
            raise ValueError(f"{part} should be at least 0, got {size}")


def _concepts() -> Iterator[_Concept]:
    """All concepts that languages have a spelling of their own for."""
    for topic, counts in [(-1, _GENERAL), *((topic, _IN_TOPIC) for topic in range(len(_TOPICS)))]:
        for tag, count in counts.items():
            yield from ((tag, topic, n) for n in range(count) if not _like_noun(tag, n))


def _like_noun(tag: str, number: int) -> bool:
    return tag == "VERB" and number % _HOMOGRAPHS == 0


def _below(generator: random.Random, limit: int) -> int:
    return int(generator.random() * limit)


def _often(generator: random.Random, limit: int) -> int:
    """A number below ``limit``; small ones are more frequent, as some words are in text."""
    return int(generator.random() ** 2 * limit)


def _shuffled(items: list[Any], generator: random.Random) -> list[Any]:
    return [item for _, item in sorted((generator.random(), item) for item in items)]


def _word(script: str, syllables: int, generator: random.Random) -> str:
    consonants, vowels = _LETTERS[script]
    return "".join(
        letters[_below(generator, len(letters))]
        for _ in range(syllables)
        for letters in (consonants, vowels)
    ) + (consonants[_below(generator, len(consonants))] if generator.random() < 0.4 else "")


def _new_word(script: str, syllables: int, generator: random.Random, taken: set[str]) -> str:
    while True:
        word = _word(script, syllables, generator)
        if word not in taken:
            taken.add(word)
            return word


def _words_of_names(seed: int) -> dict[_Concept, str]:
    generator, taken = random.Random(f"{seed}/names"), set[str]()
    return {
        ("PROPN", -1, number): _new_word("Latn", 3, generator, taken).capitalize()
        for number in range(_NAMES)
    }


def _own_words(
    own: frozenset[_Concept], script: str, generator: random.Random, taken: set[str]
) -> dict[_Concept, str]:
    """New words for the concepts ``own``, none of them in ``taken``."""
    words = {}
    for concept in _concepts():
        # Drawn for all concepts, so that a language keeps its words when its distance changes.
        content = concept[0] in ("NOUN", "VERB", "ADJ", "ADV")
        syllables = 2 + (generator.random() < 0.5) if content else 1 + (generator.random() < 0.3)
        word = _new_word(script, syllables, generator, taken)
        if concept in own:
            words[concept] = word
    return words


def _verbs_like_nouns(words: Mapping[_Concept, str]) -> dict[_Concept, str]:
    nouns = [concept for concept in words if concept[0] == "NOUN"]
    return {
        ("VERB", topic, number): words["NOUN", topic, number]
        for _, topic, number in nouns
        if _like_noun("VERB", number) and number < (_GENERAL if topic < 0 else _IN_TOPIC)["VERB"]
    }


def _meanings(generator: random.Random) -> Iterator[tuple[int, _Tree]]:
    """Yields topics and trees; no tree comes twice."""
    seen = set()
    while True:
        topic = _below(generator, len(_TOPICS))
        tree = _clause(topic, generator)
        if generator.random() < 0.2:
            tree = ("and", tree, _draw("CCONJ", -1, generator), _clause(topic, generator))
        if tree not in seen:
            seen.add(tree)
            yield topic, tree


def _draw(tag: str, topic: int, generator: random.Random) -> _Concept:
    return tag, topic, _often(generator, (_GENERAL if topic < 0 else _IN_TOPIC)[tag])


def _content(tag: str, topic: int, generator: random.Random) -> _Concept:
    kind = generator.random()
    if kind < _OF_TOPIC:
        return _draw(tag, topic, generator)
    if kind < _OF_TOPIC + _OF_NONE:
        return _draw(tag, -1, generator)
    return _draw(tag, _below(generator, len(_TOPICS)), generator)


def _clause(topic: int, generator: random.Random) -> _Tree:
    subject = _phrase(topic, generator)
    verb = _content("VERB", topic, generator)
    object_ = _phrase(topic, generator) if generator.random() < 0.7 else None
    adverb = _draw("ADV", -1, generator) if generator.random() < 0.3 else None
    place = None
    if generator.random() < 0.4:
        place = ("at", _draw("ADP", -1, generator), _phrase(topic, generator, plain=True))
    return "clause", subject, verb, object_, adverb, place


def _phrase(topic: int, generator: random.Random, *, plain: bool = False) -> _Tree:
    kind = generator.random()
    if kind < 0.1:
        return ("name", ("PROPN", -1, _often(generator, _NAMES)))
    if kind < 0.2 and not plain:
        return ("name", _draw("PRON", -1, generator))
    determiner = number = None
    if generator.random() < 0.6:
        determiner = _draw("DET", -1, generator)
    if generator.random() < 0.12:
        number = 2 + _often(generator, 98)
    adjectives = tuple(_content("ADJ", topic, generator) for _ in range(generator.random() < 0.4))
    return "phrase", determiner, number, adjectives, _content("NOUN", topic, generator)


def _say(tree: _Tree, language: GeneratedLanguage) -> _Said:
    return [*_spoken(tree, language), (".", "PUNCT")]


def _spoken(tree: _Tree, language: GeneratedLanguage) -> _Said:
    kind, *parts = tree
    order = language.order

    def word(concept: _Concept | None) -> _Said:
        return [] if concept is None else [(language.words[concept], concept[0])]

    def beside(question: str, part: _Said, head: _Said) -> _Said:
        return [*part, *head] if order[question] == "before" else [*head, *part]

    if kind == "and":
        first, conjunction, second = parts
        return [*_spoken(first, language), *word(conjunction), *_spoken(second, language)]
    if kind == "name":
        return word(parts[0])
    if kind == "at":
        adposition, phrase = parts
        return beside("adposition", word(adposition), _spoken(phrase, language))
    if kind == "phrase":
        determiner, number, adjectives, noun = parts
        described = beside("adjective", [w for a in adjectives for w in word(a)], word(noun))
        counted = ([(str(number), "NUM")] if number is not None else []) + described
        return beside("determiner", word(determiner), counted)
    subject, verb, object_, adverb, place = parts
    roles = {
        "S": _spoken(subject, language),
        "V": beside("adverb", word(adverb), word(verb)),
        "O": [] if object_ is None else _spoken(object_, language),
    }
    said = [one for role in order["clause"] for one in roles[role]]
    return said if place is None else [*said, *_spoken(place, language)]


def _text(said: _Said) -> str:
    return " ".join(word for word, _ in said[:-1]) + said[-1][0]


def _pos_data(parts: Mapping[str, list[_Said]]) -> datasets.DatasetDict:
    library = import_datasets()
    label = library.ClassLabel(names=list(_TAGS))
    string = library.Value("string")
    kinds = {"id": string, "tokens": library.Sequence(string), "labels": library.Sequence(label)}
    splits = {}
    for part, sentences in parts.items():
        columns = {
            "id": [f"{part}-{i}" for i in range(len(sentences))],
            "tokens": [[word for word, _ in said] for said in sentences],
            "labels": [[_TAGS.index(tag) for _, tag in said] for said in sentences],
        }
        splits[part] = library.Dataset.from_dict(columns, features=library.Features(kinds))
    return library.DatasetDict(splits)


def _topic_data(
    parts: Mapping[str, list[_Said]], labels: Mapping[str, list[int]]
) -> datasets.DatasetDict:
    library = import_datasets()
    string = library.Value("string")
    kinds = {"id": string, "text": string, "label": library.ClassLabel(names=list(_TOPICS))}
    splits = {}
    for part, sentences in parts.items():
        columns = {
            "id": [f"{part}-{i}" for i in range(len(sentences))],
            "text": [_text(said) for said in sentences],
            "label": labels[part],
        }
        splits[part] = library.Dataset.from_dict(columns, features=library.Features(kinds))
    return library.DatasetDict(splits)
