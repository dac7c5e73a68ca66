"""Whole models in folders: every bit comes back, and what was altered is refused."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import torchalignprune as tap
from models import Record, Tied, holder, mixed, mlp, pairs
from strategies import ODD, masks, shapes, tensors
from torchalignprune import checkpoints
from torchalignprune.hooks import put_masks
from torchalignprune.pruned_files import INDEX, PrunedFiles, _index_digest, parse_size

FORMATS = ["dense", "bitmask"]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Everything(nn.Module):
    """Parameters and buffers of every kind."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.linear = nn.Linear(24, 40)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm1d(5)
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(random(6, 8).t())
        self.to(dtype)
        self.register_buffer("flags", torch.rand(3, 5, generator=generator) > 0.5)
        self.register_buffer("indices", torch.arange(7))
        self.register_buffer("halves", random(4).half())
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        with torch.no_grad():
            self.linear.weight.copy_(random(40, 24))


def state_bits(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(BITS[tensor.itemsize]).tolist())
        for name, tensor in model.state_dict().items()
    }


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = state_bits(one), state_bits(other)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


def prunable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (module, name)
        for module in model.modules()
        for name in ("weight", "bias", "scalar", "nothing", "turned")
        if name in module._parameters and not isinstance(module, nn.BatchNorm1d)
    ]


def random_masks(model: nn.Module) -> None:
    put_masks(
        (module, name, torch.rand(getattr(module, name).shape) < 0.4)
        for module, name in prunable(model)
    )


def zero_below(model: nn.Module) -> None:
    """As the Pruner does: the stored weights are zero where they are pruned."""
    random_masks(model)
    with torch.no_grad():
        for module in model.modules():
            for name in list(module._buffers):
                if name.endswith("_mask"):
                    stored = getattr(module, name.replace("_mask", "_orig"))
                    stored.masked_fill_(~getattr(module, name), 0)


def finished(model: nn.Module) -> None:
    random_masks(model)
    for module in model.modules():
        for name in [b.removesuffix("_mask") for b in module._buffers if b.endswith("_mask")]:
            prune.remove(module, name)


def finished_without_signs(model: nn.Module) -> None:
    zero_below(model)
    for module in model.modules():
        for name in [b.removesuffix("_mask") for b in module._buffers if b.endswith("_mask")]:
            prune.remove(module, name)


def untouched(model: nn.Module) -> None:
    pass


STATES = [untouched, random_masks, zero_below, finished, finished_without_signs]


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("prepared", STATES)
def test_everything_comes_back(
    prepared: Callable[[nn.Module], None], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = Everything(dtype)
    prepared(model)
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    fresh = Everything(dtype)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(7)
    parameters = dict.fromkeys(fresh.parameters())
    strides = fresh.conv.weight.stride()
    assert tap.load_pruned(fresh, tmp_path / "x") is fresh
    assert_same(model, fresh)
    assert dict.fromkeys(fresh.parameters()).keys() == parameters.keys()
    assert tap.parameters.stored(fresh.conv, "weight").stride() == strides
    for name, module in model.named_modules():
        twin = fresh.get_submodule(name)
        for (own, _), there in zip(prunable(module), prunable(twin), strict=True):
            assert own is not there
        if isinstance(module, nn.Linear):
            shown = (module.weight, twin.weight)
            assert torch.equal(*shown)
    # Into a model that is pruned otherwise, too.
    other = Everything(dtype)
    random_masks(other)
    tap.load_pruned(other, tmp_path / "x", verify=False)
    assert_same(model, other)
    assert torch.equal(
        other.linear(torch.ones(24).to(dtype)), model.linear(torch.ones(24).to(dtype))
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_tensors_come_back(dtype: torch.dtype, tmp_path: Path, data: st.DataObject) -> None:
    weights, wanted = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(shapes())
        weights.append(data.draw(tensors(shape, dtype, values=(*ODD, float("nan")))).clone())
        wanted.append(data.draw(st.none() | masks(shape)))
    model = holder(*weights)
    put_masks(
        (model, f"weight{i}", mask.clone()) for i, mask in enumerate(wanted) if mask is not None
    )
    tap.save_pruned(model, tmp_path / "x", "bitmask", max_shard_size=data.draw(st.integers(1, 200)))
    fresh = holder(*(torch.zeros_like(weight) for weight in weights))
    assert_same(tap.load_pruned(fresh, tmp_path / "x"), model)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_a_dense_folder_has_the_masked_weights(
    dtype: torch.dtype, tmp_path: Path, data: st.DataObject
) -> None:
    shape = data.draw(shapes())
    weight, mask = data.draw(tensors(shape, dtype)).clone(), data.draw(masks(shape)).clone()
    model = holder(weight, torch.ones(2))
    put_masks([(model, "weight0", mask)])
    tap.save_pruned(model, tmp_path / "x")
    stored = load_file(tmp_path / "x" / "model.safetensors")
    assert set(stored) == {"weight0", "weight1"}
    expected = torch.where(mask, weight, torch.zeros_like(weight))
    assert torch.equal(stored["weight0"].signbit(), expected.signbit())
    fresh = tap.load_pruned(holder(torch.zeros_like(weight), torch.zeros(2)), tmp_path / "x")
    assert torch.equal(fresh.weight0, expected) and not hasattr(fresh, "weight0_mask")
    # In a model that has masks they are gone.
    assert_same(tap.load_pruned(model, tmp_path / "x"), fresh)


@pytest.mark.parametrize("format", FORMATS)
def test_saving_leaves_the_model(format: Any, tmp_path: Path) -> None:
    model = mixed()
    tap.global_unstructured(pairs(model), tap.AlignedMagnitude, amount=0.5)
    record = Record(model)
    tap.save_pruned(model, tmp_path / "x", format)
    record.assert_untouched()


def test_a_model_in_the_middle_of_training(tmp_path: Path) -> None:
    schedule = tap.schedules.cubic(0.0, 0.8, begin=0, end=6, every=2)

    def start() -> tuple[nn.Module, torch.optim.Optimizer, tap.Pruner]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        return model, optimizer, tap.Pruner(pairs(model), tap.AlignedMagnitude, schedule)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: tap.Pruner) -> None:
        for _ in range(4):
            model(torch.ones(3, 12)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()

    model, optimizer, pruner = run = start()
    train(*run)
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    entries = PrunedFiles(tmp_path / "x")._entries
    for name in ("0.weight", "2.weight"):  # the weights beneath the masks take no room
        assert entries[f"{name}_orig"].kind == "bitmask" and not entries[f"{name}_orig"].signs
        assert entries[f"{name}_mask"].kind == "mask_of"
    again = start()
    tap.load_pruned(again[0], tmp_path / "x")
    assert_same(again[0], model)
    again[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again[2].load_state_dict(pruner.state_dict())
    for either in (run, again):
        train(*either)
        either[2].finalize()
    assert_same(again[0], model)
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    assert_same(tap.load_pruned(mlp(), tmp_path / "x"), model)


def test_torchs_own_masks(tmp_path: Path) -> None:
    model = mlp()
    for _ in range(2):  # a container of two methods
        prune.global_unstructured(pairs(model), pruning_method=prune.L1Unstructured, amount=0.25)
    assert model[0].weight_mask.dtype == torch.float32
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    fresh = tap.load_pruned(mlp(), tmp_path / "x")
    assert fresh[0].weight_mask.dtype == torch.bool
    assert torch.equal(fresh[0].weight_mask, model[0].weight_mask != 0)
    assert torch.equal(fresh[0].weight, model[0].weight)
    assert torch.equal(fresh[0].weight_orig, model[0].weight_orig)
    # Theirs are replaced.
    tap.load_pruned(model, tmp_path / "x")
    assert_same(model, fresh)
    model[0].weight_mask = model[0].weight_mask * 0.5
    with pytest.raises(ValueError, match=r"mask of 0\.weight should have no numbers but 0 and 1"):
        tap.save_pruned(model, tmp_path / "x", "bitmask")
    assert_same(tap.load_pruned(mlp(), tmp_path / "x"), fresh)


@pytest.mark.parametrize(
    ("dtype", "sparsity"),
    [
        (torch.float32, 0.5),
        (torch.float32, 0.9),
        (torch.bfloat16, 0.8),
        (torch.float16, 0.5),
        (torch.float64, 0.9),
    ],
)
@pytest.mark.parametrize("finish", [False, True])
def test_the_size(finish: bool, dtype: torch.dtype, sparsity: float, tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(4)]).to(dtype)
    params = tap.prunable_parameters(model)
    tap.global_unstructured(params, tap.Magnitude, amount=sparsity)
    with torch.no_grad():
        for module, _ in params:
            module.weight_orig.masked_fill_(~module.weight_mask, 0)
    if finish:
        for pair in params:
            prune.remove(*pair)
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    n = 4 * 512 * 512
    values_and_bits = round((1 - sparsity) * n) * dtype.itemsize + n // 8
    assert values_and_bits < size_of(tmp_path / "x") <= 1.02 * values_and_bits


def test_dense_tensors_stay_dense(tmp_path: Path) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    stored = load_file(tmp_path / "x" / "pruned.safetensors")
    assert set(stored) == set(model.state_dict())


# Tied weights


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("pruned", [False, True])
def test_tied_weights(pruned: bool, format: Any, tmp_path: Path) -> None:
    model = Tied()
    if pruned:
        tap.global_unstructured(tap.prunable_parameters(model), tap.Magnitude, amount=0.5)
    tap.save_pruned(model, tmp_path / "x", format)
    files = PrunedFiles(tmp_path / "x")
    assert sum("weight" in name for name in files.tied) == (
        2 if pruned and format == "bitmask" else 1
    )
    apart = Tied()
    apart.b.weight = nn.Parameter(torch.zeros(12, 12))
    for fresh in (Tied(), apart):
        tap.load_pruned(fresh, tmp_path / "x")
        name = "weight_orig" if pruned and format == "bitmask" else "weight"
        assert getattr(fresh.a, name) is getattr(fresh.b, name)
        assert torch.equal(fresh.a.weight, model.a.weight)
        assert torch.equal(fresh(torch.ones(12)), model(torch.ones(12)))
        if pruned and format == "bitmask":
            assert fresh.a.weight_mask is fresh.b.weight_mask


class SharedBuffer(nn.Module):
    """Two modules with one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        shared = torch.zeros(4)
        self.a.register_buffer("shared", shared)
        self.b.register_buffer("shared", shared)


@pytest.mark.parametrize("format", FORMATS)
def test_a_shared_buffer(format: Any, tmp_path: Path) -> None:
    model = SharedBuffer()
    model.a.shared.fill_(3)
    tap.save_pruned(model, tmp_path / "x", format)
    assert PrunedFiles(tmp_path / "x").tied == {"b.shared": "a.shared"}
    assert_same(tap.load_pruned(SharedBuffer(), tmp_path / "x"), model)
    apart = SharedBuffer().double().float()
    assert apart.a.shared is not apart.b.shared
    assert_same(tap.load_pruned(apart, tmp_path / "x"), model)


def test_copies_of_the_mask_of_tied_weights(tmp_path: Path) -> None:
    model = Tied()
    tap.global_unstructured(tap.prunable_parameters(model), tap.Magnitude, amount=0.5)
    model.b.weight_mask = model.b.weight_mask.clone()  # as moving to another device does
    for format in ("dense", "bitmask"):
        tap.save_pruned(model, tmp_path / format, format)
        fresh = tap.load_pruned(Tied(), tmp_path / format)
        assert torch.equal(fresh(torch.ones(12)), model(torch.ones(12)))
    assert len(PrunedFiles(tmp_path / "bitmask").tied) == 2


@pytest.mark.parametrize("which", ["one", "different"])
def test_tied_weights_with_different_masks(which: str, tmp_path: Path) -> None:
    model = Tied()
    put_masks([(model.a, "weight", torch.rand(12, 12) < 0.5)])
    if which == "different":
        put_masks([(model.b, "weight", torch.rand(12, 12) < 0.5)])
    assert model.a.weight_orig is tap.parameters.stored(model.b, "weight")
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    fresh = tap.load_pruned(Tied(), tmp_path / "x")
    assert_same(fresh, model)
    assert fresh.a.weight_orig is tap.parameters.stored(fresh.b, "weight")
    x = torch.randn(12)
    assert torch.equal(fresh(x), model(x)) and torch.equal(fresh.b(x), model.b(x))
    with pytest.raises(ValueError, match=r"a\.weight and b\.weight are tied but have different"):
        tap.save_pruned(model, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_what_is_tied_in_the_model_alone_is_refused(tmp_path: Path) -> None:
    model = Tied()
    model.b.weight = nn.Parameter(torch.zeros(12, 12))
    tap.save_pruned(model, tmp_path / "x")
    fresh = Tied()
    record = Record(fresh)
    with pytest.raises(ValueError, match=r"b\.weight: tied to a\.weight in the model, but not in"):
        tap.load_pruned(fresh, tmp_path / "x")
    record.assert_untouched()


def test_views_of_one_memory(tmp_path: Path) -> None:
    model = nn.Module()
    whole = torch.randn(6, 4)
    model.register_buffer("whole", whole)
    model.register_buffer("part", whole[2:4])
    model.register_parameter("column", nn.Parameter(whole[:, 1]))
    for format in FORMATS:
        tap.save_pruned(model, tmp_path / format, format)
        fresh = copy.deepcopy(model)
        for tensor in fresh.state_dict().values():
            tensor.zero_()
        assert_same(tap.load_pruned(fresh, tmp_path / format), model)


# Files


@functools.cache
def small() -> nn.Module:
    """Every kind of entry, in few bytes."""
    model = nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 3), nn.Linear(16, 16))
    put_masks([(model[0], "weight", torch.rand(3, 7) < 0.5)])  # stored beneath the mask
    put_masks([(model[1], "weight", torch.rand(3, 3) < 0.5)])
    with torch.no_grad():
        model[1].weight_orig.mul_(model[1].weight_mask)  # zeros of both signs
        model[2].weight[3:] = 0  # a bitmask without a mask
    model[2].weight.data = model[2].weight.data.double()
    return model


def blank() -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 3), nn.Linear(16, 16))
    model[2].weight.data = model[2].weight.data.double()
    return model


def load_or_refuse(folder: Path, expected: dict[str, Any]) -> bool:
    """Whether it is refused; what is not has to be the same model."""
    try:
        model = tap.load_pruned(blank(), folder)
    except ValueError:
        return True
    assert state_bits(model) == expected
    return False


@pytest.mark.parametrize("format", FORMATS)
def test_any_altered_byte_is_noticed(format: Any, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    tap.save_pruned(small(), folder, format)
    kinds = {entry.kind for entry in PrunedFiles(folder)._entries.values()}
    assert kinds == ({"dense", "bits", "bitmask", "mask_of"} if format == "bitmask" else {"dense"})
    expected = state_bits(tap.load_pruned(blank(), folder))
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        accepted = []
        for place in range(0, len(content), 1 if file.name == "pruned.safetensors" else 7):
            altered = bytearray(content)
            altered[place] ^= 1 << place % 8
            file.write_bytes(altered)
            if not load_or_refuse(folder, expected):
                accepted.append(place)
        file.write_bytes(content)
        # Nobody reads the few words about itself that a safetensors file begins with.
        end = content.find(b"}") if file.suffix == ".safetensors" else 0
        assert accepted == [place for place in accepted if place < end]


@pytest.mark.parametrize("format", FORMATS)
def test_any_truncated_file_is_noticed(format: Any, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    tap.save_pruned(small(), folder, format)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for length in {
            *range(0, len(content) - 1, 13),
            *range(len(content) - 10, len(content) - 1),
        }:
            file.write_bytes(content[:length])
            assert load_or_refuse(folder, {}), (file.name, length)
        file.write_bytes(content + b"x")
        assert load_or_refuse(folder, {})
        file.unlink()
        assert load_or_refuse(folder, {})
        file.write_bytes(content)
    assert not load_or_refuse(folder, state_bits(tap.load_pruned(blank(), folder)))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another index, with the digest that goes with it."""
    index = json.loads((folder / INDEX).read_text())
    del index["sha256"]
    change(index)
    (folder / INDEX).write_text(json.dumps(index | {"sha256": _index_digest(index)}))


def alter_value(folder: Path) -> None:
    file = folder / "pruned.safetensors"
    parts = load_file(file)
    parts["1.weight_orig.values"][0] += 1
    save_file(parts, file)


def alter_bits(folder: Path) -> None:
    file = folder / "pruned.safetensors"
    parts = load_file(file)
    parts["2.weight.bits"][0] ^= 1
    save_file(parts, file)


def alter_signs(folder: Path) -> None:
    file = folder / "pruned.safetensors"
    parts = load_file(file)
    parts["1.weight_orig.signs"][-1] ^= 0b10000000
    save_file(parts, file)


def drop_part(folder: Path) -> None:
    file = folder / "pruned.safetensors"
    parts = load_file(file)
    del parts["2.bias"]
    save_file(parts, file)


def add_part(folder: Path) -> None:
    file = folder / "pruned.safetensors"
    save_file(load_file(file) | {"more": torch.ones(1)}, file)


def change_dtype(folder: Path) -> None:
    file = folder / "pruned.safetensors"
    parts = load_file(file)
    save_file(parts | {"2.bias": parts["2.bias"].half()}, file)


def change_shape(folder: Path) -> None:
    file = folder / "pruned.safetensors"
    parts = load_file(file)
    save_file(parts | {"2.bias": parts["2.bias"].reshape(4, 4)}, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (alter_value, r"1\.weight_orig\.values in .*pruned\.safetensors was altered: its SHA-256"),
        (alter_bits, r"2\.weight\.bits in .* was altered"),
        (drop_part, r"pruned\.safetensors should have 2\.bias according to the index"),
        (add_part, r"more in .*pruned\.safetensors is not in pruned\.index\.json"),
        (change_dtype, r"2\.bias in .* should be F32 of shape \(16,\), as in .*, got F16 of"),
        (change_shape, r"2\.bias in .* should be F32 of shape \(16,\), as in .*, got .* \(4, 4\)"),
        (lambda folder: (folder / "pruned.safetensors").unlink(), "pruned.safetensors cannot be r"),
        (lambda folder: (folder / INDEX).unlink(), r"was not written by save_pruned: it has no"),
        (lambda folder: (folder / INDEX).write_text("{"), "index.json cannot be read: "),
        (lambda folder: (folder / INDEX).write_text("[]"), "is not an index that save_pruned"),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff"), "index.json cannot be read: "),
        (
            lambda folder: rewrite(folder, lambda index: index["metadata"].update(version=2)),
            "should have format version 1, got 2: it needs another version",
        ),
        (
            lambda folder: rewrite(folder, lambda index: index["metadata"].update(format="x")),
            "is not an index that save_pruned wrote",
        ),
        (
            lambda folder: rewrite(folder, lambda index: index.pop("tensors")),
            "index.json is damaged: KeyError",
        ),
        (
            lambda folder: rewrite(
                folder, lambda index: index["tensors"]["2.bias"].update(kind="zip")
            ),
            "index.json is damaged: .*unknown kind 'zip'",
        ),
        (
            lambda folder: rewrite(
                folder, lambda index: index["weight_map"].update({"2.bias": "../x.safetensors"})
            ),
            "is damaged: .*'../x.safetensors' is not a file name",
        ),
        (
            lambda folder: rewrite(folder, lambda index: index["tensors"].pop("1.weight_orig")),
            "is damaged|is not in pruned.index.json",
        ),
    ],
)
def test_what_is_damaged_is_named(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    tap.save_pruned(small(), tmp_path / "x", "bitmask")
    spoil(tmp_path / "x")
    model = blank()
    random_masks(model)
    record = Record(model)
    with pytest.raises(ValueError, match=message):
        tap.load_pruned(model, tmp_path / "x")
    record.assert_untouched()


def test_without_verification_the_bits_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    tap.save_pruned(small(), folder, "bitmask")
    alter_bits(folder)
    model = blank()
    record = Record(model)
    message = r"2\.weight in .* is damaged: 48 bits should be set, got (47|49)"
    with pytest.raises(ValueError, match=message):
        tap.load_pruned(model, folder, verify=False)
    record.assert_untouched()
    tap.save_pruned(small(), folder, "bitmask")
    alter_value(folder)
    tap.load_pruned(model, folder, verify=False)  # as its name says


def test_without_verification_the_signs_are_checked_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "x"
    pruned = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 7))
    put_masks([(pruned[1], "weight", torch.arange(21).reshape(7, 3) < 8)])
    with torch.no_grad():
        pruned[1].weight_orig.masked_fill_(~pruned[1].weight_mask, -0.0)
    tap.save_pruned(pruned, folder, "bitmask")
    alter_signs(folder)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 7))
    record = Record(model)
    message = r"1\.weight_orig in .* is damaged: .* past the last of 13"
    with pytest.raises(ValueError, match=message):
        tap.load_pruned(model, folder, verify=False)
    record.assert_untouched()


def test_foreign_folders(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    model = mlp()
    record = Record(model)
    save_file(model.state_dict(), folder / "model.safetensors")
    for path in (folder, tmp_path / "none", folder / "model.safetensors"):
        with pytest.raises(ValueError, match=f"{path} was not written by save_pruned: it has no"):
            tap.load_pruned(model, path)
    with pytest.raises(
        FileExistsError, match="or hold a model that save_pruned wrote, and was not replaced"
    ):
        tap.save_pruned(model, folder)
    with pytest.raises(FileExistsError, match="exists and is not a folder"):
        tap.save_pruned(model, folder / "model.safetensors")
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
    record.assert_untouched()


@pytest.mark.parametrize("format", FORMATS)
def test_models_that_do_not_fit(format: Any, tmp_path: Path) -> None:
    model = mlp()
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.5)
    tap.save_pruned(model, tmp_path / "x", format)

    def refused(other: nn.Module, *lines: str) -> None:
        record = Record(other)
        with pytest.raises(ValueError) as caught:
            tap.load_pruned(other, tmp_path / "x")
        assert str(caught.value).splitlines() == [
            f"{tmp_path / 'x'}, saved from Sequential, does not fit {type(other).__name__}:",
            *(f"  {line}" for line in lines),
        ]
        record.assert_untouched()

    wide = mlp()
    wide[2] = nn.Linear(16, 9)
    shapes = [("2.weight", (9, 16), (8, 16)), ("2.bias", (9,), (8,))]
    refused(wide, *(f"{name}: should have shape {a}, got {b}" for name, a, b in shapes))
    pruned = mlp(torch.bfloat16)
    random_masks(pruned)
    got = "should be torch.bfloat16 as in the model, got torch.float32"
    record = Record(pruned)
    with pytest.raises(ValueError, match=f"0.weight: {got}"):
        tap.load_pruned(pruned, tmp_path / "x")
    record.assert_untouched()
    lines = sorted(f"2.{name}: not in the model" for name in ("weight", "bias"))
    with pytest.raises(ValueError) as caught:
        tap.load_pruned(nn.Sequential(mlp()[0], nn.ReLU()), tmp_path / "x")
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == lines
    longer = mlp().append(nn.Linear(8, 1))
    refused(longer, "3.weight: missing", "3.bias: missing")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    with pytest.raises(
        ValueError, match=r"0\.weight: has no memory in the model, which is on the meta"
    ):
        tap.load_pruned(empty, tmp_path / "x")
    many = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    with pytest.raises(ValueError, match=r"\n  and \d+ more$"):
        tap.load_pruned(many, tmp_path / "x")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_models_that_cannot_be_written_to(format: Any, tmp_path: Path) -> None:
    """What would fail half-way is found before anything changes."""
    model = nn.Linear(2, 2)
    tap.magnitude(model, "weight", amount=0.5)
    tap.save_pruned(model, tmp_path / "x", format)
    expanded = nn.Linear(2, 2)
    expanded.bias = nn.Parameter(torch.ones(1).expand(2))
    for other, message in (
        (
            Transposed(2, 2, bias=False),
            "weight: should be a parameter or buffer, got a tensor that only",
        ),
        (nn.LazyLinear(2), "weight: has no shape in the model yet: run a forward first"),
        (expanded, "bias: is expanded in the model, so its entries share memory"),
    ):
        with pytest.raises(ValueError, match=message):
            tap.load_pruned(other, tmp_path / "x")
        assert set(other._parameters) == {"weight", "bias"} and not other._buffers


@pytest.mark.parametrize("format", FORMATS)
def test_shards(format: Any, tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    tap.global_unstructured(tap.prunable_parameters(model), tap.Magnitude, amount=0.5)
    tap.save_pruned(model, tmp_path / "x", format, max_shard_size="20KB")
    stem = "pruned" if format == "bitmask" else "model"
    shards = sorted((tmp_path / "x").glob("*.safetensors"))
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert len(shards) > 3 and [shard.name for shard in shards] == names
    assert all(shard.stat().st_size < 21_500 for shard in shards)
    fresh = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    tap.load_pruned(fresh, tmp_path / "x")
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(fresh, model, strict=True))
    if format == "dense":
        index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(names)
        assert index["metadata"]["total_size"] == 5 * 65 * 64 * 4
    # One that is missing, two that are exchanged.
    first, second = shards[:2]
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} cannot be read"):
        tap.load_pruned(fresh, tmp_path / "x")
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{first.name} should have .* according to the index of"):
        tap.load_pruned(fresh, tmp_path / "x")


def test_sizes() -> None:
    texts = {"1": 1, "2.5 kb": 2500, "5GB": 5 * 10**9, "1MiB": 2**20, "1TiB": 2**40}
    assert {text: parse_size(text) for text in texts} == texts
    for wrong in ("", "GB", "5XB", "-1", 0, -5, "0MB", True, "1e9"):
        with pytest.raises(ValueError, match="max_shard_size should be a positive number of"):
            parse_size(wrong)


# Folders


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_an_earlier_folder_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "x"
    tap.save_pruned(mlp(), folder, max_shard_size=600)
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "inner").mkdir()
    (folder / "inner" / "notes.txt").write_text("kept")
    (folder / "tokenizer.json").write_text("kept too")
    (folder / "link").symlink_to("tokenizer.json")
    link = tmp_path / "link"
    link.symlink_to(folder)
    model = mlp()
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.5)
    tap.save_pruned(model, link, "bitmask")
    assert link.is_symlink() and (folder / "link").is_symlink()
    names = ["inner/notes.txt", "link", INDEX, "pruned.safetensors", "tokenizer.json"]
    assert list(tree(folder)) == sorted(names)
    assert [path.name for path in folder.parent.iterdir()] == ["x"]
    assert_same(tap.load_pruned(mlp(), folder), model)
    (tmp_path / "empty").mkdir()
    tap.save_pruned(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_a_failure_leaves_the_former_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap.save_pruned(mlp(), tmp_path / "x", "bitmask")
    before = tree(tmp_path)

    def fail(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("torchalignprune.saving.write_index", fail)
    for folder in (tmp_path / "x", tmp_path / "y"):
        with pytest.raises(OSError, match="no space left"):
            tap.save_pruned(mlp(), folder, "bitmask")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("exchange", [True, False])
def test_folders_without_an_exchange(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(checkpoints, "_exchange", lambda one, other: False)
    tap.save_pruned(mlp(), tmp_path / "x")
    tap.save_pruned(mlp(), tmp_path / "x", "bitmask")
    assert sorted(tree(tmp_path)) == [f"x/{INDEX}", "x/pruned.safetensors"]


KILLED = """
import sys, torch, torchalignprune as tap
model = torch.nn.Linear(256, 256)
while True:
    for value in (1.0, 2.0):
        torch.nn.init.constant_(model.weight, value)
        torch.nn.init.constant_(model.bias, value)
        tap.save_pruned(model, sys.argv[1], "bitmask")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="two folders that change places at once")
def test_a_process_that_is_killed_leaves_a_whole_folder(tmp_path: Path) -> None:
    """At any moment: what is there is one of the two models."""
    folder = tmp_path / "x"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    while not folder.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)
    # It is stopped at many moments, and killed at the last of them.
    for i in range(60):
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        model = tap.load_pruned(nn.Linear(256, 256), folder)
        assert float(model.bias.detach()[0]) in (1.0, 2.0)
        assert bool((model.weight == model.bias[0]).all())
        process.send_signal(signal.SIGCONT)
        time.sleep(0.0007 * (i % 7))
    process.kill()
    process.wait()
    process.stdout.close()
    tap.load_pruned(nn.Linear(256, 256), folder)
    tap.save_pruned(nn.Linear(256, 256), folder)


# What can be saved


class Stateful(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}


class Counted(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.tensor([3.0])

    def set_extra_state(self, state: Tensor) -> None: ...


class Transposed(nn.Linear):
    def _save_to_state_dict(self, state: Any, prefix: str, keep_vars: bool) -> None:
        state[f"{prefix}weight"] = self.weight.detach().t().contiguous()


def lazy() -> nn.Module:
    return nn.LazyLinear(3)


def on_meta() -> nn.Module:
    return nn.Linear(2, 2, device="meta")


def sparse() -> nn.Module:
    model = nn.Module()
    model.register_buffer("s", torch.eye(3).to_sparse())
    return model


def complex_numbers() -> nn.Module:
    model = nn.Module()
    model.register_buffer("c", torch.zeros(2, dtype=torch.complex128))
    return model


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: Stateful(2, 2), TypeError, "_extra_state in the model's state should be a tensor"),
        (
            lambda: Counted(2, 2),
            TypeError,
            "_extra_state should be a parameter or buffer, got a tensor",
        ),
        (
            lambda: Transposed(2, 2),
            TypeError,
            "weight should be a parameter or buffer, got a tensor",
        ),
        (lazy, ValueError, "weight has no shape yet: run a forward first"),
        (on_meta, ValueError, "weight should have values, got a tensor on the meta"),
        (sparse, TypeError, "s is a sparse_coo float32 tensor, which safetensors cannot store"),
        (complex_numbers, TypeError, "c is a strided complex128 tensor, which safetensors cannot"),
        (lambda: "model", TypeError, "model should be an nn.Module, got str"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_cannot_be_saved(
    format: Any, made: Callable[[], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        tap.save_pruned(made(), tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []


def test_a_model_made_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = mlp()
        tap.save_pruned(mlp(), tmp_path / "x", "bitmask")
    record = Record(model)
    with pytest.raises(
        ValueError, match=r"0\.weight: was made in inference mode and can only be written"
    ):
        tap.load_pruned(model, tmp_path / "x")
    record.assert_untouched()
    with torch.inference_mode():
        assert_same(tap.load_pruned(model, tmp_path / "x"), mlp())


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_without_weights(format: Any, tmp_path: Path) -> None:
    tap.save_pruned(nn.ReLU(), tmp_path / "x", format)
    tap.load_pruned(nn.ReLU(), tmp_path / "x")
    with pytest.raises(ValueError, match=r"weight: missing\n  bias: missing"):
        tap.load_pruned(nn.Linear(2, 2), tmp_path / "x")


@pytest.mark.parametrize("format", FORMATS)
def test_devices(format: Any, device: str, tmp_path: Path) -> None:
    model = Everything().to(device)
    params = [(model.linear, "weight"), (model.conv, "weight")]
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
    tap.save_pruned(model, tmp_path / "x", format)
    for where in {device, "cpu"}:
        fresh = tap.load_pruned(Everything().to(where), tmp_path / "x")
        assert {tensor.device.type for tensor in fresh.state_dict().values()} == {where}
        assert torch.equal(fresh.linear.weight.to(device), model.linear.weight)
        assert hasattr(fresh.linear, "weight_mask") == (format == "bitmask")


def test_two_tensors_under_one_name(tmp_path: Path) -> None:
    class Colliding(nn.Linear):
        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            state = super().state_dict(*arguments, **options)
            state["weight.bits"] = state.pop("bias")
            return state

    model = Colliding(64, 64)
    nn.init.zeros_(model.weight)
    with pytest.raises(
        ValueError, match=r"two tensors of the model would be stored as weight\.bits"
    ):
        tap.save_pruned(model, tmp_path / "x", "bitmask")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    model, other = mlp(), mlp()
    with torch.no_grad():
        other[0].weight.neg_()
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    files = PrunedFiles(tmp_path / "x")
    files.check()
    tap.save_pruned(other, tmp_path / "x", "bitmask")
    assert torch.equal(files["0.weight"], model[0].weight)
    late = PrunedFiles(tmp_path / "x")
    tap.save_pruned(model, tmp_path / "x", "bitmask")
    with pytest.raises(ValueError, match=r"pruned\.safetensors has been replaced or changed"):
        late["0.weight"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='format should be "dense" or "bitmask", got \'zip\''):
        tap.save_pruned(mlp(), tmp_path / "x", "zip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_shard_size should be a positive number of bytes"):
        tap.save_pruned(mlp(), tmp_path / "x", max_shard_size="much")
    assert list(tmp_path.iterdir()) == []
    tap.save_pruned(mlp(), tmp_path / "x")
    for wrong, got in ((nn.Linear, "Linear"), ("bert", "str"), (None, "NoneType"), (len, "len")):
        with pytest.raises(
            TypeError, match=f"should be a module or a transformers class .* got {got}"
        ):
            tap.load_pruned(wrong, tmp_path / "x")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_wrappers_are_looked_through(tmp_path: Path) -> None:
    model = mlp()
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.5)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(model))
        tap.save_pruned(wrapped, tmp_path / "x", "bitmask")  # type: ignore[arg-type]
        fresh = nn.parallel.DistributedDataParallel(mlp())
        assert tap.load_pruned(fresh, tmp_path / "x") is fresh
        assert_same(fresh.module, model)
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = mlp()
        dist.tensor.distribute_module(sharded, mesh)
        with pytest.raises(
            TypeError, match=r"0\.weight should not be sharded, got a DTensor: load the"
        ):
            tap.save_pruned(sharded, tmp_path / "x")
    finally:
        dist.destroy_process_group()
    assert_same(tap.load_pruned(mlp(), tmp_path / "x"), model)


def test_safetensors_is_named_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tap.save_pruned(mlp(), tmp_path / "x")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (
        lambda: tap.load_pruned(mlp(), tmp_path / "x"),
        lambda: tap.save_pruned(mlp(), tmp_path / "y"),
        lambda: tap.save_pruned(mlp(), tmp_path / "y", "bitmask"),
    ):
        with pytest.raises(ImportError, match=r"torchalignprune\[transformers\]"):
            call()
    shutil.rmtree(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is written: a rename would fail, or take the ground from the process."""
    model = mlp()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is the current folder, which cannot be replaced"):
        tap.save_pruned(model, ".")
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    with pytest.raises(ValueError, match="out is a mount point, which cannot be replaced: use a"):
        tap.save_pruned(model, out)
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())
