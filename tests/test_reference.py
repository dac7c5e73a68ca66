"""Reference: capture, checkpoints without a copy, saving, and where it is used."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

import torchalignprune as tap
from models import Tied, assert_same_masks, mask_list, mixed, mlp, weights_of
from test_weight_files import shard
from torchalignprune.parameters import PrunableParameters, prunable_parameters

CONFIG: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 40,
}


def assert_equal(reference: tap.Reference, params: list[Any], expected: list[Any]) -> None:
    assert list(reference) == list(dict.fromkeys(params))
    for pair, weight in zip(params, expected, strict=True):
        torch.testing.assert_close(reference[pair], weight, rtol=0, atol=0)


def change(params: list[Any]) -> None:
    """Changes the weights, as further training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in weights_of(params):
            noise = torch.randn(weight.shape, generator=generator)
            weight.mul_(0.5).add_(noise.to(weight))


def test_capture_is_a_copy(dtype: torch.dtype, device: str) -> None:
    model = mlp(dtype).to(device)
    params = prunable_parameters(model)
    before = [weight.clone() for weight in weights_of(params)]
    reference = tap.Reference.capture(params)
    change(params)
    assert_equal(reference, params, before)
    assert all(tensor.dtype == dtype for tensor in reference.values())
    assert not any(tensor.requires_grad for tensor in reference.values())


@pytest.mark.parametrize("method", [prune.L1Unstructured, tap.Magnitude])
def test_capture_of_a_pruned_model_is_without_the_masks(method: Any) -> None:
    model = mlp()
    params = prunable_parameters(model)
    before = [weight.clone() for weight in weights_of(params)]
    prune.global_unstructured(params, pruning_method=method, amount=0.5)
    model(torch.ones(1, 12))
    assert_equal(tap.Reference.capture(params), params, before)


def test_capture_from_plain_pairs_of_every_layout() -> None:
    model = mixed()
    model[3].to(memory_format=torch.channels_last)
    params = [(layer, "weight") for layer in model]
    reference = tap.Reference.capture(params)
    assert_equal(reference, params, weights_of(params))
    assert_equal(tap.Reference.capture(iter(params)), params, weights_of(params))


def test_tied_weights_are_there_once() -> None:
    model = Tied()
    params = prunable_parameters(model)
    reference = tap.Reference.capture(params)
    assert reference[model.a, "weight"] is reference[model.b, "weight"]
    moved = reference.to(dtype=torch.float16)
    assert moved[model.a, "weight"] is moved[model.b, "weight"]
    assert repr(reference) == "Reference(2 parameters, 144 entries, float32, cpu)"


def test_dtype_and_device() -> None:
    params = prunable_parameters(mlp())
    half = tap.Reference.capture(params, torch.bfloat16, "cpu")
    assert_equal(half, params, [weight.bfloat16() for weight in weights_of(params)])
    whole = tap.Reference.capture(params)
    assert_equal(whole.to(dtype=torch.bfloat16), params, list(half.values()))
    assert_equal(whole, params, weights_of(params))
    same = whole.to("cpu")
    assert same is not whole
    assert all(a is b for a, b in zip(same.values(), whole.values(), strict=True))
    for call in (whole.to, lambda dtype: tap.Reference.capture(params, dtype)):
        with pytest.raises(TypeError, match=r"dtype should be one of float32, .*, got torch.int8"):
            call(dtype=torch.int8)


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        tap.Reference.capture([])
    with pytest.raises(TypeError, match="pairs"):
        tap.Reference.capture(mlp())  # type: ignore[arg-type]
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(
        ValueError, match=r"0\.weight should have values, got a tensor on the meta device"
    ):
        tap.Reference.capture(prunable_parameters(model))
    with pytest.raises(TypeError, match=r"use Reference\.capture"):
        tap.Reference()


def test_mapping() -> None:
    model = mlp()
    params = prunable_parameters(model)
    reference = tap.Reference.capture(params)
    assert len(reference) == 2 and params[0] in reference and (model[1], "weight") not in reference
    assert reference.get((model[0], "bias")) is None
    for key in ((model[0], "bias"), "0.weight", [model[0], "weight"]):
        with pytest.raises(KeyError, match="the reference has no entry for"):
            reference[key]  # type: ignore[index]
    with pytest.raises(TypeError):
        reference[params[0]] = torch.ones(16, 12)  # type: ignore[index]
    assert reference == reference and reference != tap.Reference.capture(params)
    assert {reference: 1}[reference] == 1


def test_only_the_modules_are_kept_alive() -> None:
    model = mlp()
    reference = tap.Reference.capture(prunable_parameters(model))
    whole, layer, activation = weakref.ref(model), weakref.ref(model[0]), weakref.ref(model[1])
    del model
    gc.collect()
    assert whole() is None and activation() is None and layer() is not None
    del reference
    gc.collect()
    assert layer() is None


def test_deepcopy_goes_with_the_model() -> None:
    model = mlp()
    params = prunable_parameters(model)
    reference = tap.Reference.capture(params)
    for copied_model, copied in (
        copy.deepcopy((model, reference)),
        copy.deepcopy((reference, model))[::-1],
    ):
        own = prunable_parameters(copied_model)
        assert list(copied) == list(own) and params[0] not in copied
        assert all(copied[b] is reference[a] for a, b in zip(params, own, strict=True))
    shallow = copy.copy(reference)
    assert all(shallow[pair] is reference[pair] for pair in params)
    with pytest.raises(TypeError, match=r"cannot be pickled: use Reference\.save"):
        pickle.dumps(reference)


def masks(params: list[Any], **options: Any) -> list[Any]:
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5, **options)
    return mask_list(params)


@pytest.mark.parametrize("options", [{}, {"alignment": "frobenius"}, {"units": "both"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aligned_magnitude_takes_it(options: dict[str, Any], dtype: torch.dtype) -> None:
    results = []
    for form in ("reference", "list", "torch"):
        model = mlp()
        params = prunable_parameters(model)
        reference = tap.Reference.capture(params, dtype)
        change(params)
        given = list(reference.values()) if form == "list" else reference
        if form == "torch":
            prune.global_unstructured(
                params,
                pruning_method=tap.AlignedMagnitude,
                amount=0.5,
                reference=given,
                **options,
            )
        else:
            tap.global_unstructured(
                params, tap.AlignedMagnitude, amount=0.5, reference=given, **options
            )
        results.append(mask_list(params))
    assert all(torch.equal(*pair) for pair in zip(results[0], results[1], strict=True))
    assert all(torch.equal(*pair) for pair in zip(results[0], results[2], strict=True))
    plain = mlp()
    change(prunable_parameters(plain))
    without = masks(prunable_parameters(plain), **options)
    assert not all(torch.equal(*pair) for pair in zip(results[0], without, strict=True))


def test_it_stays_right_through_iterative_pruning() -> None:
    ours, torchs = mlp(), mlp()
    for model, call in ((ours, tap.global_unstructured), (torchs, prune.global_unstructured)):
        params = prunable_parameters(model)
        reference = tap.Reference.capture(params)
        for _ in range(3):
            change(params)
            call(params, pruning_method=tap.AlignedMagnitude, amount=0.3, reference=reference)
            model(torch.ones(1, 12))
    assert_same_masks(prunable_parameters(ours), prunable_parameters(torchs))


def test_tied_and_n_of_m_and_single_parameters_take_it() -> None:
    model = Tied()
    params = prunable_parameters(model)
    reference = tap.Reference.capture(params[:1])
    change(params[:1])
    tap.global_unstructured(params, tap.AlignedNM, n=2, m=4, reference=reference)
    assert model.a.weight_mask is model.b.weight_mask
    single = mlp()
    reference = tap.Reference.capture(prunable_parameters(single))
    tap.aligned_magnitude(single[2], "weight", 0.5, reference=reference)
    with pytest.raises(ValueError, match="reference has no entry for"):
        tap.aligned_magnitude(single[0], "bias", 0.5, reference=reference)


def test_save_and_load(dtype: torch.dtype, tmp_path: Path) -> None:
    model = mixed().to(dtype)
    model[3].to(memory_format=torch.channels_last)
    params = prunable_parameters(model)
    reference = tap.Reference.capture(params)
    path = tmp_path / "reference.safetensors"
    reference.save(path)
    fresh = mixed()
    own = prunable_parameters(fresh)
    loaded = tap.Reference.load(path, own)
    assert_equal(loaded, own, weights_of(params))
    loaded.save(path)  # over the file that it is a view of
    assert_equal(tap.Reference.load(str(path), own), own, weights_of(params))
    assert [file.name for file in tmp_path.iterdir()] == ["reference.safetensors"]


def test_save_and_load_tied(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    model = Tied()
    tap.Reference.capture(prunable_parameters(model)).save(path)
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["a.weight"]
    untied = Tied()
    untied.b.weight = nn.Parameter(torch.zeros(12, 12))
    loaded = tap.Reference.load(path, prunable_parameters(untied))
    for layer in (untied.a, untied.b):
        assert torch.equal(loaded[layer, "weight"], model.a.weight)


def test_save_needs_names_and_load_its_own_files(tmp_path: Path) -> None:
    model = mlp()
    params = prunable_parameters(model)
    path = tmp_path / "reference.safetensors"
    with pytest.raises(TypeError, match="capture the reference from prunable_parameters"):
        tap.Reference.capture(list(params)).save(path)
    assert not path.exists()
    for metadata in (None, {"format": "pt", "version": "1", "names": "{}"}):
        save_file(model.state_dict(), path, metadata=metadata)
        with pytest.raises(ValueError, match=r"should be a file that Reference\.save wrote"):
            tap.Reference.load(path, params)
    tap.Reference.capture(params).save(path)
    with pytest.raises(
        TypeError, match=r"params should come from prunable_parameters.* found by name, got list"
    ):
        tap.Reference.load(path, list(params))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"does not fit 1 of 1 parameters:\n  1\.weight: missing"):
        tap.Reference.load(path, prunable_parameters(nn.Sequential(nn.ReLU(), nn.Linear(12, 16))))
    save_file(
        {"a": torch.ones(1)},
        path,
        metadata={"format": "torchalignprune.reference", "version": "9", "names": "{}"},
    )
    with pytest.raises(ValueError, match="should have format version 1, got 9"):
        tap.Reference.load(path, params)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("own", ["base", "task", "wrapped"])
@pytest.mark.parametrize("stored", ["base", "task"])
def test_transformers_checkpoints(own: str, stored: str, sharded: bool, tmp_path: Path) -> None:
    kinds = {
        "base": transformers.BertModel,
        "task": transformers.BertForSequenceClassification,
    }
    source = kinds[stored](transformers.BertConfig(**CONFIG))
    source.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is sharded
    model = kinds["base" if own == "wrapped" else own](transformers.BertConfig(**CONFIG))
    params = prunable_parameters(nn.ModuleDict({"model": model}) if own == "wrapped" else model)
    reference = tap.Reference.from_checkpoint(tmp_path, params)
    assert_equal(reference, params, weights_of(prunable_parameters(source)))


def test_conv1d_is_stored_as_it_is_in_the_model(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    source = transformers.GPT2LMHeadModel(config)
    source.save_pretrained(tmp_path)
    params = prunable_parameters(transformers.GPT2Model(config))
    reference = tap.Reference.from_checkpoint(tmp_path, params)
    assert_equal(reference, params, weights_of(prunable_parameters(source)))


@pytest.mark.parametrize("stored", ["base", "task"])
@pytest.mark.parametrize("own", ["base", "task"])
def test_models_whose_names_are_not_those_of_their_checkpoints(
    own: str, stored: str, tmp_path: Path
) -> None:
    kinds = {"base": transformers.ViTModel, "task": transformers.ViTForImageClassification}
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    source = kinds[stored](config)
    source.save_pretrained(tmp_path)
    theirs = prunable_parameters(source, exclude="pooler" if stored == "base" else None)
    params = prunable_parameters(kinds[own](config))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert not set(params.names) <= set(file.keys())
    reference = tap.Reference.from_checkpoint(tmp_path, params)
    assert_equal(reference, params, weights_of(theirs))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"does not fit 12 of 13 parameters"):
        tap.Reference.from_checkpoint(tmp_path, params)


@pytest.mark.parametrize("method", [prune.L1Unstructured, tap.Magnitude])
def test_the_checkpoint_of_a_pruned_model(method: Any, tmp_path: Path) -> None:
    model = mlp()
    params = prunable_parameters(model)
    before = [weight.clone() for weight in weights_of(params)]
    prune.global_unstructured(params, pruning_method=method, amount=0.5)
    path = tmp_path / "pruned.safetensors"
    save_file(model.state_dict(), path)
    own = prunable_parameters(mlp())
    assert_equal(tap.Reference.from_checkpoint(path, own), own, before)
    assert_equal(tap.Reference.from_checkpoint(path, params), params, before)


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    source = transformers.BertModel(transformers.BertConfig(**(CONFIG | {"intermediate_size": 24})))
    state = source.state_dict()
    del state["encoder.layer.1.attention.self.query.weight"]
    folder = shard(tmp_path / "model", [state])
    params = prunable_parameters(transformers.BertModel(transformers.BertConfig(**CONFIG)))
    with pytest.raises(ValueError) as caught:
        tap.Reference.from_checkpoint(folder, params)
    first, *rest = str(caught.value).splitlines()
    assert first == f"{folder} does not fit 5 of 12 parameters:"
    assert (
        "  encoder.layer.0.intermediate.dense.weight: should have shape (32, 16), got (24, 16)"
        in rest
    )
    missing = "  encoder.layer.1.attention.self.query.weight: missing"
    assert sum(line.startswith(missing) for line in rest) == 1


def test_names_may_be_given(tmp_path: Path) -> None:
    save_file({"theirs.w": torch.ones(8, 16)}, tmp_path / "x.safetensors")
    pairs = [(mlp()[2], "weight")]
    named = PrunableParameters(pairs, ["theirs.w"], {})
    reference = tap.Reference.from_checkpoint(tmp_path / "x.safetensors", named)
    assert_equal(reference, pairs, [torch.ones(8, 16)])
    with pytest.raises(TypeError, match="the tensors of a file are found by name"):
        tap.Reference.from_checkpoint(tmp_path / "x.safetensors", pairs)  # type: ignore[arg-type]


MEMORY = """
import sys
import torch, torchalignprune as tap
from torchalignprune.parameters import PrunableParameters

def anonymous():  # bytes of the process's own, without pages of files
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

path, kind = sys.argv[1:]
with torch.device("meta"):
    model = torch.nn.ModuleList(torch.nn.Linear(4096, 1024) for _ in range(12))
params = tap.prunable_parameters(model)
before = anonymous()
if kind == "view":
    reference = tap.Reference.from_checkpoint(path, params)
elif kind == "half":
    reference = tap.Reference.from_checkpoint(path, params).to(dtype=torch.bfloat16)
assert all(float(tensor.float().sum()) == 4096 * 1024 for tensor in reference.values())
print(anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
def test_a_checkpoint_takes_no_memory(tmp_path: Path) -> None:
    size = 12 * 4 * 4096 * 1024
    shard(tmp_path, [{f"{i}.weight": torch.ones(1024, 4096) for i in range(12)}])
    grown = {
        kind: int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, str(tmp_path), kind],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for kind in ("view", "half")
    }
    # Some tensors of 16 MB are there in float32; the copies in bfloat16 are half the size.
    assert grown["view"] < size / 8
    assert size / 2 < grown["half"] < 0.9 * size
