"""Pretrain a miniature XLM-R on parallel Bibles, news and plain sentences.

    pip install "torchalignprune[crosslingual,demo,matching]"
    python examples/pretrain_mini_xlmr.py --data DATA --wordnet /usr/share/wordnet --out OUT

DATA holds gzip-compressed text in UTF-8:

    bible/LANGUAGE.tsv.gz    ``VERSE <TAB> TEXT``, verses with the same ids in all languages
    ntrex/LANGUAGE.tsv.gz    ``nNUMBER <TAB> TEXT``: NTREX-128, news in many languages
    raw/LANGUAGE.txt.gz      one sentence per line (optional)

The last 500 sentences of NTREX are held out for evaluation: by the loss, and by how often a
sentence finds its translation among all 500. The others are trained on.

So little text says little about modern words. The rest comes from an English sentence encoder,
all-MiniLM-L6-v2, in three ways:

- The embedding of every piece of the vocabulary is initialized from those of the English words that
  it is aligned with in the parallel text (IBM Model 1), reduced to the width of the model by
  principal components.
- A sentence is trained towards the encoder's embedding of its English translation.
- An English word, and any word aligned with it, is trained towards the state of that English word
  in the encoder's middle layer, which knows most about syntax.

With ``--wordnet`` the definitions of WordNet 3.0 (``apt-get install wordnet-base``) are added to
the English sentences.

``OUT/state.safetensors`` has the latest state: the same command resumes from there after it was
stopped. ``OUT/teacher`` and ``OUT/lexicons`` have what takes minutes to make, some 3 GB. These and
``OUT/tokenizer`` depend on the texts, the vocabulary and the teacher, which ``OUT/settings.json``
records; if they differ, the folder is refused. ``OUT/model`` is the finished checkpoint, in
bfloat16, with its tokenizer and ``scores.json``. ``OUT/log.jsonl`` has the losses.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import load_npz, save_npz
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from torchalignprune.crosslingual import (
    ParallelText,
    piece_states,
    piece_vectors,
    pretrain,
    retrieval_hits,
    sentence_embeddings,
    train_tokenizer,
    transferred_vectors,
    translation_table,
)
from torchalignprune.crosslingual.sweep import fast_dtype
from torchalignprune.demo import encoder_folder

LANGUAGES = ["en", "de", "nl", "fr", "es", "it", "pt", "ru", "pl", "fi", "ar", "zh", "id"]
HELD_OUT = 500
# How many verses are drawn for one sentence of the news.
BIBLE_WEIGHT = 2.0
# How many of WordNet's definitions are used, and how many sentences of a text are aligned.
DEFINITIONS = 70_000
ALIGNED = 12_000
# The root mean square of the initial embeddings of pieces.
SCALE = 0.04

Texts = dict[str, dict[str, str]]


def lines_of(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        yield from (line.rstrip("\n") for line in file)


def read_parallel(folder: Path, languages: Sequence[str]) -> Texts:
    """Sentences by id, for each language found; that of ``id`` may be ``id-ulb.tsv.gz``."""
    found = {}
    for language in languages:
        paths = [folder / f"{language}.tsv.gz", *sorted(folder.glob(f"{language}-*.tsv.gz"))]
        path = next((path for path in paths if path.exists()), None)
        if path is not None:
            rows = (line.split("\t", 1) for line in lines_of(path))
            found[language] = dict(rows)
    return found


def read_definitions(folder: Path) -> list[str]:
    """WordNet's synsets as ``words: definition``, in a seeded order."""
    found = []
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence
                continue
            head, _, definition = line.partition(" | ")
            fields = head.split(" ")
            words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in words]
            found.append(f"{', '.join(words)}: {definition.strip()}")
    random.Random(0).shuffle(found)
    return found[:DEFINITIONS]


def make_tokenizer(
    bible: Texts, news: Texts, raw: dict[str, list[str]], vocabulary: int
) -> PreTrainedTokenizerFast:
    """Trains on the news four times and on every fifth verse once, so modern words get pieces."""
    texts: list[str] = []
    for language, own in news.items():
        texts += list(own.values()) * 4
        texts += raw.get(language, [])[:16_000]
        texts += list(bible[language].values())[::5]
    tokenizer = train_tokenizer(texts, vocabulary)
    tokenizer.model_max_length = 256
    return tokenizer


def begin_with(
    model: XLMRobertaForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    parallel: Sequence[Texts],
    encoder: PreTrainedModel,
    encoder_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Initializes embeddings of pieces from the encoder's, for the English words they translate."""
    words = encoder.get_input_embeddings().weight.detach()
    vectors, counts = transferred_vectors(
        tokenizer, parallel, *piece_vectors(tokenizer, encoder_tokenizer, words)
    )
    there = vectors.any(dim=1)
    _, _, axes = torch.linalg.svd(vectors[there], full_matrices=False)
    vectors = vectors @ axes[: model.config.hidden_size].T
    vectors *= SCALE / vectors[there].square().mean().sqrt()
    with torch.no_grad():
        model.get_input_embeddings().weight[there] = vectors[there]
        model.lm_head.bias.copy_(((counts + 0.5) / counts.sum()).log())


def make_lexicons(
    tokenizer: PreTrainedTokenizerFast, parallel: Sequence[Texts], folder: Path
) -> dict[str, Any]:
    """The probable English translations of the pieces, for each other language."""
    found = {}
    for language in parallel[0]:
        path = folder / f"{language}.npz"
        if language != "en" and not path.exists():
            source: list[list[int]] = []
            target: list[list[int]] = []
            for text in parallel:
                names = sorted(text[language].keys() & text["en"].keys())
                names = random.Random(0).sample(names, min(len(names), ALIGNED))
                for own, language_of in ((source, language), (target, "en")):
                    texts = [text[language_of][name] for name in names]
                    own += tokenizer(texts, add_special_tokens=False)["input_ids"]
            table = translation_table(source, target, len(tokenizer))
            folder.mkdir(parents=True, exist_ok=True)
            save_npz(folder / "partial.npz", table)
            (folder / "partial.npz").rename(path)
        if language != "en":
            found[language] = load_npz(path)
    return found


def embed(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], path: Path
) -> Tensor:
    """The encoder's embeddings of sentences, from ``path`` if they are there."""
    if path.exists():
        return load_file(path)["embeddings"]
    found = sentence_embeddings(encoder, tokenizer, texts, batch_size=256)
    keep({"embeddings": found}, path)
    return found


def embed_words(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    pieces: PreTrainedTokenizerFast,
    path: Path,
) -> Sequence[Tensor]:
    """The states of words in the encoder's middle layer, from ``path`` if they are there."""
    if path.exists():
        kept = load_file(path)
    else:
        lower = copy.deepcopy(encoder)
        lower.encoder.layer = lower.encoder.layer[: (len(lower.encoder.layer) + 1) // 2]
        made = piece_states(lower, tokenizer, texts, pieces, batch_size=256)
        lengths = torch.tensor([len(own) for own in made])
        kept = {"states": torch.cat(made), "lengths": lengths}
        keep(kept, path)
    return kept["states"].split(kept["lengths"].tolist())


def keep(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes what takes minutes to make, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial)
    partial.rename(path)


def settings_of(texts: Sequence[Any], vocabulary: int, teacher: Path) -> dict[str, Any]:
    """What the tokenizer, the lexicons and the teacher's vectors depend on."""
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(teacher.iterdir())
        if path.is_file()
    }
    return {
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "vocabulary": vocabulary,
        "teacher": files,
    }


def other_settings(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Names of settings that differ from the folder's. Writes the settings to a new folder."""
    path = folder / "settings.json"
    if not path.exists() and not (folder / "tokenizer").exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(settings, indent=2) + "\n")
        partial.rename(path)
    found = json.loads(path.read_text()) if path.exists() else {}
    return [name for name, value in settings.items() if found.get(name) != value]


@torch.no_grad()
def masked_loss(
    model: XLMRobertaForMaskedLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> float:
    """Mean negative log-likelihood of 15% of the tokens, each masked, in nats."""
    generator = torch.Generator().manual_seed(0)
    total = count = 0.0
    for start in range(0, len(texts), 50):
        batch = tokenizer(
            list(texts[start : start + 50]), padding=True, truncation=True, return_tensors="pt"
        ).to(model.device)
        ids = batch["input_ids"]
        hidden = (torch.rand(ids.shape, generator=generator) < 0.15).to(ids.device) & (ids > 3)
        batch["input_ids"] = ids.masked_fill(hidden, tokenizer.mask_token_id)
        logits = model(**batch).logits[hidden].float()
        total += float(cross_entropy(logits, ids[hidden], reduction="sum"))
        count += int(hidden.sum())
    return total / count


def scores_of(
    model: XLMRobertaForMaskedLM, tokenizer: PreTrainedTokenizerFast, held_out: Texts
) -> dict[str, object]:
    """Losses, and how often sentences find their translation, to and from English."""
    names = sorted(set.intersection(*(set(own) for own in held_out.values())))
    texts = {language: [own[name] for name in names] for language, own in held_out.items()}
    embeddings = {
        language: normalize(sentence_embeddings(model, tokenizer, own), dim=1)
        for language, own in texts.items()
    }
    retrieval = {}
    for language, own in embeddings.items():
        if language != "en":
            there = retrieval_hits(embeddings["en"], own).float().mean()
            back = retrieval_hits(own, embeddings["en"]).float().mean()
            retrieval[language] = round(float(there + back) / 2, 4)
    losses = {
        language: round(masked_loss(model, tokenizer, own), 3) for language, own in texts.items()
    }
    return {
        "sentences": len(names),
        "masked_lm_loss": losses,
        "uniform_loss": round(torch.tensor(len(tokenizer)).log().item(), 3),
        "retrieval": retrieval,
        "retrieval_mean": round(sum(retrieval.values()) / len(retrieval), 4),
        "retrieval_chance": round(1 / len(names), 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with bible/, ntrex/, raw/")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and model")
    parser.add_argument("--languages", nargs="+", metavar="CODE", default=LANGUAGES)
    parser.add_argument("--vocabulary", type=int, default=16_000, metavar="PIECES")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--tokens", type=int, default=6144, help="per batch")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--teacher", type=Path, help="Transformers folder (default: all-MiniLM-L6-v2)"
    )
    parser.add_argument("--wordnet", type=Path, help="folder with data.noun and the like")
    parser.add_argument("--float32", action="store_true", help="even where bfloat16 is faster")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if "en" not in options.languages or len(set(options.languages)) < 2:
        parser.error(
            f"--languages should be en and at least one other, got {' '.join(options.languages)}"
        )

    bible = read_parallel(options.data / "bible", options.languages)
    news = read_parallel(options.data / "ntrex", options.languages)
    missing = [code for code in options.languages if code not in bible or code not in news]
    if missing:
        parser.error(f"--data: {options.data} has no {missing[0]}.tsv.gz in bible/ and ntrex/")
    raw = {
        code: list(lines_of(path))
        for code in options.languages
        if (path := options.data / "raw" / f"{code}.txt.gz").exists()
    }
    held = set(sorted(set.union(*(set(own) for own in news.values())))[-HELD_OUT:])
    training = {
        code: {name: text for name, text in own.items() if name not in held}
        for code, own in news.items()
    }
    held_out = {
        code: {name: text for name, text in own.items() if name in held}
        for code, own in news.items()
    }
    if options.wordnet is not None:
        raw["en"] = raw.get("en", []) + read_definitions(options.wordnet)
    if options.teacher is None:
        options.teacher = encoder_folder()
    if not options.teacher.is_dir():
        parser.error(f"--teacher should be a folder, got {options.teacher}")
    settings = settings_of([bible, training, raw], options.vocabulary, options.teacher)
    if others := other_settings(options.out, settings):
        parser.error(
            f"--out should be a new folder or one with the same {', '.join(settings)}, got "
            f"{options.out} with other {', '.join(others)}"
        )

    # oneDNN compiles matrix products for each shape and caches 1024 by default. Batches have more
    # shapes than that. It reads this variable when it compiles the first.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "30000")
    final = options.out / "model"
    pieces = options.out / "tokenizer"
    if not pieces.exists():
        partial = options.out / "tokenizer.partial"
        make_tokenizer(bible, training, raw, options.vocabulary).save_pretrained(partial)
        partial.rename(pieces)
    tokenizer = AutoTokenizer.from_pretrained(pieces)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(options.seed)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=options.intermediate,
        max_position_embeddings=258,
        type_vocab_size=1,
        # There is more text than the model can learn. For fine-tuning dropout is set below.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    autocast = None if options.float32 else fast_dtype(device)
    # On CPUs with matrix products in bfloat16, fused attention is slower for such short sentences.
    attention = "eager" if device == "cpu" and autocast is not None else "sdpa"
    model = XLMRobertaForMaskedLM._from_config(config, attn_implementation=attention).to(device)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} weights, of them "
        f"{sum(p.numel() for p in model.base_model.encoder.parameters()):,} in the encoder's layers"
    )
    encoder = AutoModel.from_pretrained(options.teacher, attn_implementation=attention).to(device)
    encoder_tokenizer = AutoTokenizer.from_pretrained(options.teacher)

    def teacher(texts: Sequence[str]) -> Tensor:
        path = options.out / "teacher" / "sentences.safetensors"
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return embed(encoder, encoder_tokenizer, texts, path)

    def word_teacher(texts: Sequence[str]) -> Sequence[Tensor]:
        path = options.out / "teacher" / "words.safetensors"
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return embed_words(encoder, encoder_tokenizer, texts, tokenizer, path)

    started = time.perf_counter()
    begin_with(model, tokenizer, [bible, training], encoder, encoder_tokenizer)
    log = pretrain(
        model,
        tokenizer,
        [ParallelText(bible, BIBLE_WEIGHT), ParallelText(training)],
        raw,
        steps=options.steps,
        tokens=options.tokens,
        learning_rate=options.learning_rate,
        teacher=teacher,
        word_teacher=word_teacher,
        lexicons=make_lexicons(tokenizer, [bible, training], options.out / "lexicons"),
        autocast=autocast,
        seed=options.seed,
        folder=options.out,
        progress=True,
    )
    print(f"{log[-1] if log else ''} {time.perf_counter() - started:.0f} s")
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1
    model = model.to(torch.bfloat16)
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    # Scores of the saved weights, which are rounded to bfloat16.
    scores = scores_of(model.float(), tokenizer, held_out)
    (final / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(scores, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
