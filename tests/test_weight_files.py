"""Weights in safetensors files: views without a copy, names with and without a prefix."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchalignprune.weight_files import WeightFiles, find_weights, plain_names, write_tensors

INDEX = "model.safetensors.index.json"


def shard(folder: Path, parts: list[dict[str, Tensor]]) -> Path:
    """A checkpoint folder with one file for each part."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def sparse_file(path: Path, size: int) -> Path:
    """A file with ``zeros`` of `size` bytes, of which the disk stores next to nothing."""
    header = json.dumps(
        {
            "zeros": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
            "last": {"dtype": "BF16", "shape": [2], "data_offsets": [size, size + 4]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size + 4)
        file.seek(-4, os.SEEK_END)
        file.write(b"\x80\x3f\x00\x40")
    return path


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
)
def test_tensors_are_those_in_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.tensor(1).to(dtype)}
    tensors["none"] = torch.empty(0, 3, dtype=dtype)
    save_file(tensors, path, metadata={"key": "value"})
    files = WeightFiles(path)
    assert set(files) == set(tensors) and len(files) == 3 and "a" in files and "c" not in files
    assert files.metadata == {"key": "value"}
    for name, tensor in tensors.items():
        assert files.shape(name) == tuple(tensor.shape) and files.dtype(name) == dtype
        torch.testing.assert_close(files[name], tensor, rtol=0, atol=0)
    with pytest.raises(KeyError):
        files["c"]


def test_shards_and_paths(tmp_path: Path) -> None:
    folder = shard(tmp_path / "model", [{"a": torch.ones(2)}, {"b": torch.zeros(2)}])
    for path in (folder, str(folder), folder / INDEX):
        files = WeightFiles(path)
        assert set(files) == {"a", "b"} and torch.equal(files["a"], torch.ones(2))
    assert set(WeightFiles(folder / "model-00002-of-00002.safetensors")) == {"b"}


def test_early_versions_did_not_align_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * ((1 - len(header)) % 4)
    assert (8 + len(header)) % 4 == 1
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2))
    tensor = WeightFiles(path)["a"]
    assert tensor.tolist() == [1.5, -2] and tensor.data_ptr() % 4 == 0


def test_writing_to_a_tensor_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    WeightFiles(path)["a"].fill_(1)
    assert torch.equal(WeightFiles(path)["a"], torch.zeros(4))


def test_a_file_that_is_replaced_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(4)}, {})
    tensor = WeightFiles(path)["a"]
    write_tensors(path, {"a": torch.ones(4)}, {})
    assert torch.equal(tensor, torch.zeros(4))
    assert torch.equal(WeightFiles(path)["a"], torch.ones(4))


def test_one_file_is_not_read_by_the_header_of_another(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.full((4,), 5.0), "b": torch.ones(4)}, {})
    files = WeightFiles(path)
    assert torch.equal(files["b"], torch.ones(4))
    write_tensors(path, {"b": torch.ones(4), "c": torch.full((4,), 5.0)}, {})
    with pytest.raises(ValueError, match=r"x\.safetensors has been replaced or changed"):
        files["b"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps")
def test_a_file_is_mapped_while_it_is_in_use(tmp_path: Path) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    files = WeightFiles(path)
    assert mappings() == 0
    a, b = files["a"], files["b"]
    assert mappings() == 1
    del a
    assert mappings() == 1 and b.sum() == 4
    del b
    assert mappings() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="os.sysconf")
def test_files_larger_than_the_memory(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files = WeightFiles(sparse_file(tmp_path / "x.safetensors", 4 * memory))
    assert files["last"].tolist() == [1.0, 2.0]
    assert files["zeros"][-3:].tolist() == [0, 0, 0]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            WeightFiles(path)

    refused(tmp_path / "none", "none does not exist")
    refused(tmp_path, r"has neither model\.safetensors nor model\.safetensors\.index\.json")
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, r"x\.safetensors cannot be read: .*")
    path.write_bytes(b"nonsense")
    refused(path, "cannot be read")
    index = tmp_path / INDEX
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        refused(tmp_path, "is not the index of a checkpoint")
    for shard in ("3", '["x"]', '"/a.safetensors"', '"../a.safetensors"', '"x/../../a"'):
        index.write_text(f'{{"weight_map": {{"a": {shard}, "b": "b.safetensors"}}}}')
        refused(tmp_path, "is not the index of a checkpoint: the file of a should be in its folder")
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    refused(tmp_path, r"gone\.safetensors cannot be read")


def test_an_index_says_which_file_a_tensor_is_in(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.ones(1)}, tmp_path / "2.safetensors")
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    files = WeightFiles(tmp_path)
    assert files["a"].tolist() == [1, 1] and files.file("b").name == "2.safetensors"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map | {"c": "1.safetensors"}}))
    with pytest.raises(ValueError, match=r"1\.safetensors should have c according to the index of"):
        WeightFiles(tmp_path)


def test_writing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(6.0).reshape(2, 3).t()}, {"key": "value"})
    assert torch.equal(load_file(path)["a"], torch.arange(6.0).reshape(2, 3).t())
    assert WeightFiles(path).metadata == {"key": "value"}
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(IsADirectoryError):
        write_tensors(tmp_path, {"a": torch.zeros(1)}, {})
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "none" / "x", {"a": torch.zeros(1)}, {})


def test_a_write_that_fails_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(4)}, {})
    before = path.read_bytes()

    def fail(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"a": torch.ones(4)}, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


ENCODER = ["encoder.layer.0.w", "encoder.layer.1.w"]
CASES = {
    "the same names": (ENCODER, [*ENCODER, "pooler.w"], ENCODER),
    "a task model's": (ENCODER, ["bert.encoder.layer.0.w", "bert.encoder.layer.1.w", "cls.w"], 0),
    "a base model's": (["bert.encoder.layer.0.w", "bert.encoder.layer.1.w"], ENCODER, ENCODER),
    "for a wrapper": (["module.bert.a.w", "module.bert.b.w"], ["a.w", "b.w"], ["a.w", "b.w"]),
    "a wrapper's": (["a.w", "b.w"], ["0.auto_model.a.w", "0.auto_model.b.w"], 0),
    "the same names first": (["a.w"], ["a.w", "x.a.w"], ["a.w"]),
    "of a pruned model": (["a.w"], ["x.a.w_orig", "x.a.w_mask"], ["x.a.w_orig"]),
    "not of a pruned model": (["a.w_orig"], ["a.w_orig"], ["a.w_orig"]),
    "one module": (["w"], ["0.w", "0.b"], ["0.w"]),
    "replaced": (["x.l.0.w", "x.l.1.w"], ["y.z.l.0.w", "y.z.l.1.w", "y.l.0.w"], 0),
    "taken off before replaced": (["x.l.0.w"], ["y.l.0.w", "l.0.w"], ["l.0.w"]),
    "most fit": (["a.w", "b.w", "b.v"], ["x.a.w", "x.b.w", "x.b.v", "y.b.v"], 0),
}


@pytest.mark.parametrize("case", CASES)
def test_names(case: str, tmp_path: Path) -> None:
    names, stored, expected = CASES[case]
    save_file({name: torch.zeros(2) for name in stored}, tmp_path / "x.safetensors")
    files = WeightFiles(tmp_path / "x.safetensors")
    found = find_weights(files, [[name] for name in names], [(2,)] * len(names), plain_names(files))
    assert found == (expected or stored[: len(names)])


def test_tied_parameters_may_be_stored_under_any_name(tmp_path: Path) -> None:
    save_file({"x.b.w": torch.zeros(2), "x.c.w": torch.ones(2)}, tmp_path / "x.safetensors")
    files = WeightFiles(tmp_path / "x.safetensors")
    found = find_weights(files, [["a.w", "b.w"], ["c.w"]], [(2,), (2,)], plain_names(files))
    assert found == ["x.b.w", "x.c.w"]


def test_every_parameter_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"bert.a.w": torch.zeros(2), "bert.b.w": torch.zeros(3), "bert.cc.w": torch.zeros(2)}
    save_file(tensors | {"bert.d.w": torch.zeros(2, dtype=torch.int8)}, path)
    files = WeightFiles(path)
    names = [["a.w"], ["b.w"], ["c.w"], ["d.w"]]
    with pytest.raises(ValueError) as caught:
        find_weights(files, names, [(2,)] * 4, plain_names(files))
    assert str(caught.value).splitlines() == [
        f"{path} does not fit 3 of 4 parameters:",
        "  b.w: should have shape (2,), got (3,)",
        "  c.w: missing; near: bert.cc.w",
        "  d.w: should be floating-point weights, got int8",
    ]


def test_an_ambiguous_prefix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"encoder.a.w": torch.zeros(2), "decoder.a.w": torch.ones(2)}, path)
    files = WeightFiles(path)
    message = "a.w could be any of these in .*: decoder.a.w, encoder.a.w"
    with pytest.raises(ValueError, match=message):
        find_weights(files, [["a.w"]], [(2,)], plain_names(files))


def test_another_weight_of_the_same_last_name_is_no_partner(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    stored = ("pooler.dense.weight", "layer.1.dense.weight")
    save_file({name: torch.zeros(2) for name in stored}, path)
    files = WeightFiles(path)
    for name in ("layer.0.dense.weight", "other.dense.weight"):
        with pytest.raises(ValueError, match=f"{re.escape(name)}: missing"):
            find_weights(files, [[name]], [(2,)], plain_names(files))


def test_safetensors_is_named_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(4)}, {})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: WeightFiles(path), lambda: write_tensors(path, {}, {})):
        with pytest.raises(ImportError, match=r"torchalignprune\[transformers\]"):
            call()
