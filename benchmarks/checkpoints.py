"""The size of pruned models on disk, and the time and memory to save and to load them.

    python benchmarks/checkpoints.py
    python benchmarks/checkpoints.py --dtype bfloat16 --folder /mnt/disk

The 84.9 M encoder weights of XLM-R base at 50, 80 and 90%: the bitmask folders of `tap.save_pruned`
against a safetensors file with all weights, as it is and compressed by gzip (and by zstd, if the
package zstandard is installed). Loaded weights are first compared bit by bit. The files stay in the
system's cache, so loading measures the work and not the disk. Memory is the peak on top of the
model, including the pages of mapped files. Writes results/checkpoints[_DTYPE].json.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import torchalignprune as tap
from common import Encoder, median, peak_memory, read_pass, save, seconds, size, start_memory
from torchalignprune import ops

SPARSITIES = (0.5, 0.8, 0.9)


def bytes_in(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def check(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name


class Gzip:
    def __init__(self, level: int) -> None:
        self.level = level

    def pack(self, source: Path, target: Path) -> None:
        with source.open("rb") as plain, gzip.open(target, "wb", compresslevel=self.level) as out:
            shutil.copyfileobj(plain, out, 1 << 22)

    def unpack(self, source: Path, target: Path) -> None:
        with gzip.open(source, "rb") as plain, target.open("wb") as out:
            shutil.copyfileobj(plain, out, 1 << 22)


class Zstd:
    def __init__(self, level: int) -> None:
        import zstandard

        self.packer = zstandard.ZstdCompressor(level=level, threads=torch.get_num_threads())
        self.unpacker = zstandard.ZstdDecompressor()

    def pack(self, source: Path, target: Path) -> None:
        with source.open("rb") as plain, target.open("wb") as out:
            self.packer.copy_stream(plain, out)

    def unpack(self, source: Path, target: Path) -> None:
        with source.open("rb") as plain, target.open("wb") as out:
            self.unpacker.copy_stream(plain, out)


def compressors() -> dict[str, Gzip | Zstd]:
    found: dict[str, Gzip | Zstd] = {"gzip -1": Gzip(1)}
    with contextlib.suppress(ImportError):
        found["zstd -3"] = Zstd(3)
    return found


def measure(sparsity: float, dtype: torch.dtype, folder: Path, runs: int) -> dict[str, Any]:
    model, other = Encoder(dtype=dtype), Encoder(dtype=dtype)
    n = size(model.weights())
    for weight, mask in zip(
        model.weights(), ops.select_global(model.weights(), round(sparsity * n)), strict=True
    ):
        weight.masked_fill_(~mask, 0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values_and_bits = (n - round(sparsity * n)) * dtype.itemsize + n // 8
    results: dict[str, Any] = {"values_and_bits": values_and_bits}

    def record(
        name: str, path: Path, write: Callable[[], Any], read: Callable[[], Any], repeats: int
    ) -> None:
        before = start_memory()
        write()
        save_extra = peak_memory() - before
        with torch.no_grad():
            for weight in other.weights():
                weight.fill_(1)
        before = start_memory()
        read()
        load_extra = peak_memory() - before
        check(other, state)
        results[name] = {
            "bytes": bytes_in(path),
            "save_extra": save_extra,
            "load_extra": load_extra,
            "save_s": seconds(write, repeats),
            "load_s": seconds(read, repeats),
        }

    dense, small = folder / "dense.safetensors", folder / "small"
    record(
        "safetensors",
        dense,
        lambda: save_file(state, dense),
        lambda: other.load_state_dict(load_file(dense)),
        runs,
    )
    record(
        "bitmask",
        small,
        lambda: tap.save_pruned(model, small, "bitmask"),
        lambda: tap.load_pruned(other, small),
        runs,
    )
    results["bitmask"]["load_unverified_s"] = seconds(
        lambda: tap.load_pruned(other, small, verify=False), runs
    )
    target, again = folder / "packed", folder / "again.safetensors"
    for name, peer in compressors().items():

        def load(peer: Gzip | Zstd = peer) -> None:
            peer.unpack(target, again)
            other.load_state_dict(load_file(again))

        record(
            f"safetensors, {name}",
            target,
            lambda peer=peer: peer.pack(dense, target),
            load,
            1,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    weights = Encoder(dtype=dtype).weights()
    n, floor = size(weights), median(read_pass(weights))
    del weights
    print(f"{n / 1e6:.1f} M {options.dtype} weights; one read pass: {floor:.4f} s")
    found = {}
    for sparsity in SPARSITIES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found[str(sparsity)] = results = measure(sparsity, dtype, Path(folder), options.runs)
        smallest = results["values_and_bits"]
        print(f"{sparsity:.0%} sparse: values and bits {smallest / 1e6:.1f} MB")
        for name, result in results.items():
            if name == "values_and_bits":
                continue
            result["of_values_and_bits"] = result["bytes"] / smallest
            unverified = result.get("load_unverified_s")
            memory = [result[key] / 1e6 for key in ("save_extra", "load_extra")]
            print(
                f"  {name:22} {result['bytes'] / 1e6:8.1f} MB {result['of_values_and_bits']:7.4f} x"
                f"  save {median(result['save_s']):7.3f} s  load {median(result['load_s']):7.3f} s"
                f"  memory {memory[0]:4.0f} and {memory[1]:4.0f} MB"
            )
            if unverified:
                print(f"{'':26}load without verification {median(unverified):.3f} s")
    suffix = "" if options.dtype == "float32" else f"_{options.dtype}"
    save(f"checkpoints{suffix}", {"weights": n, "read_pass_s": floor, "sparsities": found})


if __name__ == "__main__":
    main()
