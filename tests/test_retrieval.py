"""Embeddings of sentences, and whether they find their translations."""

from __future__ import annotations

import torch
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM, XLMRobertaModel

from reference import retrieval_hits as plain_hits
from tiny_xlmr import unigram
from torchalignprune.crosslingual import retrieval_hits, sentence_embeddings

TEXTS = ["The unbending units were kept.", "Это книга.", "我喜欢你。", "The book."]


def make_config() -> XLMRobertaConfig:
    return XLMRobertaConfig(
        vocab_size=len(unigram()),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        pad_token_id=unigram().pad_token_id,
    )


def test_embeddings_are_means_without_special_tokens_and_padding() -> None:
    torch.manual_seed(0)
    model = XLMRobertaModel(make_config()).train()
    together = sentence_embeddings(model, unigram(), TEXTS, batch_size=3)
    assert model.training and together.dtype == torch.float32
    model.eval()
    for text, found in zip(TEXTS, together, strict=True):
        ids = torch.tensor([unigram()(text)["input_ids"]])
        with torch.no_grad():
            states = model(ids).last_hidden_state[0, 1:-1].double()
        mean = states.mean(0)
        torch.testing.assert_close(found.double(), mean / mean.norm(), atol=1e-5, rtol=0)


def test_every_part_is_in_its_own_mode_afterwards() -> None:
    model = XLMRobertaForMaskedLM(make_config()).train()
    model.roberta.embeddings.eval()
    before = {name: module.training for name, module in model.named_modules()}
    sentence_embeddings(model, unigram(), TEXTS)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_heads_do_not_matter() -> None:
    torch.manual_seed(0)
    model = XLMRobertaForMaskedLM(make_config()).eval()
    expected = sentence_embeddings(model.roberta, unigram(), TEXTS)
    assert torch.equal(sentence_embeddings(model, unigram(), TEXTS), expected)


def test_long_texts_are_cut_and_none_are_fine() -> None:
    model = XLMRobertaModel(make_config())
    assert sentence_embeddings(model, unigram(), []).shape == (0, 16)
    found = sentence_embeddings(model, unigram(), ["The book. " * 100])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(1))


def test_hits_against_the_plain_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 6, generator=generator)
    b = a + 1.5 * torch.randn(40, 6, generator=generator)
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    found = retrieval_hits(a, b)
    assert found.tolist() == plain_hits(a, b)
    assert 0 < found.sum() < 40
