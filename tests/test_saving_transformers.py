"""Models of transformers in folders: dense ones for ``from_pretrained``, bitmasks for less disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

import torchalignprune as tap
from models import Record
from torchalignprune.pruned_files import INDEX, open_weights

FORMATS = ["dense", "bitmask"]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "vocab_size": 50,
}


def bert(kind: Any = transformers.BertModel, **changes: Any) -> Any:
    torch.manual_seed(0)
    return kind(transformers.BertConfig(**(SIZES | changes))).eval()


def roberta(kind: Any = transformers.XLMRobertaForMaskedLM) -> Any:
    torch.manual_seed(0)
    return kind(transformers.XLMRobertaConfig(**SIZES)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=40)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.max_new_tokens = 7
    return model


def llama() -> Any:
    """Buffers that no file has."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, rope_theta=77.0)
    return transformers.LlamaForCausalLM(config).eval()


def classifier() -> Any:
    return bert(transformers.BertForSequenceClassification, num_labels=3)


MODELS = {
    "bert": (bert, transformers.AutoModel),
    "classifier": (classifier, transformers.AutoModelForSequenceClassification),
    "xlm-roberta": (roberta, transformers.AutoModelForMaskedLM),
    "gpt2": (gpt2, transformers.AutoModelForCausalLM),
    "llama": (llama, transformers.AutoModelForCausalLM),
}


def pruned(model: Any, amount: float = 0.6) -> Any:
    tap.global_unstructured(tap.prunable_parameters(model), tap.AlignedMagnitude, amount=amount)
    return model


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def assert_same_outputs(one: Any, other: Any) -> None:
    tokens = torch.randint(3, 50, (2, 9))
    with torch.no_grad():
        assert torch.equal(one(tokens)[0], other(tokens)[0])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, format: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, auto = MODELS[name]
    model = pruned(make())
    record = Record(model)
    capfd.readouterr()
    tap.save_pruned(model, tmp_path / "x", format)
    record.assert_untouched()
    fresh = make()
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    loaded = [tap.load_pruned(kind, tmp_path / "x") for kind in (type(model), auto, fresh)]
    assert capfd.readouterr() == ("", "")
    for other in loaded:
        assert type(other) is type(model) and not other.training
        assert_same_outputs(other, model)
        assert other.config.to_dict() == loaded[0].config.to_dict() or other is fresh
        if format == "bitmask":
            assert_same_state(other, model)
        tied = other.get_output_embeddings()
        if tied is not None and other.config.tie_word_embeddings:
            assert tied.weight is other.get_input_embeddings().weight
        if name == "gpt2":
            assert other.generation_config.max_new_tokens == 7
        # They can be pruned on, and trained.
        params = tap.prunable_parameters(other)
        tap.global_unstructured(params, tap.Magnitude, amount=0.1)
        other(torch.randint(3, 50, (2, 9)))[0].sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_reads_the_dense_folder(name: str, tmp_path: Path) -> None:
    make, auto = MODELS[name]
    model = pruned(make())
    tap.save_pruned(model, tmp_path / "x", max_shard_size="20KB")
    assert not [key for key in open_weights(tmp_path / "x") if key.endswith(("_orig", "_mask"))]
    assert len(list((tmp_path / "x").glob("model-*.safetensors"))) > 1
    for kind in (type(model), auto):
        other, found = kind.from_pretrained(tmp_path / "x", output_loading_info=True)
        assert not any(found.values())
        assert_same_outputs(other, model)
    assert_same_outputs(tap.load_pruned(auto, tmp_path / "x"), model)


def test_from_pretrained_does_not_read_bitmasks(tmp_path: Path) -> None:
    tap.save_pruned(pruned(bert()), tmp_path / "x", "bitmask")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.BertModel.from_pretrained(tmp_path / "x")


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **(SIZES | {"num_hidden_layers": 1}), num_key_value_heads=2, num_local_experts=2
    )
    return transformers.MixtralForCausalLM(config).eval()


def test_a_model_that_transformers_stores_in_another_form(tmp_path: Path) -> None:
    model = pruned(mixtral())
    tap.save_pruned(model, tmp_path / "dense")
    loaded = tap.load_pruned(transformers.MixtralForCausalLM, tmp_path / "dense")
    assert_same_outputs(loaded, model)
    with pytest.raises(ValueError, match="pass load_pruned the class, MixtralForCausalLM, for a"):
        tap.load_pruned(mixtral(), tmp_path / "dense")
    tap.save_pruned(model, tmp_path / "bitmask", "bitmask")
    for what in (transformers.MixtralForCausalLM, mixtral()):
        assert_same_state(tap.load_pruned(what, tmp_path / "bitmask"), model)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, finished: bool, tmp_path: Path) -> None:
    model = pruned(bert().to(dtype))
    if finished:
        for pair in tap.prunable_parameters(model):
            prune.remove(*pair)
    model.embeddings.LayerNorm.float()  # one dtype does not stand for all
    with torch.no_grad():
        model.embeddings.LayerNorm.weight.copy_(torch.randn(16))
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    other = tap.load_pruned(transformers.AutoModel, tmp_path / "x")
    assert other.dtype == model.dtype and other.embeddings.LayerNorm.weight.dtype == torch.float32
    assert_same_state(other, model)
    assert sum("mask" in name for name in other.state_dict()) == (0 if finished else 12)
    tap.save_pruned(model, tmp_path / "dense")
    for what in (transformers.AutoModel, bert().to(dtype)):
        if isinstance(what, nn.Module):
            what.embeddings.LayerNorm.float()
        other = tap.load_pruned(what, tmp_path / "dense")
        assert other.dtype == dtype and other.embeddings.LayerNorm.weight.dtype == torch.float32
        assert torch.equal(other.embeddings.LayerNorm.weight, model.embeddings.LayerNorm.weight)


def test_another_class_is_refused(tmp_path: Path) -> None:
    tap.save_pruned(pruned(classifier()), tmp_path / "dense")
    tap.save_pruned(pruned(classifier()), tmp_path / "bitmask", "bitmask")
    for folder in (tmp_path / "dense", tmp_path / "bitmask"):
        message = "saved from BertForSequenceClassification, does not fit BertModel:\n"
        with pytest.raises(ValueError, match=message):
            tap.load_pruned(transformers.BertModel, folder)
        with pytest.raises(ValueError, match="does not fit BertForMaskedLM:\n"):
            tap.load_pruned(transformers.AutoModelForMaskedLM, folder)
        fresh = bert()
        record = Record(fresh)
        with pytest.raises(ValueError, match=message):
            tap.load_pruned(fresh, folder)
        record.assert_untouched()
    with pytest.raises(ValueError, match="DistilBertModel takes a DistilBertConfig, but"):
        tap.load_pruned(transformers.DistilBertModel, tmp_path / "bitmask")


@pytest.mark.parametrize("format", FORMATS)
def test_the_config_counts(format: Any, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    tap.save_pruned(pruned(bert()), folder, format)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(
        ValueError, match=r"config\.json was altered after .*; verify=False accepts"
    ):
        tap.load_pruned(transformers.BertModel, folder)
    loaded = tap.load_pruned(transformers.BertModel, folder, verify=False)
    assert loaded.config.hidden_act == "relu"
    tap.load_pruned(bert(), folder)  # a model has its own
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"should have a config\.json for BertModel, got none"):
        tap.load_pruned(transformers.BertModel, folder)


def test_an_altered_weight_is_noticed_before_from_pretrained(tmp_path: Path) -> None:
    tap.save_pruned(pruned(bert()), tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"in .*model\.safetensors was altered"):
        tap.load_pruned(transformers.AutoModel, tmp_path / "x")


def test_a_plain_folder_is_no_model_of_transformers(tmp_path: Path) -> None:
    tap.save_pruned(nn.Linear(3, 3), tmp_path / "x")
    with pytest.raises(
        ValueError, match=r"not saved from a transformers model can only be loaded into"
    ):
        tap.load_pruned(transformers.AutoModel, tmp_path / "x")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = bert()
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="BertModel is quantized: only float weights"):
        tap.save_pruned(model, tmp_path / "x")
    peft = pytest.importorskip("peft")
    model = bert()
    model.add_adapter(peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(
        ValueError, match="BertModel has adapters, which are not saved with its own weights"
    ):
        tap.save_pruned(model, tmp_path / "x", "bitmask")
    assert list(tmp_path.iterdir()) == []


def test_ties_that_transformers_does_not_know_of(tmp_path: Path) -> None:
    model = bert()
    first, second = (layer.attention.self for layer in model.encoder.layer[:2])
    second.query.weight = first.query.weight
    with pytest.raises(
        ValueError, match=r"BertModel has tied weights that it does not declare .*layer\.1"
    ):
        tap.save_pruned(model, tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    assert_same_state(tap.load_pruned(bert(), tmp_path / "x"), model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_wrapper_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def wrapped() -> Any:
        return peft.get_peft_model(pruned(bert()), peft.LoraConfig(target_modules=["query"]))

    model = wrapped()
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    fresh = wrapped()
    nn.init.ones_(
        fresh.base_model.model.encoder.layer[0].attention.self.query.lora_B.default.weight
    )
    tap.load_pruned(fresh, tmp_path / "x")
    assert_same_state(fresh, model)


@pytest.mark.parametrize("format", FORMATS)
def test_the_tokenizer_stays(format: Any, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    tap.save_pruned(bert(), folder, "bitmask" if format == "dense" else "dense")
    (folder / "tokenizer.json").write_text("{}")
    tap.save_pruned(pruned(bert()), folder, format)
    weights = "model.safetensors" if format == "dense" else "pruned.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["config.json", INDEX, weights, "tokenizer.json"]
    )


def test_reference_and_report_read_bitmasks(tmp_path: Path) -> None:
    dense, sparse = bert(), pruned(bert())
    tap.save_pruned(dense, tmp_path / "dense", "bitmask")
    tap.save_pruned(sparse, tmp_path / "sparse", "bitmask")
    params = tap.prunable_parameters(bert())
    for folder, model in (("dense", dense), ("sparse", sparse)):
        reference = tap.Reference.from_checkpoint(tmp_path / folder, params)
        name = params.names[0] + ("_orig" if folder == "sparse" else "")
        assert torch.equal(reference[params[0]], model.state_dict()[name])
    assert "pruned.safetensors" not in load_file(tmp_path / "sparse" / "pruned.safetensors")
