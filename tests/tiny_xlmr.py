"""A tokenizer trained on a few sentences in many scripts, and tiny models of XLM-R's classes."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

# Words as treebanks have them, with a space inside where the language writes one.
SENTENCES = {
    "en": ["The", "unbending", "units", "were", "kept", "."],
    "vi": ["Thanh", "bắt chuyện", "với", "Hùng", "."],
    "ar": ["تركيا", "محاطة", "بالبحار", "."],
    "he": ["שלום", "עולם", "."],
    "ur": ["یہ", "ایک", "کتاب", "ہے", "۔"],  # noqa: RUF001
    "zh": ["我", "喜欢", "你", "。"],
    "ja": ["これ", "は", "本", "です", "。"],
    "th": ["ผม", "รัก", "คุณ"],
    "hi": ["यह", "किताब", "है", "।"],
    "ru": ["Это", "книга", "."],
    "el": ["Καλημέρα", "κόσμε", "."],
    "ko": ["나는", "너를", "사랑해", "."],
}


@functools.cache
def unigram() -> Any:
    """A tokenizer like XLM-R's: Unigram pieces, ``▁`` for spaces, the same special tokens."""
    return _wrapped(_trained(models.Unigram(), trainers.UnigramTrainer, unk_token="<unk>"))


@functools.cache
def wordpiece() -> Any:
    """A tokenizer like mBERT's, which removes control characters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _wrapped(_train(tokenizer, trainers.WordPieceTrainer))


def _trained(model: Any, trainer: Any, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    # Like SentencePiece, drop zero-width spaces.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\u200b", "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return _train(tokenizer, trainer, **options)


def _train(tokenizer: Tokenizer, trainer: Any, **options: Any) -> Tokenizer:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = [" ".join(words) for words in SENTENCES.values()] * 4
    tokenizer.train_from_iterator(
        texts, trainer(vocab_size=220, special_tokens=specials, show_progress=False, **options)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


def _wrapped(tokenizer: Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=48,
        model_input_names=["input_ids", "attention_mask"],
    )


def xlmr(labels: tuple[str, ...], kind: str = "TokenClassification", seed: int = 0) -> Any:
    """A model of XLM-R's class with random weights and 48 usable positions."""
    torch.manual_seed(seed)
    config = transformers.XLMRobertaConfig(
        vocab_size=max(len(unigram()), len(wordpiece())),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=50,
        pad_token_id=1,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    model = getattr(transformers, f"XLMRobertaFor{kind}")(config)
    # Spread the logits, so that not everything gets the same label.
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.mul_(20)
    return model.eval()


class Lookup(nn.Module):
    """Looks up the label of each subword by its id, or that of a text by its second id."""

    def __init__(self, table: Tensor, labels: tuple[str, ...], words: bool = True) -> None:
        super().__init__()
        self.table = nn.Parameter(
            torch.nn.functional.one_hot(table, len(labels)).float(), requires_grad=False
        )
        self.config = SimpleNamespace(id2label=dict(enumerate(labels)), max_position_embeddings=48)
        self.words = words
        self.batches: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert not self.training and attention_mask.shape == input_ids.shape
        self.batches.append(tuple(input_ids.shape))
        logits = self.table[input_ids if self.words else input_ids[:, 1]]
        return SimpleNamespace(logits=logits)
