"""Labels on the first subword of each word, in every script."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tiny_xlmr import SENTENCES, unigram, wordpiece
from torchalignprune.crosslingual import encode_words
from torchalignprune.crosslingual.words import IGNORED


@pytest.fixture(params=[unigram, wordpiece], ids=["unigram", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


def alone(tokenizer: Any, word: str) -> list[int]:
    """The subwords of a word by itself."""
    ids: list[int] = tokenizer([word], is_split_into_words=True, add_special_tokens=False).input_ids
    return ids


@pytest.mark.parametrize("language", SENTENCES)
def test_every_script(tokenizer: Any, language: str) -> None:
    words = SENTENCES[language]
    (sentence,) = encode_words(tokenizer, [words], [list(range(10, 10 + len(words)))])
    subwords = [alone(tokenizer, word) for word in words]
    assert sentence.inputs["input_ids"] == [0, *chain(*subwords), 2]
    blank = tokenizer.convert_tokens_to_ids("▁")
    expected, places = [IGNORED], []
    for i, pieces in enumerate(subwords):
        skipped = int(len(pieces) > 1 and pieces[0] == blank != tokenizer.unk_token_id)
        places.append(len(expected) + skipped)
        rest = len(pieces) - 1 - skipped
        expected += [IGNORED] * skipped + [10 + i] + [IGNORED] * rest
    assert sentence.labels == [*expected, IGNORED]
    assert sentence.first == places
    assert sentence.cut_off == sentence.unmapped == 0


def test_a_bare_space_is_no_subword_of_a_word() -> None:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("你", -3.0), ("好", -3.0), ("▁a", -3.0)]
    plain = Tokenizer(models.Unigram(pieces, unk_id=3))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    (sentence,) = encode_words(tokenizer, [["你好", "a", "", "好", "▁"]], [[5, 6, 7, 8, 9]])
    assert tokenizer.convert_ids_to_tokens(sentence.inputs["input_ids"]) == (
        ["▁", "你", "好", "▁a", "▁", "好", "▁"]
    )
    assert sentence.labels == [-100, 5, -100, 6, -100, 8, 9]
    assert sentence.first == [1, 3, -1, 5, 6]
    # By the other convention a bare space is a word's first subword.
    (sentence,) = encode_words(
        tokenizer, [["你好", "a", "", "好", "▁"]], [[5, 6, 7, 8, 9]], bare_pieces="label"
    )
    assert sentence.labels == [5, -100, -100, 6, 8, -100, 9]
    assert sentence.first == [0, 3, -1, 4, 6]


def test_an_unknown_subword_may_be_the_first() -> None:
    tokenizer = wordpiece()
    (sentence,) = encode_words(tokenizer, [["ꙮ.", "."]], [[3, 4]])
    assert tokenizer.convert_ids_to_tokens(sentence.inputs["input_ids"])[1:3] == ["<unk>", "."]
    assert sentence.first == [1, 3]
    assert sentence.labels == [IGNORED, 3, IGNORED, 4, IGNORED]


def test_a_space_within_a_word_does_not_end_it(tokenizer: Any) -> None:
    (sentence,) = encode_words(tokenizer, [["bắt chuyện", "với"]], [[3, 4]])
    assert [label for label in sentence.labels if label != IGNORED] == [3, 4]
    pieces = tokenizer.convert_ids_to_tokens(alone(tokenizer, "bắt chuyện"))
    assert "".join(pieces).replace("#", "").replace("▁", " ").strip() in (
        "bắt chuyện",
        "bắtchuyện",
    )


def test_words_that_map_to_nothing(tokenizer: Any) -> None:
    words = ["", "Thanh", "\u200b" if tokenizer is unigram() else "\u0007", "."]
    (sentence,) = encode_words(tokenizer, [words], [[1, 2, 3, 4]])
    assert sentence.unmapped == 2 and sentence.cut_off == 0
    assert [at < 0 for at in sentence.first] == [True, False, True, False]
    assert [label for label in sentence.labels if label != IGNORED] == [2, 4]


def test_sentences_without_any_subword(tokenizer: Any) -> None:
    empty, nothing = encode_words(tokenizer, [[], [""]], [[], [5]])
    assert empty.inputs["input_ids"] == nothing.inputs["input_ids"] == [0, 2]
    assert empty.first == [] and empty.unmapped == 0
    assert nothing.first == [-1] and nothing.unmapped == 1
    assert encode_words(tokenizer, []) == []


def test_without_labels() -> None:
    (sentence,) = encode_words(unigram(), [["Thanh", "."]])
    assert set(sentence.labels) == {IGNORED}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_sentence_that_is_too_long(
    tokenizer: Any, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    words = SENTENCES["en"]
    sizes = [len(alone(tokenizer, word)) for word in words]
    for fitting in range(len(words)):
        length = 2 + sum(sizes[:fitting])
        for spare in range(sizes[fitting]):
            (sentence,) = encode_words(
                tokenizer, [words], [list(range(len(words)))], max_length=length + spare
            )
            assert len(sentence.inputs["input_ids"]) == length == len(sentence.labels)
            assert sentence.cut_off == len(words) - fitting and sentence.unmapped == 0
            assert [at >= 0 for at in sentence.first] == [i < fitting for i in range(len(words))]
            assert [label for label in sentence.labels if label >= 0] == list(range(fitting))
    (whole,) = encode_words(tokenizer, [words], max_length=2 + sum(sizes))
    assert whole.cut_off == 0


def test_a_tokenizer_without_special_tokens_leaves_room_for_none() -> None:
    plain = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    (sentence,) = encode_words(tokenizer, [["a", "b", "a"]], max_length=2)
    assert sentence.inputs["input_ids"] == [1, 2]
    assert (sentence.first, sentence.cut_off) == ([0, 1, -1], 1)


def test_words_that_map_to_nothing_are_not_cut_off() -> None:
    words = ["Thanh", "", "Thanh", ""]
    size = len(alone(unigram(), "Thanh"))
    (sentence,) = encode_words(unigram(), [words], max_length=2 + size)
    assert (sentence.cut_off, sentence.unmapped) == (1, 2)


@given(
    st.lists(
        st.lists(
            st.one_of(
                st.sampled_from(sorted({word for words in SENTENCES.values() for word in words})),
                st.text(max_size=6),
            ),
            max_size=8,
        ),
        max_size=4,
    ),
    st.none() | st.integers(2, 30),
)
def test_every_word_has_a_place_or_is_counted(
    sentences: list[list[str]], max_length: int | None
) -> None:
    labels = [list(range(len(words))) for words in sentences]
    for words, sentence in zip(
        sentences, encode_words(unigram(), sentences, labels, max_length=max_length), strict=True
    ):
        assert max_length is None or len(sentence.labels) <= max_length
        assert sentence.first.count(-1) == sentence.cut_off + sentence.unmapped
        for word, at in enumerate(sentence.first):
            assert at < 0 or sentence.labels[at] == word
        placed = [label for label in sentence.labels if label != IGNORED]
        assert placed == [word for word in range(len(words)) if sentence.first[word] >= 0]


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"tokenizer should be a fast one .* got object"):
        encode_words(object(), [["a"]])
    with pytest.raises(TypeError, match="sentence 1 should be a list of words, got 'a b'"):
        encode_words(unigram(), [["a"], "a b"])
    with pytest.raises(ValueError, match="sentence 0 has 1 words and 2 labels"):
        encode_words(unigram(), [["a"]], [[1, 2]])
    with pytest.raises(ValueError, match="labels should be for 1 sentences, got 2"):
        encode_words(unigram(), [["a"]], [[1], [2]])
    with pytest.raises(ValueError, match="labels should be for 2 sentences, got 1"):
        encode_words(unigram(), [["a"], ["b"]], [[1]])
    with pytest.raises(ValueError, match="max_length should be at least 2, the special tokens"):
        encode_words(unigram(), [["Thanh"]], max_length=1)
    with pytest.raises(ValueError, match="max_length should be at least 2, the special tokens"):
        encode_words(unigram(), [[]], max_length=1)
    with pytest.raises(ValueError, match="bare_pieces should be 'skip' or 'label', got 'first'"):
        encode_words(unigram(), [["a"]], bare_pieces="first")  # type: ignore[arg-type]


@pytest.mark.parametrize("within", [False, True])
def test_byte_level_bpe_without_a_space_before_words(within: bool) -> None:
    """As RoBERTa's tokenizer is unless it is told otherwise: it takes The cat for Thecat."""
    specials = {name: i for i, name in enumerate(("<s>", "<pad>", "</s>", "<unk>"))}
    letters = {c: 4 + i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    plain = Tokenizer(models.BPE(specials | letters, []))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    for space in (True, False):
        level = pre_tokenizers.ByteLevel(add_prefix_space=space)
        inner = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), level])
        tokenizer.backend_tokenizer.pre_tokenizer = inner if within else level
        if space:
            (sentence,) = encode_words(tokenizer, [["a", "b"]])
        else:
            with pytest.warns(UserWarning, match="no space before words, .* add_prefix_space=True"):
                (sentence,) = encode_words(tokenizer, [["a", "b"]])
        pieces = tokenizer.convert_ids_to_tokens(sentence.inputs["input_ids"])
        assert pieces == (["Ġ", "a", "Ġ", "b"] if space else ["a", "b"])
        assert sentence.first == ([1, 3] if space else [0, 1])


def test_a_pre_tokenizer_that_is_written_in_python() -> None:
    class Characters:
        def pre_tokenize(self, text: Any) -> None:
            text.split(lambda _, part: [part[i : i + 1] for i in range(len(str(part)))])

    plain = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Characters())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=unigram().backend_tokenizer)
    tokenizer._tokenizer = plain
    (sentence,) = encode_words(tokenizer, [["ab", "b"]])
    assert sentence.inputs["input_ids"] == [1, 2, 2] and sentence.first == [0, 2]


def test_slow_tokenizers_are_refused() -> None:
    class Slow(transformers.PreTrainedTokenizer):
        @property
        def vocab_size(self) -> int:
            return 0

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(TypeError, match=r"should be a fast one .* got Slow"):
        encode_words(Slow(), [["a"]])
