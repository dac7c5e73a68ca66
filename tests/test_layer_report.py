"""layer_report against the definitions, unit by unit."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import torchalignprune as tap
from torchalignprune import layer_report as module_under_test
from torchalignprune.layer_report import layer_report
from torchalignprune.parameters import prunable_parameters


def by_definition(p: Tensor, r: Tensor) -> dict[str, float | int | None]:
    """Figures of a matrix outputs x inputs (x kernel)."""
    p, r = p.double(), r.double()
    figures: dict[str, float | int | None] = {
        "entries": p.numel(),
        "zeros": int((p == 0).sum()),
        "sparsity": float((p == 0).double().mean()),
        "distortion": float(((p - r) ** 2).sum() / (r**2).sum()) if r.any() else None,
    }
    for suffix, dim in (("", 0), ("_in", 1)):
        aligned, dead = [], 0
        for i in range(p.shape[dim]):
            own, other = p.select(dim, i).flatten(), r.select(dim, i).flatten()
            if not other.any():
                continue
            dead += not own.any()
            cosine = own @ other / (own.norm() * other.norm()) if own.any() else torch.zeros(())
            aligned.append(float(cosine))
        figures[f"mean_alignment{suffix}"] = sum(aligned) / len(aligned) if aligned else None
        figures[f"worst_alignment{suffix}"] = min(aligned, default=None)
        figures[f"dead_units_{'in' if suffix else 'out'}"] = dead
    return figures


def check(found: dict[str, object], expected: dict[str, float | int | None]) -> None:
    for key, value in expected.items():
        assert found[key] == (value if value is None else pytest.approx(value, abs=1e-12)), key


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(0, 1000), st.booleans())
def test_by_definition(outputs: int, inputs: int, kernel: int, seed: int, other: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (outputs, inputs) if kernel == 0 else (outputs, inputs, kernel)
    module = nn.Linear(1, 1) if kernel == 0 else nn.Conv1d(1, 1, 1)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(outputs, generator=generator) < 0.2] = 0
    module.weight = nn.Parameter(weight)
    mask = torch.rand(shape, generator=generator) < 0.5
    prune.custom_from_mask(module, "weight", mask)
    pair = (module, "weight")
    dense = torch.randn(shape, generator=generator) if other else weight
    report = layer_report([pair], {pair: dense} if other else None)
    check(report[0], by_definition(weight * mask, dense))
    check(report.totals, by_definition(weight * mask, dense))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_parts_make_no_difference(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(9, 5)
    weight = layer.weight.detach().clone()
    tap.global_unstructured([(layer, "weight")], tap.Magnitude, amount=0.6)
    monkeypatch.setattr(module_under_test, "_CHUNK", chunk)
    check(layer_report([(layer, "weight")])[0], by_definition(layer.weight.detach(), weight))


def test_outputs_are_found_in_every_module() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"gpt": Conv1D(3, 5), "transposed": nn.ConvTranspose1d(5, 3, 2)})
    params = prunable_parameters(model)
    dense = [module.weight.detach().clone() for module, _ in params]
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    for figures, (module, _), weight in zip(layer_report(params), params, dense, strict=True):
        turned = module.weight.detach().transpose(0, 1), weight.transpose(0, 1)
        check(figures, by_definition(*turned))
        assert figures["shape"] == list(weight.shape)


def test_totals_are_over_all_units(device: str) -> None:
    params = prunable_parameters(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(device))
    dense = [module.weight.detach().clone() for module, _ in params]
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
    report = layer_report(params)
    assert [figures["name"] for figures in report] == ["0.weight", "1.weight"]
    assert [figures["module"] for figures in report] == ["Linear", "Linear"]
    first, second = report
    totals = report.totals
    assert totals["mean_alignment"] == pytest.approx(
        (8 * first["mean_alignment"] + 2 * second["mean_alignment"]) / 10
    )
    assert totals["worst_alignment"] == min(first["worst_alignment"], second["worst_alignment"])
    assert totals["sparsity"] == 0.5 and totals["zeros"] == 24
    squares = [float((weight**2).sum()) for weight in dense]
    assert totals["distortion"] == pytest.approx(
        (first["distortion"] * squares[0] + second["distortion"] * squares[1]) / sum(squares)
    )
    json.dumps(report, allow_nan=False)


def test_dense_and_dead_and_empty() -> None:
    layer = nn.Linear(3, 2)
    (dense,) = layer_report([(layer, "weight")])
    assert dense["mean_alignment"] == pytest.approx(1) and dense["distortion"] == 0
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 0, 1], [0, 0, 0]]))
    (figures,) = layer_report([(layer, "weight")])
    assert (figures["dead_units_out"], figures["dead_units_in"]) == (1, 1)
    assert figures["worst_alignment"] == 0
    nothing = nn.Linear(3, 2)
    nothing.weight.data.zero_()
    (figures,) = layer_report([(nothing, "weight")])
    assert figures["mean_alignment"] is None and figures["distortion"] is None
    assert figures["dead_units_out"] == 0 and figures["sparsity"] == 1


def test_a_vector_is_one_unit() -> None:
    layer = nn.Linear(3, 4)
    layer.bias.data.copy_(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    prune.custom_from_mask(layer, "bias", torch.tensor([0, 1, 1, 1]))
    (figures,) = layer_report([(layer, "bias")])
    assert figures["mean_alignment"] == pytest.approx(0.8)


def test_tied_parameters_count_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second})
    params = prunable_parameters(model)
    tap.global_unstructured(params, tap.Magnitude, amount=8)
    report = layer_report(params)
    assert [figures["tied_to"] for figures in report] == [None, "a.weight"]
    assert [figures["zeros"] for figures in report] == [8, 8]
    assert report.totals["entries"] == 16 and report.totals["zeros"] == 8


def test_bad_references_are_named() -> None:
    params = prunable_parameters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"reference has no entry for 1\.weight"):
        layer_report(params, {params[0]: torch.ones(4, 4)})
    with pytest.raises(ValueError, match=r"0\.weight should have shape \(4, 4\), got \(4, 3\)"):
        layer_report(params, dict.fromkeys(params, torch.ones(4, 3)))
    with pytest.raises(ValueError, match="no parameters to report on"):
        layer_report([])
