"""alignment_report against the definitions, unit by unit, and the forms that it comes in."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import reference as twin
import torchalignprune as tap
from models import Tied, mixed, mlp, weights_of
from torchalignprune.parameters import prunable_parameters

module_under_test = sys.modules["torchalignprune.alignment_report"]
KEYS = [
    "name",
    "module",
    "shape",
    "entries",
    "zeros",
    "sparsity",
    "mean_alignment",
    "median_alignment",
    "p5_alignment",
    "worst_alignment",
    "mean_alignment_in",
    "median_alignment_in",
    "p5_alignment_in",
    "worst_alignment_in",
    "distortion",
    "dead_units_out",
    "dead_units_in",
    "moved_share",
    "tied_to",
]


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        exact = not isinstance(value, float)
        assert found[key] == (value if exact else pytest.approx(value, abs=1e-12)), key


# What is pruned may be zero already.
@pytest.mark.filterwarnings("ignore:.* are zero under their masks")
@given(
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(0, 1000),
    st.sampled_from(["own", "other", "permuted", "repeated", "negative"]),
    st.booleans(),
)
def test_by_definition(
    outputs: int, inputs: int, kernel: int, seed: int, kind: str, by_torch: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (outputs, inputs) if kernel == 0 else (outputs, inputs, kernel)
    module = nn.Linear(1, 1) if kernel == 0 else nn.Conv1d(1, 1, 1)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(outputs, generator=generator) < 0.2] = 0
    if kind == "repeated":
        weight[outputs // 2 :] = weight[: outputs - outputs // 2].clone()
    module.weight = nn.Parameter(weight)
    mask = torch.rand(shape, generator=generator) < 0.6
    pair = (module, "weight")
    if by_torch:
        prune.custom_from_mask(module, "weight", mask)
    else:
        tap.global_unstructured([pair], tap.Magnitude, amount=0.4)
        mask = module.weight_mask
    dense = {
        "own": weight,
        "repeated": weight,
        "other": torch.randn(shape, generator=generator),
        "permuted": weight[torch.randperm(outputs, generator=generator)],
        "negative": -weight,
    }[kind]
    given = None if kind in ("own", "repeated") else {pair: dense}
    report = tap.alignment_report([pair], given)
    expected = twin.alignment_report(weight * mask, dense)
    check(report[0], expected)
    check(report.totals, expected)


@pytest.mark.parametrize("chunk", [1, 7, 50, 1 << 22])
def test_parts_make_no_difference(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(9, 50)
    weight = layer.weight.detach().clone()
    weight[3], weight[40] = weight[20], 0
    other = weight[torch.randperm(50)] + 0.3 * torch.randn(50, 9)
    other[[5, 49]] = 0
    layer.weight.data.copy_(weight)
    pair = (layer, "weight")
    tap.global_unstructured([pair], tap.Magnitude, amount=0.6)
    monkeypatch.setattr(module_under_test, "_chunk", lambda weight: chunk)
    for dense in (weight, other):
        (found,) = tap.alignment_report([pair], {pair: dense})
        check(found, twin.alignment_report(layer.weight.detach(), dense))


def test_outputs_are_found_in_every_module() -> None:
    model = mixed()
    params = prunable_parameters(model)
    dense = [weight.clone() for weight in weights_of(params)]
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    for figures, (module, _), weight in zip(
        tap.alignment_report(params), params, dense, strict=True
    ):
        pruned = module.weight.detach()
        if isinstance(module, nn.modules.conv._ConvTransposeNd) or not isinstance(
            module, nn.Linear | nn.modules.conv._ConvNd
        ):
            pruned, turned = pruned.transpose(0, 1), weight.transpose(0, 1)
        else:
            turned = weight
        check(figures, twin.alignment_report(pruned, turned))
        assert figures["shape"] == list(weight.shape)


def test_totals_are_over_all_units(device: str, dtype: torch.dtype) -> None:
    params = prunable_parameters(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(device, dtype))
    dense = [module.weight.detach().clone() for module, _ in params]
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
    report = tap.alignment_report(params)
    assert [figures["name"] for figures in report] == ["0.weight", "1.weight"]
    assert [figures["module"] for figures in report] == ["Linear", "Linear"]
    assert list(report[0]) == KEYS
    assert list(report.totals) == KEYS[3:-1]
    first, second = report
    totals = report.totals
    assert totals["mean_alignment"] == pytest.approx(
        (8 * first["mean_alignment"] + 2 * second["mean_alignment"]) / 10
    )
    assert totals["worst_alignment"] == min(first["worst_alignment"], second["worst_alignment"])
    both = torch.cat(report.alignments)
    assert [len(aligned) for aligned in report.alignments] == [8, 2]
    assert totals["median_alignment"] == pytest.approx(float(both.quantile(0.5)))
    assert totals["p5_alignment"] == pytest.approx(float(both.quantile(0.05)))
    assert totals["sparsity"] == 0.5 and totals["zeros"] == 24
    squares = [float((weight.double() ** 2).sum()) for weight in dense]
    assert totals["distortion"] == pytest.approx(
        (first["distortion"] * squares[0] + second["distortion"] * squares[1]) / sum(squares)
    )


def test_moved_units() -> None:
    layer = nn.Linear(3, 4)
    pair = (layer, "weight")
    dense = torch.tensor([[5.0, 4, 0], [0, 1, 0], [0, 0, 2], [5, 4, 0]])
    layer.weight.data.copy_(dense)
    mask = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    prune.custom_from_mask(layer, "weight", mask)
    # Unit 0 is left with what unit 1 is; 3 is as near to its twin; 2 has no direction.
    (figures,) = tap.alignment_report([pair])
    assert figures["moved_share"] == pytest.approx(1 / 3) and figures["dead_units_out"] == 1
    (figures,) = tap.alignment_report([pair], matching=False)
    assert figures["moved_share"] is None


def test_all_units_of_a_permuted_layer_have_moved() -> None:
    layer = nn.Linear(64, 300)
    pair = (layer, "weight")
    dense = layer.weight.detach().roll(1, 0)
    assert tap.alignment_report([pair], {pair: dense})[0]["moved_share"] == 1
    assert tap.alignment_report([pair])[0]["moved_share"] == 0


def test_nothing_to_compare_with() -> None:
    model = mlp()
    params = prunable_parameters(model)
    reference = tap.Reference.capture(params)
    pruner = tap.Pruner(params, tap.Magnitude, tap.schedules.one_shot(0.5, 1))
    assert tap.alignment_report(params).totals["mean_alignment"] == 1  # nothing is pruned yet
    pruner.step()
    with pytest.warns(UserWarning, match=r"are zero under their masks.*: pass a reference"):
        found = tap.alignment_report(params)
    assert found.totals["sparsity"] == 0.5
    assert tap.alignment_report(params, reference).totals["mean_alignment"] < 1
    # A reference that is given may well be what is left.
    left = [module.weight.detach().clone() for module, _ in params]
    assert tap.alignment_report(params, left).totals["distortion"] == 0


def test_close_calls_are_decided_in_float64() -> None:
    # The cosines differ by 5e-7, which float32 products of 4096 terms do not tell apart.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4096, dtype=torch.float64, generator=generator)
    step = torch.randn(4096, dtype=torch.float64, generator=generator)
    step -= base * (step @ base) / (base @ base)
    for sign, share in ((1, 0.5), (-1, 0.0)):
        layer = nn.Linear(4096, 2, bias=False).double()
        # Its own is at an angle of 1.0e-3, the other at one of 1.4e-3, or the other way round.
        near, far = base + 1.0e-3 * step, base + 1.4e-3 * step
        dense = torch.stack([far, near] if sign > 0 else [near, far])
        layer.weight.data.copy_(torch.stack([base, dense[1]]))
        pair = (layer, "weight")
        (figures,) = tap.alignment_report([pair], {pair: dense})
        assert figures["moved_share"] == share


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_alignments_of_weights_of_any_size(scale: float) -> None:
    layer = nn.Linear(2, 2, bias=False).double()
    dense = torch.tensor([[3.0, 4.0], [5.0, 12.0]], dtype=torch.float64) * scale
    layer.weight.data.copy_(dense)
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 0], [0, 1]]))
    (figures,) = tap.alignment_report([(layer, "weight")])
    assert figures["mean_alignment"] == pytest.approx((3 / 5 + 12 / 13) / 2)
    assert figures["worst_alignment"] == pytest.approx(3 / 5)


def test_dense_and_dead_and_empty() -> None:
    layer = nn.Linear(3, 2)
    (dense,) = tap.alignment_report([(layer, "weight")])
    assert dense["mean_alignment"] == pytest.approx(1) and dense["distortion"] == 0
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 0, 1], [0, 0, 0]]))
    (figures,) = tap.alignment_report([(layer, "weight")])
    assert (figures["dead_units_out"], figures["dead_units_in"]) == (1, 1)
    assert figures["worst_alignment"] == 0
    nothing = nn.Linear(3, 2)
    nothing.weight.data.zero_()
    report = tap.alignment_report([(nothing, "weight")])
    (figures,) = report
    undefined = [key for key in KEYS if "alignment" in key] + ["distortion", "moved_share"]
    assert len(undefined) == 10 and all(figures[key] is None for key in undefined)
    assert figures["dead_units_out"] == 0 and figures["sparsity"] == 1
    assert "100.0%     -       -   -      -           -" in str(report)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (3, 2, 0), ()])
def test_parameters_without_entries(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(torch.ones(shape))
    (figures,) = tap.alignment_report([(layer, "weight")])
    assert figures["entries"] == (1 if shape == () else 0)
    assert figures["mean_alignment"] == (1 if shape == () else None)


def test_a_vector_is_one_unit() -> None:
    layer = nn.Linear(3, 4)
    layer.bias.data.copy_(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    prune.custom_from_mask(layer, "bias", torch.tensor([0, 1, 1, 1]))
    (figures,) = tap.alignment_report([(layer, "bias")])
    for side in ("", "_in"):
        assert figures["mean_alignment" + side] == pytest.approx(0.8)
    assert figures["dead_units_out"] == figures["dead_units_in"] == 0


def test_tied_parameters_count_once() -> None:
    params = prunable_parameters(Tied())
    reference = tap.Reference.capture(params[:1])
    tap.global_unstructured(params, tap.Magnitude, amount=72)
    for dense in (None, reference):
        report = tap.alignment_report(params, dense)
        assert [figures["tied_to"] for figures in report] == [None, "a.weight"]
        assert [figures["zeros"] for figures in report] == [72, 72]
        assert report.totals["entries"] == 144 and report.totals["zeros"] == 72
        assert "b.weight (tied to a.weight)" in str(report)


@pytest.mark.parametrize("form", ["reference", "half", "list", "mapping"])
def test_references(form: str) -> None:
    params = prunable_parameters(mlp())
    captured = tap.Reference.capture(params, torch.bfloat16 if form == "half" else None)
    dense = [tensor.clone() for tensor in captured.values()]
    with torch.no_grad():
        for weight in weights_of(params):
            weight.add_(torch.randn_like(weight) / 8)
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
    given = {"list": dense, "mapping": dict(captured)}.get(form, captured)
    report = tap.alignment_report(params, given)
    for figures, (module, _), own in zip(report, params, dense, strict=True):
        check(figures, twin.alignment_report(module.weight.detach(), own))


def test_bad_input_is_named() -> None:
    params = prunable_parameters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"reference has no entry for 1\.weight"):
        tap.alignment_report(params, {params[0]: torch.ones(4, 4)})
    with pytest.raises(ValueError, match=r"0\.weight should have shape \(4, 4\), got \(4, 3\)"):
        tap.alignment_report(params, dict.fromkeys(params, torch.ones(4, 3)))
    with pytest.raises(ValueError, match="at least one"):
        tap.alignment_report([])
    bad = dict.fromkeys(params, torch.full((4, 4), torch.nan))
    with pytest.raises(ValueError, match=r"the reference of 0\.weight should be finite numbers"):
        tap.alignment_report(params, bad)
    params[1][0].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"the weights of 1\.weight should be finite numbers"):
        tap.alignment_report(params)


def test_autocast_and_inference_mode_do_not_matter() -> None:
    params = prunable_parameters(mlp())
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
    plain = tap.alignment_report(params)
    with torch.autocast("cpu", torch.bfloat16):
        check(tap.alignment_report(params).totals, plain.totals)
    with torch.inference_mode():
        check(tap.alignment_report(params).totals, plain.totals)


@pytest.fixture
def report() -> tap.AlignmentReport:
    layers = [nn.Linear(16, 16, bias=False) for _ in range(4)]
    model = nn.ModuleDict({"layer": nn.ModuleList(layers)})
    layers[1].weight.data.zero_()
    params = prunable_parameters(model)
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.75)
    return tap.alignment_report(params)


def test_json(report: tap.AlignmentReport) -> None:
    assert json.loads(report.to_json()) == {"totals": report.totals, "layers": list(report)}
    assert report[1]["mean_alignment"] is None


def test_pandas(report: tap.AlignmentReport, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = report.to_pandas()
    assert list(frame.index) == [layer["name"] for layer in report]
    assert list(frame.columns) == KEYS[1:]
    for key in KEYS[3:-1]:
        assert frame[key].dtype.kind in "if", key
        for value, layer in zip(frame[key], report, strict=True):
            assert value != value if layer[key] is None else value == layer[key]
    assert frame.attrs["totals"] == report.totals
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'to_pandas needs .* "torchalignprune\[pandas\]"'):
        report.to_pandas()


def test_table(report: tap.AlignmentReport) -> None:
    # Here, since benchmarks/gpu.sh takes tests from this file where there may be no rich.
    from rich.console import Console

    text = str(report)
    header, *lines = text.splitlines()
    assert header.split()[:4] == ["parameter", "sparsity", "mean", "median"]
    assert [line.split()[0] for line in lines if line] == [*[x["name"] for x in report], "all"]
    first = lines[0].split()
    assert first[1] == f"{report[0]['sparsity']:.1%}"
    assert first[2] == f"{report[0]['mean_alignment']:.3f}"
    assert repr(report) == f"AlignmentReport(4 parameters: {report._summary()})"
    for width in (140, 80):
        file = io.StringIO()
        Console(file=file, width=width).print(report)
        shown = file.getvalue()
        assert max(map(len, shown.splitlines())) <= width and "…" not in shown
        for line in lines:
            assert all(cell in shown for cell in line.split()[1:])
        assert "layer.0.weight" in shown and "moved" in shown


@pytest.mark.parametrize("kind", ["grid", "list", "undefined"])
def test_plot(
    kind: str, report: tap.AlignmentReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "list":
        report = tap.alignment_report(prunable_parameters(mlp()))
    if kind == "undefined":
        layer = nn.Linear(2, 2)
        layer.weight.data.zero_()
        report = tap.alignment_report([(layer, "weight")])
    level = logging.getLogger("matplotlib").level
    figure = report.plot(tmp_path / "report.png")
    assert logging.getLogger("matplotlib").level == level
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in figure.axes]
    for title in ("mean unit alignment", "sparsity", "alignment of the units"):
        assert title in titles
    assert figure.get_suptitle() == report._summary()
    spread = next(a for a in figure.axes if a.get_title() == "alignment of the units")
    units = sum(int(patch.get_height()) for patch in spread.patches)
    assert units == sum(len(aligned) for aligned in report.alignments)
    report.plot(tmp_path / "report.svg", "a title")
    assert "<svg" in (tmp_path / "report.svg").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pictures need matplotlib"):
        report.plot()


def test_tied_parameters_are_drawn_once() -> None:
    params = prunable_parameters(Tied())
    figure = tap.alignment_report(params).plot()
    spread = next(a for a in figure.axes if a.get_title() == "alignment of the units")
    assert sum(int(patch.get_height()) for patch in spread.patches) == 12


def _weight(params: list[Any]) -> Tensor:
    weight: Tensor = params[0][0].weight
    return weight


def test_the_model_is_left_alone() -> None:
    params = prunable_parameters(mlp())
    before = _weight(params).clone()
    tap.alignment_report(params)
    assert torch.equal(_weight(params), before) and _weight(params).grad is None


def test_matching_should_be_a_bool() -> None:
    with pytest.raises(TypeError, match="matching should be True or False"):
        tap.alignment_report([(nn.Linear(2, 2), "weight")], matching="greedy")  # type: ignore[arg-type]
