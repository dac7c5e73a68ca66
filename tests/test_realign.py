"""realign against a plain solve of every unit, and against the outputs of the layers themselves."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import reference
import torchalignprune as tap
from models import Record, Tied
from torchalignprune import Calibration
from torchalignprune.parameters import prunable_parameters, stored

# Few tokens are enough for what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:the calibration has:UserWarning")

Pair = tuple[nn.Module, str]


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated, and with a mean, as those of a layer are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    return x @ torch.randn(features, features, generator=generator) + torch.randn(
        features, generator=generator
    )


def covariances(model: nn.Module, x: Tensor, params: Any) -> Calibration:
    return Calibration.collect(model, [x], params, statistics="covariance")


def outputs(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = layer(x)
        return out.double()


def relative_error(found: Tensor, expected: Tensor, bias: Tensor | None = None) -> float:
    size = (expected if bias is None else expected - bias.double()).square().sum()
    return float((found - expected).square().sum() / size)


@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(1, 40),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 1e-3, 0.1]),
    st.booleans(),
)
def test_weights_are_those_of_the_exact_solve(
    units: int,
    features: int,
    tokens: int,
    amount: float,
    bias: bool,
    conv1d: bool,
    ridge: float,
    with_reference: bool,
) -> None:
    layer: Any = Conv1D(units, features) if conv1d else nn.Linear(features, units, bias=bias)
    bias = bias or conv1d
    layer.double()
    nn.init.normal_(layer.weight)
    x = inputs(tokens, features).double()
    pair = (layer, "weight")
    calibration = covariances(layer, x, [pair])
    own = layer.weight.detach().clone()
    other = own + torch.randn_like(own) if with_reference else None
    old_bias = layer.bias.detach().clone() if bias else torch.zeros(units, dtype=torch.float64)
    tap.Random.apply(*pair, amount)
    (result,) = tap.realign(
        [pair], calibration, reference=None if other is None else {pair: other}, ridge=ridge
    )

    def rows(tensor: Tensor) -> Tensor:
        return tensor.T if conv1d else tensor

    mask, r = rows(layer.weight_mask), rows(own if other is None else other)
    found = calibration[pair]
    assert found.covariance is not None
    places = [(1.0, found.mean, found.covariance, bias)]
    v, (change,) = reference.realign(rows(own), mask, places, reference=r, ridge=ridge)
    # The exact weights are not unique without a ridge, but the least error is.
    now = layer.bias.detach() - old_bias if bias else torch.zeros_like(old_bias)
    error = reference.output_error(rows(layer.weight.detach()) - r, now, places)
    least = reference.output_error(v - r, change, places)
    before = reference.output_error(rows(own) * mask - r, torch.zeros_like(now), places)
    assert (error <= before * (1 + 1e-9)).all()
    torch.testing.assert_close(error, least, rtol=1e-4, atol=1e-4 * float(before.sum()) + 1e-12)
    size = float(reference.output_error(r, torch.zeros_like(now), places).sum())
    assert result.before == pytest.approx(float(before.sum()) / size, rel=1e-6, abs=1e-12)
    assert result.after == pytest.approx(float(error.sum()) / size, rel=1e-6, abs=1e-9)
    if ridge and found.norms.any() and not (bias and tokens == 1):
        scale = float(v.abs().max()) + 1e-9
        torch.testing.assert_close(
            rows(layer.weight.detach()), v, rtol=0, atol=0.02 * scale, check_stride=False
        )


def test_an_example_by_hand() -> None:
    """Two inputs that are always equal: the one that is left does the work of both."""
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 1.0]]))
        layer.bias.fill_(0.5)
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    pair = (layer, "weight")
    calibration = covariances(layer, x, [pair])
    before = outputs(layer, x)
    twin = copy.deepcopy(layer)
    for each in (layer, twin):
        prune.custom_from_mask(each, "weight", torch.tensor([[1, 0]]))

    tap.realign([pair], calibration, ridge=0.0)
    assert layer.weight.tolist() == [[pytest.approx(3.0), 0.0]]
    assert layer.bias.tolist() == pytest.approx([0.5])
    torch.testing.assert_close(outputs(layer, x), before)

    # The bias alone adds the mean of what is missing, 1 * 2.
    other = Calibration({(twin, "weight"): calibration[pair]})
    tap.realign([(twin, "weight")], other, "bias")
    assert twin.weight.tolist() == [[2.0, 0.0]]
    assert twin.bias.tolist() == [2.5]


@pytest.mark.parametrize(("what", "bias"), [("bias", True), ("weights", True), ("weights", False)])
def test_errors_are_those_of_the_outputs(what: Any, bias: bool) -> None:
    layer, x = nn.Linear(10, 6, bias=bias), inputs(200, 10)
    pair = (layer, "weight")
    calibration = covariances(layer, x, [pair])
    expected = outputs(layer, x)
    old = layer.bias.detach().clone() if bias else None
    tap.Magnitude.apply(*pair, 0.6)
    before = relative_error(outputs(layer, x), expected, old)
    (result,) = tap.realign([pair], calibration, what)
    after = relative_error(outputs(layer, x), expected, old)
    assert result.before == pytest.approx(before, rel=1e-4)
    assert result.after == pytest.approx(after, rel=1e-4)
    assert result.bias == bias
    assert after < before
    if bias:
        # The mean output is what it was.
        torch.testing.assert_close(
            outputs(layer, x).mean(dim=0), expected.mean(dim=0), rtol=1e-4, atol=1e-4
        )


def test_weights_do_better_than_the_bias_alone() -> None:
    found = {}
    for what in ("bias", "weights"):
        torch.manual_seed(0)
        layer, x = nn.Linear(16, 8), inputs(300, 16)
        calibration = covariances(layer, x, [(layer, "weight")])
        tap.Magnitude.apply(layer, "weight", 0.5)
        (result,) = tap.realign([(layer, "weight")], calibration, what)  # type: ignore[arg-type]
        found[what] = result
    assert found["bias"].before == found["weights"].before
    assert found["weights"].after < 0.8 * found["bias"].after < 0.8 * found["bias"].before


def test_norms_will_do_for_the_bias() -> None:
    layer, x = nn.Linear(10, 6), inputs(200, 10)
    pair = (layer, "weight")
    calibration = Calibration.collect(layer, [x], [pair])
    expected = outputs(layer, x).mean(dim=0)
    tap.Magnitude.apply(*pair, 0.6)
    (result,) = tap.realign([pair], calibration, "bias")
    assert result.before is None and result.after is None and result.bias
    torch.testing.assert_close(outputs(layer, x).mean(dim=0), expected, rtol=1e-4, atol=1e-4)


def test_dtypes(dtype: torch.dtype, device: str) -> None:
    layer = nn.Linear(24, 8).to(device, dtype)
    x = inputs(400, 24).to(device, dtype)
    pair = (layer, "weight")
    calibration = covariances(layer, x, [pair])
    w, b = (tensor.detach().double().clone() for tensor in (layer.weight, layer.bias))
    tap.Magnitude.apply(*pair, 0.5)
    (result,) = tap.realign([pair], calibration)
    assert layer.weight.dtype == layer.weight_orig.dtype == layer.bias.dtype == dtype
    wide = x.double()
    expected = wide @ w.T + b
    found = wide @ layer.weight.detach().double().T + layer.bias.detach().double()
    assert result.after == pytest.approx(relative_error(found, expected, b), rel=1e-3)
    assert result.after < 0.9 * result.before


def test_a_reference_may_stay_on_the_cpu(device: str) -> None:
    layer = nn.Linear(24, 8).to(device)
    x = inputs(400, 24).to(device)
    pair = (layer, "weight")
    calibration = covariances(layer, x, [pair])
    reference = layer.weight.detach().cpu().clone()
    tap.Pruner([pair], tap.Magnitude, lambda step: 0.5)
    (result,) = tap.realign([pair], calibration, reference=[reference])
    assert result.after < 0.9 * result.before


def test_units_that_rounding_makes_worse_stay() -> None:
    """Hardly anything is pruned: what there is to win is less than a rounding to bfloat16."""
    layer = nn.Linear(64, 32)
    layer.to(torch.bfloat16)
    with torch.no_grad():
        layer.weight[:, 0] = 1e-5
        layer.weight[:16, 0] = 1e-3
    x = inputs(2000, 64).bfloat16()
    pair = (layer, "weight")
    calibration = covariances(layer, x, [pair])
    mask = torch.ones(32, 64)
    mask[:, 0] = 0
    own, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    prune.custom_from_mask(layer, "weight", mask)
    tap.realign([pair], calibration)
    found = calibration[pair]
    assert found.covariance is not None
    places = [(1.0, found.mean, found.covariance, True)]
    change = layer.weight.detach().double() - own.double()
    error = reference.output_error(change, (layer.bias.detach().double() - bias.double()), places)
    start = reference.output_error((own * mask - own).double(), torch.zeros(32).double(), places)
    assert (error <= start * (1 + 1e-4)).all()
    stayed = (layer.bias == bias) & (layer.weight_orig == own).all(dim=1)
    assert stayed[16:].any()


@pytest.mark.parametrize("by_torch", [True, False])
def test_masks_and_what_lies_under_them_stay(by_torch: bool) -> None:
    layer, x = nn.Linear(12, 8), inputs(100, 12)
    layer.weight.requires_grad_(False)
    pair = (layer, "weight")
    calibration = covariances(layer, x, [pair])
    own = layer.weight.detach().clone()
    if by_torch:
        prune.l1_unstructured(layer, "weight", amount=0.5)
    else:
        tap.Magnitude.apply(layer, "weight", 0.5)
    mask, original = layer.weight_mask.clone(), layer.weight_orig
    assert mask.dtype == (torch.float32 if by_torch else torch.bool)
    tap.realign([pair], calibration)
    assert torch.equal(layer.weight_mask, mask) and layer.weight_orig is original
    assert torch.equal(original[mask == 0], own[mask == 0])
    assert not torch.equal(original[mask != 0], own[mask != 0])
    # What the layer reads is there before the next forward, and the same after it.
    shown = layer.weight.detach().clone()
    assert torch.equal(shown, original * mask)
    layer(x)
    assert torch.equal(layer.weight, shown)
    assert len(layer._forward_pre_hooks) == 1


def test_gradients_reach_the_weights_afterwards() -> None:
    layer, x = nn.Linear(12, 8), inputs(100, 12)
    calibration = covariances(layer, x, [(layer, "weight")])
    tap.Magnitude.apply(layer, "weight", 0.5)
    tap.realign([(layer, "weight")], calibration)
    layer.weight.sum().backward()
    assert torch.equal(layer.weight_orig.grad, layer.weight_mask.float())
    copy.deepcopy(layer)


def test_transformers_conv1d_gives_what_linear_gives() -> None:
    x = inputs(100, 12)
    linear, conv = nn.Linear(12, 8), Conv1D(8, 12)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    for layer in (linear, conv):
        calibration = covariances(layer, x, [(layer, "weight")])
        tap.Magnitude.apply(layer, "weight", 0.5, budget="unit")
        tap.realign([(layer, "weight")], calibration)
    torch.testing.assert_close(conv.weight.T, linear.weight)
    torch.testing.assert_close(conv.bias, linear.bias)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("what", ["bias", "weights"])
def test_attention(apart: bool, what: Any) -> None:
    """What a MultiheadAttention projects, next to the same as linear layers."""
    options = {"kdim": 8, "vdim": 8} if apart else {}
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    if apart:  # of the same sizes torch makes one matrix
        attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=4)
    nn.init.normal_(attention.in_proj_bias)
    params = prunable_parameters(nn.ModuleList([attention]))
    x = inputs(200, 8)

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            key, value = (x[..., :6], x[..., :4]) if apart else (x, x)
            out: Tensor = self.attention(x, key, value)[0]
            return out

    model = Run()
    calibration = covariances(model, x.reshape(20, 10, 8), params)
    twins = []
    start = 0
    for module, name in params:
        weight = getattr(module, name).detach()
        twin = nn.Linear(weight.size(1), weight.size(0))
        with torch.no_grad():
            twin.weight.copy_(weight)
            twin.bias.copy_(attention.in_proj_bias[start : start + len(weight)])
        start += len(weight)
        twins.append((twin, "weight"))
    same = Calibration({twin: calibration[pair] for twin, pair in zip(twins, params, strict=True)})
    for pairs, known in ((params, calibration), (twins, same)):
        tap.global_unstructured(pairs, tap.Magnitude, amount=0.5)
        results = tap.realign(pairs, known, what)
        assert all(result.after < result.before for result in results)
    biases = torch.cat([twin.bias for twin, _ in twins])
    torch.testing.assert_close(attention.in_proj_bias, biases)
    for (module, name), (twin, _) in zip(params, twins, strict=True):
        torch.testing.assert_close(getattr(module, name), twin.weight)
    model(x.reshape(20, 10, 8))


@pytest.mark.parametrize("bias", [True, False])
def test_tied_weights_serve_all_their_places(bias: bool) -> None:
    model = Tied()
    if not bias:
        model.b.bias = None
    model.double()
    params = prunable_parameters(model)
    # As much as each place has seen.
    first = covariances(model.a, inputs(300, 12).double(), params[:1])
    second = covariances(model.b, inputs(100, 12, seed=1).double(), params[1:])
    calibration = Calibration({**first, **second})
    own = model.a.weight.detach().clone()
    tap.global_unstructured(params, tap.Random, amount=0.5, generator=torch.Generator())
    layers = (model.a, model.b)
    old = [0.0 if layer.bias is None else layer.bias.detach().clone() for layer in layers]
    (result,) = tap.realign(params, calibration, ridge=0.01)
    assert model.a.weight_orig is model.b.weight_orig
    places = []
    for pair, has, share in zip(params, (True, bias), (0.75, 0.25), strict=True):
        found = calibration[pair]
        assert found.covariance is not None
        places.append((share, found.mean, found.covariance, has))
    v, changes = reference.realign(own, model.a.weight_mask, places, ridge=0.01)
    torch.testing.assert_close(model.a.weight.detach(), v, rtol=0.01, atol=0.01)
    assert torch.equal(model.a.weight, model.b.weight)
    for layer, was, change in zip(layers, old, changes, strict=True):
        if layer.bias is not None:
            torch.testing.assert_close(layer.bias.detach() - was, change, rtol=0.02, atol=0.02)
    assert result.after < result.before


def test_a_pruned_bias_keeps_its_mask() -> None:
    layer, x = nn.Linear(12, 8), inputs(100, 12)
    calibration = covariances(layer, x, [(layer, "weight")])
    tap.Magnitude.apply(layer, "weight", 0.5)
    tap.Magnitude.apply(layer, "bias", 0.5)
    own = layer.bias_orig.detach().clone()
    (result,) = tap.realign([(layer, "weight")], calibration)
    mask = layer.bias_mask
    assert torch.equal(layer.bias_orig[~mask], own[~mask])
    assert not torch.equal(layer.bias_orig[mask], own[mask])
    assert torch.equal(layer.bias, layer.bias_orig * mask)
    assert result.after <= result.before


def test_layers_without_a_bias_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    params = prunable_parameters(model)
    calibration = covariances(model, inputs(100, 8), params)
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    own = model[1].weight_orig.detach().clone()
    first, second = tap.realign(params, calibration, "bias")
    assert (first.name, second.name) == ("0.weight", "1.weight")
    assert (first.bias, second.bias) == (True, False)
    assert first.after < first.before and second.after == second.before
    assert torch.equal(model[1].weight_orig, own)
    first, second = tap.realign(params, calibration)
    assert second.after < second.before
    lonely = prunable_parameters(model, include="1")
    with pytest.raises(ValueError, match="needs a layer with a bias, but none of these has one"):
        tap.realign(lonely, calibration, "bias")


@pytest.mark.parametrize("what", ["bias", "weights"])
def test_edges(what: Any) -> None:
    """Nothing pruned, everything pruned, inputs that never vary, inputs that are all zero."""
    for amount in (0.0, 1.0):
        for x in (inputs(50, 6), torch.ones(5, 6), torch.zeros(5, 6), inputs(1, 6)):
            layer = nn.Linear(6, 4)
            pair = (layer, "weight")
            calibration = covariances(layer, x, [pair])
            expected = outputs(layer, x)
            own = layer.weight.detach().clone()
            tap.Magnitude.apply(*pair, amount)
            (result,) = tap.realign([pair], calibration, what)
            for tensor in layer.parameters():
                assert tensor.isfinite().all()
            # All that is pruned away can be is the mean.
            torch.testing.assert_close(
                outputs(layer, x).mean(dim=0), expected.mean(dim=0), rtol=1e-3, atol=1e-3
            )
            if amount == 0.0:
                assert torch.equal(layer.weight, own)
            if (x == 0).all():
                assert result.before is None and result.after is None
            else:
                assert 0 <= result.after <= result.before


def nan_weight(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight_orig[0, 0] = math.nan


def test_a_failed_call_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    params = prunable_parameters(model)
    x = inputs(40, 6)
    calibration = covariances(model, x, params)
    only_norms = Calibration.collect(model, [x], params)
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    first_two = Calibration({pair: calibration[pair] for pair in params[:2]})
    narrow = nn.Linear(5, 5)
    other = covariances(narrow, inputs(40, 5), [(narrow, "weight")])[narrow, "weight"]
    misfit = Calibration({**calibration, params[2]: other})
    record = Record(model)

    def refused(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            tap.realign(*args, **options)
        record.assert_untouched()

    refused(ValueError, "what should be one of .*, got 'both'", params, calibration, "both")
    refused(TypeError, "should be a torchalignprune.Calibration, got dict", params, {})
    refused(ValueError, r"no entry for 2\.weight", params, first_two)
    refused(ValueError, r"no covariance for 0\.weight: collect", params, only_norms)
    refused(ValueError, r"2\.weight should be a matrix with 5 inputs", params, misfit)
    for ridge in (-1.0, math.nan, math.inf):
        refused(ValueError, "ridge should be finite", params, calibration, ridge=ridge)
    refused(
        ValueError,
        r"the reference of 1\.weight should have shape \(6, 6\), got \(6, 5\)",
        params,
        calibration,
        reference=[torch.ones(6, 6), torch.ones(6, 5), torch.ones(6, 6)],
    )
    bad = [torch.ones(6, 6), torch.ones(6, 6), torch.full((6, 6), math.nan)]
    refused(
        ValueError,
        r"the reference of 2\.weight should be finite",
        params,
        calibration,
        reference=bad,
    )
    zeros = nn.Sequential(nn.Linear(6, 6))
    pruner = tap.Pruner(tap.prunable_parameters(zeros), tap.Magnitude, lambda step: 0.5)
    of_zeros = covariances(zeros, x, pruner.params)
    record = Record(zeros)
    refused(
        ValueError,
        r"0\.weight and all other parameters are zero under their",
        pruner.params,
        of_zeros,
    )
    nan_weight(model[2])
    record = Record(model)
    refused(ValueError, r"the weights of 2\.weight should be finite", params, calibration)


def test_a_solve_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    params = prunable_parameters(model)
    calibration = covariances(model, inputs(40, 6), params)
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    record = Record(model)
    module = sys.modules["torchalignprune.realign"]
    solve = module.least_squares_step
    calls = []

    def fail(*given: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        out: Tensor = solve(*given)
        return out

    monkeypatch.setattr(module, "least_squares_step", fail)
    with pytest.raises(MemoryError):
        tap.realign(params, calibration)
    record.assert_untouched()


def test_what_cannot_be_realigned_is_named() -> None:
    x = inputs(40, 6)
    dense = nn.Linear(6, 6)
    pair = (dense, "weight")
    calibration = covariances(dense, x, [pair])
    with pytest.raises(
        ValueError, match=r"Linear\.weight\) should be pruned, got a parameter without a mask"
    ):
        tap.realign([pair], calibration)

    conv = nn.Conv1d(6, 4, 1)
    given = Calibration.collect(conv, [x.T[None]], [(conv, "weight")])
    tap.Magnitude.apply(conv, "weight", 0.5)
    with pytest.raises(ValueError, match=r"Conv1d\.weight\) belongs to a convolution"):
        tap.realign([(conv, "weight")], given, "bias")

    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.bias = one.bias
    model = nn.Sequential(one, other)
    params = prunable_parameters(model)
    shared = covariances(model, x, params)
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    with pytest.raises(ValueError, match=r"1\.weight shares its bias with 0\.weight"):
        tap.realign(params, shared, "bias")


def test_other_text_gains_too() -> None:
    """The layer is judged on inputs that it was not realigned for."""
    torch.manual_seed(0)
    layer, mix, mean = nn.Linear(32, 16), torch.randn(32, 32), torch.randn(32)
    seen, unseen = (torch.randn(500, 32) @ mix + mean for _ in range(2))
    pair = (layer, "weight")
    calibration = covariances(layer, seen, [pair])
    expected = outputs(layer, unseen)
    tap.AlignedMagnitude.apply(*pair, 0.6, input_norms=calibration)
    before = relative_error(outputs(layer, unseen), expected)
    tap.realign([pair], calibration)
    assert relative_error(outputs(layer, unseen), expected) < 0.7 * before
    assert stored(*pair).shape == (16, 32)


def error_of(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    return relative_error(outputs(model, x), expected)


def test_bias_may_be_realigned_again() -> None:
    layer, x = nn.Linear(8, 6), inputs(200, 8)
    params = prunable_parameters(nn.Sequential(layer))
    expected, calibration = outputs(layer, x), covariances(layer, x, params)
    tap.global_unstructured(params, tap.Magnitude, amount=0.3)
    (first,) = tap.realign(params, calibration, "bias")
    once, bias = error_of(layer, x, expected), layer.bias.detach().clone()
    (second,) = tap.realign(params, calibration, "bias")
    torch.testing.assert_close(layer.bias.detach(), bias)
    assert error_of(layer, x, expected) == pytest.approx(once, rel=1e-4)
    assert second.before == pytest.approx(first.after, rel=1e-4)
    # After further pruning the mean output is still what it was.
    tap.global_unstructured(params, tap.Magnitude, amount=0.3)
    tap.realign(params, calibration, "bias")
    mean_gap = (outputs(layer, x) - expected).mean(dim=0)
    torch.testing.assert_close(mean_gap, torch.zeros_like(mean_gap), atol=1e-5, rtol=0)


def test_a_bias_that_changed_since_is_refused() -> None:
    layer, x = nn.Linear(8, 6), inputs(200, 8)
    params = prunable_parameters(nn.Sequential(layer))
    calibration = covariances(layer, x, params)
    own = layer.bias.detach().clone()
    tap.global_unstructured(params, tap.Magnitude, amount=0.3)
    tap.realign(params, calibration, "bias")
    with torch.no_grad():
        layer.bias.copy_(own)
    record = Record(layer)
    with pytest.raises(ValueError, match="the bias of Linear has changed since it was realigned"):
        tap.realign(params, calibration, "bias")
    record.assert_untouched()


def test_weights_may_be_realigned_again_with_a_reference() -> None:
    layer, x = nn.Linear(8, 6), inputs(400, 8)
    params = prunable_parameters(nn.Sequential(layer))
    expected, calibration = outputs(layer, x), covariances(layer, x, params)
    reference = tap.Reference.capture(params)
    tap.global_unstructured(params, tap.Magnitude, amount=0.3)
    (first,) = tap.realign(params, calibration)
    record = Record(layer)
    with pytest.raises(ValueError, match=r"was realigned before, .* pass a reference from before"):
        tap.realign(params, calibration)
    record.assert_untouched()
    (second,) = tap.realign(params, calibration, reference=reference)
    assert second.before == pytest.approx(first.after, rel=1e-3)
    assert second.after <= second.before
    tap.global_unstructured(params, tap.Magnitude, amount=0.3)
    (third,) = tap.realign(params, calibration, reference=reference)
    assert third.after < third.before
    gap = (outputs(layer, x) - expected).mean(dim=0)
    torch.testing.assert_close(gap, torch.zeros_like(gap), atol=1e-4, rtol=0)
    own = error_of(layer, x, expected)
    again = expected + x.double() @ (layer.weight - reference[params[0]]).detach().double().T
    again += outputs(layer, x).mean(dim=0) - again.mean(dim=0)
    assert own == pytest.approx(relative_error(again, expected), rel=1e-3)


def test_few_tokens_are_warned_of() -> None:
    layer = nn.Linear(8, 6)
    params = [(layer, "weight")]
    calibration = covariances(layer, inputs(5, 8), params)
    tap.magnitude(layer, "weight", amount=0.5)
    with pytest.warns(UserWarning, match=r"has only 5 tokens for the 8 inputs of .*Linear.weight"):
        tap.realign(params, calibration)
    enough = nn.Linear(8, 6)
    params = [(enough, "weight")]
    calibration = covariances(enough, inputs(8, 8), params)
    tap.magnitude(enough, "weight", amount=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tap.realign(params, calibration)
