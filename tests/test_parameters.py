"""prunable_parameters: what is listed, what is left out and why."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

import torchalignprune as tap
from models import mlp
from torchalignprune.parameters import (
    HEADS,
    PrunableParameters,
    mask_of,
    parameter_names,
    prunable_parameters,
    stored,
    unit_dimension,
)

OUT_PROJ = "MultiheadAttention.out_proj (it is not called, so its hooks would not run)"


def bert_config(**changes: int) -> transformers.BertConfig:
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 20,
        "max_position_embeddings": 16,
    }
    return transformers.BertConfig(**(sizes | changes))


def check_complete(model: nn.Module, params: PrunableParameters) -> None:
    """Every parameter of the model is either listed or left out, under its plain name."""
    plain = {
        name.removesuffix("_orig") for name, _ in model.named_parameters(remove_duplicate=False)
    }
    assert set(params.names) | set(params.left_out) == plain
    assert not set(params.names) & set(params.left_out)
    assert len(set(params.names)) == len(params.names) == len(params)
    for name, (module, attribute) in zip(params.names, params, strict=True):
        path, _, last = name.rpartition(".")
        assert model.get_submodule(path) is module and last == attribute


def test_xlm_roberta_base_has_72_encoder_matrices() -> None:
    config = transformers.XLMRobertaConfig(
        vocab_size=250002, max_position_embeddings=514, type_vocab_size=1
    )
    with torch.device("meta"):
        model = transformers.XLMRobertaModel(config)
    params = prunable_parameters(model)
    assert len(params) == 72
    assert sum(getattr(*pair).numel() for pair in params) == 84_934_656
    assert params.names[:3] == [
        f"encoder.layer.0.attention.self.{which}.weight" for which in ("query", "key", "value")
    ]
    assert params.left_out["embeddings.word_embeddings.weight"] == "embedding"
    assert params.left_out["pooler.dense.weight"] == "head (pooler)"
    assert params.left_out["encoder.layer.0.output.LayerNorm.weight"] == "norm"
    assert params.left_out["encoder.layer.0.output.dense.bias"] == "bias"
    check_complete(model, params)


def test_minilm_has_36_encoder_matrices() -> None:
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.device("meta"):
        params = prunable_parameters(transformers.BertModel(config))
    assert len(params) == 36
    assert sum(getattr(*pair).numel() for pair in params) == 10_616_832


@pytest.mark.parametrize(
    "kind",
    [
        transformers.BertForMaskedLM,
        transformers.BertForSequenceClassification,
        transformers.BertForTokenClassification,
        transformers.BertForQuestionAnswering,
        transformers.BertForPreTraining,
    ],
)
def test_outside_the_base_model_is_a_head(kind: type[nn.Module]) -> None:
    model = kind(bert_config())
    params = prunable_parameters(model)
    assert len(params) == 12
    assert all(name.startswith("bert.encoder.") for name in params.names)
    check_complete(model, params)


def test_a_head_of_any_name_outside_the_base_model() -> None:
    class Tagger(transformers.BertPreTrainedModel):
        def __init__(self, config: transformers.BertConfig) -> None:
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.tags = nn.Linear(8, 3)

    params = prunable_parameters(nn.ModuleDict({"inner": Tagger(bert_config())}))
    assert params.left_out["inner.tags.weight"] == "head (outside the base model inner.bert)"
    assert len(params) == 12


@pytest.mark.parametrize("head", HEADS)
def test_heads_by_name(head: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), head: nn.Sequential(nn.Linear(4, 2))})
    params = prunable_parameters(model)
    assert params.names == ["body.weight"]
    assert params.left_out[f"{head}.0.weight"] == f"head ({head})"
    # Only whole components of a name count.
    assert len(prunable_parameters(nn.ModuleDict({f"{head}less": nn.Linear(4, 4)}))) == 1


def test_supported_modules() -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 6),
            "conv": nn.Conv2d(2, 4, 3),
            "transposed": nn.ConvTranspose1d(2, 4, 3),
            "gpt": Conv1D(6, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "mixed": nn.MultiheadAttention(4, 2, kdim=6, vdim=8),
            "embedding": nn.Embedding(5, 4),
            "bag": nn.EmbeddingBag(5, 4),
            "norm": nn.LayerNorm(4),
            "recurrent": nn.LSTM(4, 4),
            "scale": nn.PReLU(),
        }
    )
    params = prunable_parameters(model)
    assert params.names == [
        "linear.weight",
        "conv.weight",
        "transposed.weight",
        "gpt.weight",
        "attention.in_proj_weight",
        "mixed.q_proj_weight",
        "mixed.k_proj_weight",
        "mixed.v_proj_weight",
    ]
    assert params.left_out["attention.out_proj.weight"] == OUT_PROJ
    assert params.left_out["attention.out_proj.bias"] == "bias"
    assert params.left_out["attention.in_proj_bias"] == "bias"
    assert params.left_out["bag.weight"] == "embedding"
    assert params.left_out["recurrent.weight_ih_l0"] == "LSTM is not a supported module"
    assert params.left_out["scale.weight"] == "PReLU is not a supported module"
    check_complete(model, params)


def test_pruned_attention_computes_with_its_masked_projection() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True, bias=False)
    x = torch.randn(2, 3, 4)
    expected_weight = attention.in_proj_weight.detach().clone()
    expected_weight[:4] = 0
    params = prunable_parameters(attention)
    assert params.names == ["in_proj_weight"]
    scores = {params[0]: (expected_weight != 0).float()}
    tap.global_unstructured(params, tap.Magnitude, importance_scores=scores, amount=16)
    plain = nn.MultiheadAttention(4, 2, batch_first=True, bias=False)
    plain.load_state_dict(
        {"in_proj_weight": expected_weight, "out_proj.weight": attention.out_proj.weight}
    )
    torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0])


def test_a_subclass_of_linear_and_a_root_module() -> None:
    class Odd(nn.Linear):
        pass

    assert prunable_parameters(Odd(2, 2)).names == ["weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    assert len(prunable_parameters(nn.Linear(2, 2, dtype=dtype))) == 1


def test_what_a_hook_could_not_reach_is_left_out() -> None:
    quantized = nn.Linear(4, 4)
    quantized.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.warns(FutureWarning, match="weight_norm"):
        recomputed = nn.utils.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict(
        {
            "fine": nn.Linear(4, 4),
            "parametrized": parametrizations.weight_norm(nn.Linear(4, 4)),
            "recomputed": recomputed,
            "quantized": quantized,
            "lazy": nn.LazyLinear(4),
        }
    )
    params = prunable_parameters(model)
    assert params.names == ["fine.weight"]
    assert {name: why for name, why in params.left_out.items() if name.endswith(".weight")} == {
        "parametrized.weight": "parametrized by torch.nn.utils.parametrize",
        "recomputed.weight": "not a parameter: it is recomputed before every forward",
        "quantized.weight": "int8 is not a supported dtype",
        "lazy.weight": "not initialized yet",
    }
    with pytest.raises(ValueError, match=r"only matches .*quantized\.weight \(int8 is not"):
        prunable_parameters(model, include="quantized")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("form", ["a wrapper", "in the model"])
def test_adapters_of_peft_are_left_out(form: str) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.BertModel(bert_config())
    names = prunable_parameters(base).names
    config = peft.LoraConfig(target_modules=["query", "word_embeddings"], use_dora=True)
    if form == "a wrapper":
        model = peft.get_peft_model(base, config)
    else:
        model = base
        model.add_adapter(config)
    params = prunable_parameters(model)
    check_complete(model, params)
    prefix = "base_model.model." if form == "a wrapper" else ""
    assert params.names == [
        prefix + name.replace("query.weight", "query.base_layer.weight") for name in names
    ]
    adapter = f"{prefix}encoder.layer.0.attention.self.query.lora_B.default.weight"
    assert params.left_out[adapter] == "adapter (PEFT)"
    assert "4 adapter" in repr(params)
    assert len(prunable_parameters(model, include="*lora_[AB]*")) == 4
    assert prunable_parameters(model, include="*.0.*.lora_B").names == [adapter]


def test_include_and_exclude() -> None:
    model = transformers.BertModel(bert_config(num_hidden_layers=12))
    names = prunable_parameters(model).names

    def listed(**patterns: object) -> list[str]:
        params = prunable_parameters(model, **patterns)  # type: ignore[arg-type]
        check_complete(model, params)
        return params.names

    first = [name for name in names if name.startswith("encoder.layer.1.")]
    assert listed(include="encoder.layer.1") == first
    assert listed(include="encoder.layer.1", exclude="*.key") == [
        name for name in first if ".key." not in name
    ]
    assert listed(exclude="encoder.layer.1") == [name for name in names if name not in first]
    assert listed(exclude="*attention*") == [name for name in names if "attention" not in name]
    assert listed(include=["pooler", "*word_embeddings.weight"]) == [
        "embeddings.word_embeddings.weight",
        "pooler.dense.weight",
    ]
    assert len(listed(include="*")) == len(names) + 4
    params = prunable_parameters(model, include="pooler", exclude="*attention*")
    assert params.left_out["encoder.layer.0.attention.self.key.weight"] == (
        "excluded by '*attention*'"
    )
    assert params.left_out["encoder.layer.0.output.dense.weight"] == "not matched by include"


def test_patterns_are_checked() -> None:
    model = transformers.BertModel(bert_config())
    with pytest.raises(ValueError, match=r"exclude pattern 'pooller' matches no .*near: pooler"):
        prunable_parameters(model, exclude="pooller")
    with pytest.raises(ValueError, match=r"include pattern 'encoder\.layers\.0' matches no"):
        prunable_parameters(model, include="encoder.layers.0")
    with pytest.raises(ValueError, match=r"'\*LayerNorm' only matches parameters that cannot"):
        prunable_parameters(model, include="*LayerNorm")
    with pytest.raises(ValueError, match=r"nothing to prune in BertModel; left out: .*12 excluded"):
        prunable_parameters(model, exclude="encoder")
    with pytest.raises(ValueError, match="nothing to prune in LayerNorm; left out: 1 norm, 1 bias"):
        prunable_parameters(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="it has no parameters"):
        prunable_parameters(nn.ReLU())
    with pytest.raises(ValueError, match="nothing to prune"):
        prunable_parameters(model, include=[])
    with pytest.raises(TypeError, match="include should be a glob pattern or several, got int"):
        prunable_parameters(model, include=[3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="exclude should be a glob pattern or several, got int"):
        prunable_parameters(model, exclude=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model should be an nn\.Module, got list"):
        prunable_parameters([nn.Linear(2, 2)])  # type: ignore[arg-type]


class Tied(nn.Module):
    """Two linear layers with one weight, and one between them in the model's order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.middle(self.first(x)))
        return out


def test_tied_weights_are_listed_together_and_stay_tied() -> None:
    model = Tied()
    params = prunable_parameters(model)
    assert params.names == ["first.weight", "last.weight", "middle.weight"]
    check_complete(model, params)
    assert "3 with 32 entries" in repr(params)
    tap.global_unstructured(params, tap.Magnitude, amount=16)
    assert model.first.weight_orig is model.last.weight_orig
    assert torch.equal(model.first.weight, model.last.weight)
    assert sum(int((layer.weight == 0).sum()) for layer in (model.first, model.middle)) == 16
    assert prunable_parameters(model).names == params.names


def test_tied_weights_are_left_out_together() -> None:
    params = prunable_parameters(Tied(), exclude="last")
    assert params.names == ["middle.weight"]
    assert params.left_out["last.weight"] == "excluded by 'last'"
    assert params.left_out["first.weight"] == (
        "tied to last.weight, which is left out: excluded by 'last'"
    )
    assert prunable_parameters(Tied(), include="last").names == ["first.weight", "last.weight"]

    model = Tied()
    model.last = nn.LSTM(4, 1)
    model.last.weight_ih_l0 = model.first.weight
    params = prunable_parameters(model)
    assert params.names == ["middle.weight"]
    assert "LSTM is not a supported module" in params.left_out["first.weight"]


def test_a_decoder_tied_to_the_embedding() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(6, 4), "body": nn.Linear(4, 4), "decoder": nn.Linear(4, 6)}
    )
    model["decoder"].weight = model["embed"].weight
    params = prunable_parameters(model)
    assert params.names == ["body.weight"]
    assert params.left_out["decoder.weight"] == (
        "tied to embed.weight, which is left out: embedding"
    )
    for pattern in ("embed", "decoder"):
        assert prunable_parameters(model, include=pattern).names == [
            "embed.weight",
            "decoder.weight",
        ]


def test_masked_lm_with_its_decoder_included() -> None:
    model = transformers.XLMRobertaForMaskedLM(
        transformers.XLMRobertaConfig(**bert_config().to_dict() | {"architectures": None})
    )
    params = prunable_parameters(model, include="lm_head.decoder")
    assert set(params.names) == {
        "lm_head.decoder.weight",
        "roberta.embeddings.word_embeddings.weight",
    }
    check_complete(model, params)


def test_a_module_at_two_places_is_listed_once_and_matched_by_both_names() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleDict({"c": layer}), "d": nn.Linear(4, 4)})
    assert prunable_parameters(model).names == ["a.weight", "d.weight"]
    assert prunable_parameters(model, exclude="b.c").names == ["d.weight"]


@pytest.mark.parametrize("by", ["torch", "tap"])
def test_a_pruned_parameter_is_listed_again(by: str) -> None:
    model = transformers.BertModel(bert_config())
    before = prunable_parameters(model)
    if by == "torch":
        prune.global_unstructured(before, pruning_method=prune.L1Unstructured, amount=0.5)
    else:
        tap.global_unstructured(before, tap.Magnitude, amount=0.5)
    after = prunable_parameters(model)
    assert after == before and after.names == before.names
    check_complete(model, after)
    for pair in after:
        assert stored(*pair) is getattr(pair[0], f"{pair[1]}_orig")
        assert mask_of(*pair) is getattr(pair[0], f"{pair[1]}_mask")
    prune.global_unstructured(after, pruning_method=prune.L1Unstructured, amount=0.5)
    zeros = sum(int((getattr(*pair) == 0).sum()) for pair in after)
    assert zeros == 3 * sum(getattr(*pair).numel() for pair in after) // 4


def test_an_unpruned_parameter_that_is_called_orig() -> None:
    model = nn.Linear(2, 2)
    model.register_parameter("scale_orig", nn.Parameter(torch.ones(1)))
    assert prunable_parameters(model).left_out["scale_orig"] == "not a weight"


def test_a_module_with_a_mask_of_its_own_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].register_buffer("weight_mask", torch.ones(2, 2))
    found = prunable_parameters(model)
    assert found.left_out["0.weight"] == "Linear has an attribute 'weight_mask' of its own"
    assert "weight_mask" in repr(found)


def test_names_survive_copies() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    params = prunable_parameters(model)
    twin_model, twin = copy.deepcopy((model, params))
    assert isinstance(twin, PrunableParameters)
    assert twin.names == params.names and twin.left_out == params.left_out
    assert twin[1][0] is twin_model[1]
    again = pickle.loads(pickle.dumps(params))
    assert again.names == params.names and repr(again) == repr(params)


def test_repr_shortens_long_lists() -> None:
    params = prunable_parameters(nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)]))
    assert repr(params).splitlines() == [
        "PrunableParameters: 12 with 48 entries",
        *[f"  {i}.weight   (2, 2)" for i in range(5)],
        "  ... 5 more",
        "  10.weight  (2, 2)",
        "  11.weight  (2, 2)",
        "  left out: 12 bias",
    ]


def test_parameter_names() -> None:
    layer = nn.Linear(2, 2)
    assert parameter_names(prunable_parameters(nn.Sequential(layer))) == ["0.weight"]
    assert parameter_names([(layer, "weight"), (layer, "bias")]) == [
        "parameters[0] (Linear.weight)",
        "parameters[1] (Linear.bias)",
    ]


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        (nn.Linear(4, 2), "weight", 0),
        (nn.Linear(4, 2), "bias", 0),
        (Conv1D(2, 4), "weight", 1),
        (Conv1D(2, 4), "bias", 0),
        (nn.Conv3d(4, 2, 1), "weight", 0),
        (nn.ConvTranspose3d(4, 2, 1), "weight", 1),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", 0),
        (nn.Embedding(4, 2), "weight", 0),
    ],
)
def test_unit_dimension(module: nn.Module, name: str, expected: int) -> None:
    assert unit_dimension(module, name) == expected


@given(st.lists(st.sampled_from("lceno"), min_size=1, max_size=8), st.integers(0, 2**8 - 1))
def test_any_model_is_listed_completely(kinds: list[str], ties: int) -> None:
    make = {
        "l": lambda: nn.Linear(4, 4),
        "c": lambda: nn.Conv1d(4, 4, 1),
        "e": lambda: nn.Embedding(4, 4),
        "n": lambda: nn.LayerNorm(4),
        "o": lambda: nn.MultiheadAttention(4, 2),
    }
    model = nn.Sequential(*[make[kind]() for kind in kinds])
    squares = [m for m in model if isinstance(m, nn.Linear | nn.Embedding)]
    for i, module in enumerate(squares[1:]):
        if ties >> i & 1:
            module.weight = squares[0].weight
    try:
        params = prunable_parameters(model)
    except ValueError as error:
        assert "nothing to prune" in str(error)
        return
    check_complete(model, params)
    # Tied weights are next to each other, all or none.
    tensors = [id(getattr(*pair)) for pair in params]
    runs = [tensor for i, tensor in enumerate(tensors) if i == 0 or tensors[i - 1] != tensor]
    assert len(runs) == len(set(runs))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in tensors:
            assert name in params.names


def test_importing_the_package_imports_no_extra() -> None:
    code = (
        "import sys, torchalignprune; "
        "extras = {'transformers', 'safetensors', 'rich', 'matplotlib', 'tokenizers'}; "
        "print(sorted(extras & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_names_go_with_their_parameters() -> None:
    params = tap.prunable_parameters(mlp())
    params.reverse()
    assert params.names == ["2.weight", "0.weight"]
    assert params.pop() and params.names == ["2.weight"]
    params.append((nn.Linear(2, 2), "weight"))
    assert params.names == ["2.weight", "Linear.weight"] and "Linear.weight" in repr(params)
    assert copy.deepcopy(params).names == pickle.loads(pickle.dumps(params)).names == params.names
