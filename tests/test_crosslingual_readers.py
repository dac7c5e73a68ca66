"""Readers of cross-lingual data, on small files in the formats of the hub and of plain folders."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tiny_xlmr import SENTENCES
from torchalignprune.crosslingual import (
    CC100_GIB,
    LANGUAGES,
    TASKS,
    Task,
    available_languages,
    load_task,
)

UPOS = TASKS["pos"].labels
# How the hub's copies of Universal Dependencies number the tags.
HUB_UPOS = (
    *("NOUN", "PUNCT", "ADP", "NUM", "SYM", "SCONJ", "ADJ", "PART", "DET", "CCONJ", "PROPN"),
    *("PRON", "X", "_", "ADV", "INTJ", "VERB", "AUX"),
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def parquet(path: Path, columns: dict[str, Any], features: datasets.Features | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def names(task: str, rows: datasets.Dataset) -> list[Any]:
    labels = TASKS[task].labels
    if "label" in rows.column_names:
        return [labels[label] for label in rows["label"]]
    return [[labels[label] for label in row] for row in rows["labels"]]


def tagged(sentences: list[list[tuple[str, str]]]) -> str:
    return "\n".join("".join(f"{t}\t{u}\n" for t, u in words) for words in sentences)


@pytest.mark.parametrize("suffix", [".tsv.gz", ".tsv"])
@pytest.mark.parametrize("task", ["pos", "pud"])
def test_plain_tags(task: str, suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / str(TASKS[task].folder)
    vietnamese = [[("Thanh", "PROPN"), ("bắt chuyện", "VERB")], [(".", "PUNCT")]]
    write(folder / f"test.vi{suffix}", tagged(vietnamese))
    write(folder / f"test.zh-hant{suffix}", tagged([[("我", "PRON"), ("愛", "VERB")]]) + "\n\n")
    write(folder / f"dev.vi{suffix}", "مرحبا\tINTJ\r\n\r\n")
    found = load_task(task, "vi", tmp_path)
    assert list(found) == ["validation", "test"]
    assert list(found["test"]["tokens"]) == [["Thanh", "bắt chuyện"], ["."]]
    assert names(task, found["test"]) == [["PROPN", "VERB"], ["PUNCT"]]
    assert list(found["test"]["id"]) == ["0", "1"]
    assert found["test"].features["labels"].feature.names == list(UPOS)
    assert found["validation"][0]["tokens"] == ["مرحبا"]
    assert names(task, load_task(task, "zh-hant", tmp_path)["test"]) == [["PRON", "VERB"]]
    assert available_languages(task, tmp_path) == ["vi", "zh-hant"]
    # The task's own folder does as well.
    assert load_task(task, "vi", folder)["test"][0] == found["test"][0]


def test_plain_texts(tmp_path: Path) -> None:
    rows = "17\tscience/technology\t“NA”, he said\n18\thealth\tNA\n"
    write(tmp_path / "train.el.tsv.gz", rows)
    found = load_task("topics", "el", tmp_path)["train"]
    assert found[0] == {"id": "17", "text": "“NA”, he said", "label": 4}
    assert names("topics", found) == ["science/technology", "health"]
    assert found["text"][1] == "NA"


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("pos", "a\tX\nb X\n", r"test\.en\.tsv:2 should be TOKEN TAB TAG, got 'b X'"),
        ("pos", "a\tX\tNOUN\n", r"test\.en\.tsv:1 should be TOKEN TAB TAG, got 'a\\tX\\tNOUN'"),
        ("pos", "a\tNN\n", r"labels should be those of pos, ADJ, .*, got 'NN'"),
        ("topics", "a\thealth\n", r"test\.en\.tsv:1 should be ID TAB LABEL TAB TEXT"),
        (
            "topics",
            "1\tlaw\tx\n",
            r"labels should be those of topics, entertainment, .*, got 'law'",
        ),
        ("topics", "", r"test\.en\.tsv should have at least one sentence, got an empty file"),
        ("pos", "", r"test\.en\.tsv should have at least one sentence, got an empty file"),
        ("pos", "\n\n", r"test\.en\.tsv should have at least one sentence, got an empty file"),
    ],
)
def test_plain_files_that_are_wrong(task: str, text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "test.en.tsv", text)
    with pytest.raises(ValueError, match=message):
        load_task(task, "en", tmp_path)


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_a_byte_order_mark_is_no_part_of_a_token(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"test.en{suffix}", "\ufeffYes\tINTJ\n")
    assert load_task("pos", "en", tmp_path)["test"][0]["tokens"] == ["Yes"]


def test_plain_files_lie_in_the_folder_itself(tmp_path: Path) -> None:
    write(tmp_path / "test.en.tsv", "a\tX\n")
    write(tmp_path / "copy" / "test.en.tsv", "b\tX\n")
    assert list(load_task("pos", "en", tmp_path)["test"]["tokens"]) == [["a"]]


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_only_a_newline_ends_a_line(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"test.en{suffix}", "a\rb\tX\r\nc\u2028d\tX\n")
    assert load_task("pos", "en", tmp_path)["test"][0]["tokens"] == ["a\rb", "c\u2028d"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "test.en.tsv.gz").write_bytes(b"not packed")
    with pytest.raises(ValueError, match=r"test\.en\.tsv\.gz cannot be read"):
        load_task("pos", "en", tmp_path)
    packed = gzip.compress("".join(f"{i}\tX\n" for i in range(2000)).encode())
    broken = packed[:500] + bytes(byte ^ 255 for byte in packed[500:600]) + packed[600:]
    for number, damaged in enumerate((packed[:-20], broken)):
        (tmp_path / f"test.l{number}.tsv.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"test\.l{number}\.tsv\.gz cannot be read"):
            load_task("pos", f"l{number}", tmp_path)
    (tmp_path / "test.de.tsv").write_bytes(b"\xff\xfe\tX\n")
    with pytest.raises(ValueError, match=r"test\.de\.tsv cannot be read"):
        load_task("pos", "de", tmp_path)
    write(tmp_path / "fr_gsd" / "test.parquet", "no parquet")
    with pytest.raises(ValueError, match=r"test\.parquet cannot be read"):
        load_task("pos", "fr", tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        "{}/test-00000-of-00001.parquet",
        "{}/universal_dependencies-test.parquet",
        "{}/test/0000.parquet",
        "parquet/{}/test.parquet",
    ],
)
def test_universal_dependencies(place: str, tmp_path: Path) -> None:
    """Contractions have the tag "_" and are followed by their words; they are left out."""
    strings = datasets.Sequence(datasets.Value("string"))
    features = datasets.Features(
        {
            "idx": datasets.Value("string"),
            "text": datasets.Value("string"),
            "tokens": strings,
            "lemmas": strings,
            "upos": datasets.Sequence(datasets.ClassLabel(names=list(HUB_UPOS))),
        }
    )
    tokens = ["Je", "parle", "du", "de", "le", "chat"]
    tags = ["PRON", "VERB", "_", "ADP", "DET", "NOUN"]
    rows = {
        "idx": ["n01", "n02"],
        "text": ["Je parle du chat", "Non"],
        "tokens": [tokens, ["Non"]],
        "lemmas": [tokens, ["non"]],
        "upos": [tags, ["INTJ"]],
    }
    parquet(tmp_path / place.format("fr_gsd"), rows, features)
    found = load_task("pos", "fr", tmp_path)["test"]
    assert list(found["tokens"]) == [["Je", "parle", "de", "le", "chat"], ["Non"]]
    assert names("pos", found) == [["PRON", "VERB", "ADP", "DET", "NOUN"], ["INTJ"]]
    assert list(found["id"]) == ["n01", "n02"]
    assert found.column_names == ["id", "tokens", "labels"]
    assert load_task("pos", "fr_gsd", tmp_path)["test"][0] == found[0]
    assert available_languages("pos", tmp_path) == ["fr"]


def test_tags_by_name_or_by_bare_number(tmp_path: Path) -> None:
    row = {"sent_id": "a", "tokens": ["Yes", "."], "upos": ["INTJ", "PUNCT"]}
    jsonl(tmp_path / "en_ewt" / "dev.jsonl", [row])
    parquet(
        tmp_path / "en_ewt" / "train.parquet",
        {"tokens": [["Yes", "."]], "upos": [[HUB_UPOS.index("INTJ"), HUB_UPOS.index("PUNCT")]]},
    )
    for rows in load_task("pos", "en", tmp_path).values():
        assert names("pos", rows) == [["INTJ", "PUNCT"]]


def test_texts_that_are_times_stay_as_they_are(tmp_path: Path) -> None:
    words = ["2020-01-01T00:00:00", "2021-12-31"]
    rows = [{"id": "2020-01-01", "tokens": words, "upos": ["NUM", "NUM"]}]
    jsonl(tmp_path / "en_ewt" / "dev.jsonl", rows)
    found = load_task("pos", "en", tmp_path)["validation"]
    assert list(found["tokens"]) == [words] and list(found["id"]) == ["2020-01-01"]


def test_several_files_of_a_split(tmp_path: Path) -> None:
    for i in range(3):
        name = f"train-0000{i}-of-00003.parquet"
        parquet(tmp_path / "en_ewt" / name, {"tokens": [[str(i)]], "upos": [["NUM"]]})
    rows = load_task("pos", "en", tmp_path)["train"]
    assert list(rows["tokens"]) == [["0"], ["1"], ["2"]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["test.de.tsv", "test.de.tsv.gz"], "the files of a split should be of one format, got "),
        (["de_gsd/test.jsonl", "de_gsd/test-00000-of-00001.parquet"], "should be of one format"),
        (["de_gsd/test-00000-of-00002.jsonl"], "there once, in 2 files numbered from 0, got "),
        (["de_gsd/test/00001-of-00002.jsonl"], "there once, in 2 files numbered from 0, got "),
        (["de_gsd/test.jsonl", "de_gsd/test-00000-of-00001.jsonl"], "should be there once, got "),
        (["de_gsd/test.jsonl", "copy/de_gsd/test.jsonl"], "should be there once, got "),
        (
            [f"{place}de_gsd/test-0000{i}-of-00002.jsonl" for i, place in enumerate(("", "copy/"))],
            "should be there once, got ",
        ),
        (["de_gsd/test/0000.jsonl", "de_gsd/test-00000-of-00001.jsonl"], "there once, got "),
        (["de_gsd/test/0000.jsonl", "de_gsd/test/0002.jsonl"], "in 2 files numbered from 0, got "),
        (["de_gsd/de_gsd-ud-test.jsonl", "de_gsd/test.jsonl"], "should be there once, got "),
        (["de_gsd/test-00000-of-00002-0a1b2c3d4e5f6789.jsonl"], "in 2 files numbered from 0, got "),
        (["de_gsd/test.jsonl", "test.de.tsv"], "should be of one format, got "),
        (
            [f"de_gsd/test-0000{i}-of-0000{n}.jsonl" for n in (1, 2) for i in range(n)],
            "there once, in 2 files numbered from 0, got ",
        ),
    ],
)
def test_a_split_that_is_there_twice_or_in_part(
    files: list[str], message: str, tmp_path: Path
) -> None:
    whole = "train.de.tsv" if files[0] == "test.de.tsv" else "de_gsd/train.jsonl"
    for name in [whole, *files]:
        path = tmp_path / name
        if path.suffix == ".jsonl":
            jsonl(path, [{"tokens": ["a"], "upos": ["X"]}])
        elif path.suffix == ".parquet":
            parquet(path, {"tokens": [["a"]], "upos": [["X"]]})
        else:
            write(path, "a\tX\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_task("pos", "de", tmp_path)
    assert all(str(tmp_path / name) in str(caught.value) for name in files)
    # The other split is read as before.
    assert list(load_task("pos", "de", tmp_path, splits=["train"])) == ["train"]


def test_topics_as_on_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "sib200" / "data" / "arb_Arab"
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        with (folder / f"{split}.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["index_id", "category", "text"])
            writer.writerow([431, "geography", 'محاطة "محاطة"\tكتب'])
    (folder / "labels.txt").write_text("geography\n")
    found = load_task("topics", "ar", tmp_path)
    assert list(found) == ["train", "validation", "test"]
    row = {"id": "431", "text": 'محاطة "محاطة"\tكتب', "label": 1}
    assert found["test"][0] == row
    assert load_task("topics", "arb_Arab", tmp_path / "sib200")["train"][0] == row


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ('1\thealth\t"a\n2\thealth\tb\n3\thealth\tc"\n4\thealth\td\n', "text of row 0"),
        ('1\thealth\ta\n2\thealth\t"b\n3\thealth\tc\n', "text of row 1"),
    ],
)
def test_a_quote_that_nothing_closes_swallows_no_rows(rows: str, name: str, tmp_path: Path) -> None:
    write(tmp_path / "eng_Latn" / "test.tsv", f"index_id\tcategory\ttext\n{rows}")
    with pytest.raises(ValueError, match=rf"test\.tsv: {name} should be on one line, got several"):
        load_task("topics", "en", tmp_path)


def test_quotes_in_the_files_of_paws_x_are_characters(tmp_path: Path) -> None:
    rows = '1\t"Ja" , sagte er\tEr sagte : " Ja\t1\n2\t"a\tb"\t0\n'
    write(tmp_path / "de" / "dev_2k.tsv", f"id\tsentence1\tsentence2\tlabel\n{rows}")
    found = load_task("pawsx", "de", tmp_path)["validation"]
    assert found["text"] == ['"Ja" , sagte er', '"a']
    assert found["text_pair"] == ['Er sagte : " Ja', 'b"'] and found["label"] == [1, 0]


PAIRS = {
    "xnli": ("premise", "hypothesis", ["entailment", "neutral", "contradiction"]),
    "pawsx": ("sentence1", "sentence2", ["0", "1"]),
}


@pytest.mark.parametrize("task", PAIRS)
@pytest.mark.parametrize("order", [1, -1])
def test_pairs_in_parquet(task: str, order: int, tmp_path: Path) -> None:
    """The names of the labels count, not their order."""
    first, second, labels = PAIRS[task]
    string = datasets.Value("string")
    kinds = {first: string, second: string, "label": datasets.ClassLabel(names=labels[::order])}
    rows: dict[str, Any] = {first: ["a", "b"], second: ["c", "d"], "label": labels[:2]}
    if task == "pawsx":
        kinds["id"], rows["id"] = datasets.Value("int32"), [1, 2]
    file = tmp_path / str(TASKS[task].folder) / "de" / "validation-00000-of-00001.parquet"
    parquet(file, rows, datasets.Features(kinds))
    found = load_task(task, "de", tmp_path)["validation"]
    assert names(task, found) == labels[:2]
    assert found.column_names == ["id", "text", "text_pair", "label"]
    assert found[1]["text"] == "b" and found[1]["text_pair"] == "d"
    assert list(found["id"]) == (["1", "2"] if task == "pawsx" else ["0", "1"])


def test_pairs_in_other_formats(tmp_path: Path) -> None:
    row = {"premise": "Ein Hund", "hypothesis": "Ein\nTier", "label": 2}
    jsonl(tmp_path / "de" / "test.jsonl", [row])
    write(tmp_path / "fr" / "test.csv", 'premise,hypothesis,label\nEin Hund,"Ein\nTier",2\n')
    write(tmp_path / "bg" / "test.csv", "premise,hypothesis,label\nEin Hund,007,2\n")
    write(tmp_path / "el" / "test.csv", "premise,hypothesis,label\nEin Hund,NULL,contradiction\n")
    for language, second in (
        ("de", "Ein\nTier"),
        ("fr", "Ein\nTier"),
        ("el", "NULL"),
        ("bg", "007"),
    ):
        found = load_task("xnli", language, tmp_path)["test"][0]
        assert found == {"id": "0", "text": "Ein Hund", "text_pair": second, "label": 2}


def test_entities(tmp_path: Path) -> None:
    strings = datasets.Sequence(datasets.Value("string"))
    labels = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
    features = datasets.Features(
        {
            "tokens": strings,
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=labels)),
            "langs": strings,
            "spans": strings,
        }
    )
    rows = {
        "tokens": [["عاش", "في", "القاهرة"]],
        "ner_tags": [[0, 0, 5]],
        "langs": [["ar"] * 3],
        "spans": [["LOC: القاهرة"]],
    }
    parquet(tmp_path / "wikiann" / "ar" / "test-00000-of-00001.parquet", rows, features)
    found = load_task("ner", "ar", tmp_path)["test"]
    assert names("ner", found) == [["O", "O", "B-LOC"]]


def test_empty_splits_and_sentences(tmp_path: Path) -> None:
    schema = pyarrow.schema(
        {"tokens": pyarrow.list_(pyarrow.string()), "upos": pyarrow.list_(pyarrow.string())}
    )
    (tmp_path / "en_ewt").mkdir()
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "en_ewt" / "test.parquet")
    assert len(load_task("pos", "en", tmp_path)["test"]) == 0
    rows = {"tokens": [[], ["a"], ["b"]], "upos": [[], ["X"], ["_"]]}
    parquet(tmp_path / "de_gsd" / "test.parquet", rows)
    assert list(load_task("pos", "de", tmp_path)["test"]["labels"]) == [[], [16], []]


def test_groups_of_rows_and_ids_that_are_missing(tmp_path: Path) -> None:
    rows = {"id": [7, None], "sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]}
    (tmp_path / "de").mkdir()
    file = tmp_path / "de" / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), file, row_group_size=1)
    found = load_task("pawsx", "de", tmp_path)["test"]
    assert list(found["text_pair"]) == ["c", "d"]
    assert list(found["id"]) == ["0", "1"]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "xnli",
            {"premise": "a", "label": 1},
            "column hypothesis or text_pair, got premise, label",
        ),
        ("xnli", {"premise": "a", "hypothesis": "b", "label": 3}, "from 0 to 2, got 3"),
        ("xnli", {"premise": "a", "hypothesis": "b", "label": -1}, "from 0 to 2, got -1"),
        ("xnli", {"premise": "a", "hypothesis": "b", "label": "maybe"}, "got 'maybe'"),
        ("xnli", {"premise": None, "hypothesis": "b", "label": 0}, "the text of row 0 is missing"),
        ("xnli", {"premise": ["a"], "hypothesis": "b", "label": 0}, "should be text, got list"),
        ("xnli", {"premise": "a", "hypothesis": "b", "label": None}, "1 labels are missing"),
        ("xnli", {"premise": "a", "hypothesis": "b", "label": 0.5}, "labels, as names or numbers"),
        ("pos", {"tokens": ["a"], "upos": ["X", "X"]}, "row 0 has 1 tokens and 2 labels"),
        ("pos", {"tokens": ["a"], "upos": [18]}, "from 0 to 17, got 18"),
        ("pos", {"tokens": "a b", "upos": ["X"]}, "tokens should be lists, got string"),
        ("pos", {"tokens": None, "upos": ["X"]}, "should be lists, got null"),
        ("pos", {"words": ["a"], "upos": ["X"]}, "should have a column tokens, got words, upos"),
    ],
)
def test_rows_that_are_wrong(task: str, row: Any, message: str, tmp_path: Path) -> None:
    jsonl(tmp_path / TASKS[task].configs["en"] / "test.jsonl", [row])
    with pytest.raises(ValueError, match=message) as caught:
        load_task(task, "en", tmp_path)
    assert "test.jsonl" in str(caught.value)


def test_other_configurations_of_a_folder_are_no_languages(tmp_path: Path) -> None:
    """Other treebanks, and XNLI in all languages at once, are read where they are named."""
    row = {"tokens": ["a"], "upos": ["X"]}
    for config in ("en_ewt", "en_gum", "en_pud", "de_gsd", "de_hdt", "de_pud", "zh_pud", "xx_yy"):
        jsonl(tmp_path / "ud" / config / "test.jsonl", [row])
    assert available_languages("pos", tmp_path / "ud") == ["de", "en"]
    assert available_languages("pud", tmp_path / "ud") == ["de", "en", "zh-hant"]
    whole = available_languages("pos", tmp_path / "ud", others=True)
    assert whole == ["de", "de_hdt", "de_pud", "en", "en_gum", "en_pud", "xx_yy", "zh_pud"]
    assert len(load_task("pos", "de_hdt", tmp_path / "ud")["test"]) == 1
    with pytest.raises(ValueError, match="no pos data in 'fr', only in de, de_hdt"):
        load_task("pos", "fr", tmp_path / "ud")
    pair = {"premise": {"en": "a", "de": "b"}, "hypothesis": "c", "label": 0}
    jsonl(tmp_path / "xnli" / "all_languages" / "test.jsonl", [pair])
    jsonl(tmp_path / "xnli" / "de" / "test.jsonl", [pair | {"premise": "b"}])
    assert available_languages("xnli", tmp_path) == ["de"]
    with pytest.raises(ValueError, match="should be text, got struct"):
        load_task("xnli", "all_languages", tmp_path)
    # Plain files name their language themselves, and where no language is known all are listed.
    write(tmp_path / "ud" / "test.gsw.tsv", "a\tX\n")
    assert available_languages("pos", tmp_path / "ud") == ["de", "en", "gsw"]
    jsonl(tmp_path / "own" / "gsw_uzh" / "test.jsonl", [row])
    assert available_languages("pos", tmp_path / "own") == ["gsw_uzh"]


def test_some_of_the_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.en.tsv", "not read, and not right\n")
    write(tmp_path / "dev.en.tsv", "a\tX\n")
    write(tmp_path / "test.en.tsv", "b\tX\n")
    assert list(load_task("pos", "en", tmp_path, splits=["test", "validation"])) == (
        ["validation", "test"]
    )
    (tmp_path / "train.en.tsv").unlink()
    with pytest.raises(ValueError, match="no split 'train', only validation, test"):
        load_task("pos", "en", tmp_path, splits=["train", "test"])
    with pytest.raises(TypeError, match="splits should be a list of names, got 'test'"):
        load_task("pos", "en", tmp_path, splits="test")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no files of xnli: expected CONFIGURATION/SPLIT with"):
        load_task("xnli", "en", tmp_path)
    write(tmp_path / "udpos" / "test.de.tsv", "a\tX\n")
    write(tmp_path / "udpos" / "test.en.tsv", "a\tX\n")
    with pytest.raises(ValueError, match="udpos has no pos data in 'fr', only in de, en"):
        load_task("pos", "fr", tmp_path)
    with pytest.raises(ValueError, match=r"data should be a folder, got .*nowhere"):
        load_task("pos", "fr", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"task should be one of pos, pud, topics, .*, got 'qa'"):
        load_task("qa", "en", tmp_path)
    with pytest.raises(ValueError, match="own is not on the hub"):
        load_task(Task("own", "text", ("a", "b")), "en")


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and columns as the hub has them; the download itself is stood in for."""
    asked = []
    features = datasets.Features(
        {
            "sent_id": datasets.Value("string"),
            "tokens": datasets.Sequence(datasets.Value("string")),
            "upos": datasets.Sequence(datasets.ClassLabel(names=list(HUB_UPOS))),
        }
    )
    rows = {"sent_id": ["b", "a"], "tokens": [["x"], ["y"]], "upos": [["X"], ["NOUN"]]}

    def load(repository: str, config: str) -> datasets.DatasetDict:
        asked.append((repository, config))
        whole = datasets.Dataset.from_dict(rows, features=features)
        # A selection: the table behind it has more rows.
        return datasets.DatasetDict({"dev": whole, "test": whole.select([1]), "unlabelled": whole})

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = load_task("pud", "zh-hant")
    assert list(found) == ["validation", "test"] and list(found["test"]["id"]) == ["a"]
    assert names("pud", found["test"]) == [["NOUN"]]
    load_task("pos", "en")
    assert list(load_task("pos", "de_hdt", splits=["test"])) == ["test"]
    repository = "universal-dependencies/universal_dependencies"
    assert asked == [(repository, config) for config in ("zh_pud", "en_ewt", "de_hdt")]
    with pytest.raises(ValueError, match=r"en_ewt, has no split 'train', only validation, test"):
        load_task("pos", "en", splits=["train"])


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (ConnectionError("Couldn't reach it"), OSError, "cannot be read from the hub .* takes a"),
        (
            ValueError("BuilderConfig 'xx' not found."),
            ValueError,
            "no topics data in 'xx': BuilderConfig 'xx' not found.; known languages: af, ar",
        ),
    ],
)
def test_a_hub_that_does_not_answer(
    raised: Exception,
    expected: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: str) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(expected, match=message):
        load_task("topics", "xx")


def test_without_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "test.en.tsv", "a\tX\n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'"torchalignprune\[crosslingual\]"'):
        load_task("pos", "en", tmp_path)


def test_what_importing_it_imports() -> None:
    """None of what the extra installs, so that errors can name the extra."""
    heavy = ("datasets", "transformers", "pyarrow", "matplotlib", "pandas", "rich")
    code = f"""
import sys
import torchalignprune.crosslingual
print([name for name in {heavy} if name in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "[]"


def test_the_table_of_languages() -> None:
    assert set(CC100_GIB) == set(LANGUAGES)
    for code, language in LANGUAGES.items():
        assert language.script == language.flores.partition("_")[2]
        if language.treebank is not None:
            assert language.treebank.startswith(code.partition("-")[0] + "_")
    for task in TASKS.values():
        assert len(set(task.configs.values())) == len(task.configs)
        assert "en" in task.configs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tree"}, "kind should be words, text or pair, got 'tree'"),
        ({"labels": ("a", "a")}, "labels should be at least two different ones"),
        ({"metric": "bleu"}, "metric should be accuracy or span_f1, got 'bleu'"),
        ({"metric": "span_f1", "labels": ("O", "B-X", "X")}, "labels of spans should be O, B-"),
        ({"metric": "span_f1", "kind": "text"}, "span_f1 goes with kind='words'"),
    ],
)
def test_tasks_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"kind": "words", "labels": ("O", "B-X", "I-X")} | change
    with pytest.raises(ValueError, match=message):
        Task("own", **options)


@pytest.fixture(scope="module")
def real_data() -> Path:
    """Downloaded data, which is not in the repository: whoever has it names its folder."""
    folder = os.environ.get("TORCHALIGNPRUNE_DATA")
    if not folder:
        pytest.skip("TORCHALIGNPRUNE_DATA names no folder with udpos, pud and sib200")
    return Path(folder)


def test_real_data(real_data: Path) -> None:
    """Every file of the folder is read, and holds what its README says."""
    sentences = {}
    for task, split, length in (("pud", "test", 1000), ("topics", "test", 204)):
        for language in available_languages(task, real_data):
            found = load_task(task, language, real_data)[split]
            assert len(found) == length
            sentences[task, language] = found
    english = sentences["topics", "en"]
    for (task, _), found in sentences.items():
        if task == "topics":
            assert list(found["label"]) == list(english["label"])
            assert list(found["id"]) == list(english["id"])
    assert sum(map(len, sentences["pud", "en"]["tokens"])) == 21180
    tokens = load_task("pos", "vi", real_data)["test"]["tokens"]
    words = [word for sentence in tokens for word in sentence]
    assert len(words) == 11692 and np.mean([" " in word for word in words]) > 0.15
    assert len(load_task("pos", "en", real_data)["train"]) == 12000
    assert set(SENTENCES) - {"he", "ur", "hi", "ko"} <= set(
        available_languages("topics", real_data)
    )
