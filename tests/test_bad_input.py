"""A call that fails says what was expected, what came and for which parameter, and leaves the model
as it was, in whatever state that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import torchalignprune as tap
from models import Pair, Record, Tied, mlp, pairs, prune_with_torch, prune_with_us
from torchalignprune import hooks

NAN, INF = math.nan, math.inf


def dense() -> nn.Module:
    return mlp()


def pruned_by_us() -> nn.Module:
    model = mlp()
    prune_with_us(pairs(model))
    model(torch.randn(2, 12)).sum().backward()
    return model


def pruned_by_torch() -> nn.Module:
    model = mlp()
    prune_with_torch(pairs(model))
    return model


def half_pruned() -> nn.Module:
    model = mlp()
    tap.magnitude(model[2], "weight", 0.25)
    return model


STATES = [dense, pruned_by_us, pruned_by_torch, half_pruned]


def second_weight(model: nn.Module) -> Tensor:
    layer = model.get_submodule("2")
    return layer.weight_orig if hasattr(layer, "weight_orig") else layer.weight


def spoil(value: float) -> Callable[[nn.Module], None]:
    """Overwrites one entry of the second weight, the last that would be pruned."""

    def change(model: nn.Module) -> None:
        weight = second_weight(model)
        left = weight.detach().abs()
        layer = model.get_submodule("2")
        if hasattr(layer, "weight_mask"):
            left = left * layer.weight_mask
        weight.data.view(-1)[left.argmax()] = value

    return change


def nothing(model: nn.Module) -> None:
    pass


Call = Callable[[list[Pair]], object]
AM = tap.AlignedMagnitude


def ours(method: Any = tap.Magnitude, **options: Any) -> Call:
    """tap.global_unstructured with these options."""
    return lambda params: tap.global_unstructured(params, method, **options)


def with_scores(make: Callable[[list[Pair]], Any], method: Any = tap.Magnitude) -> Call:
    return lambda params: tap.global_unstructured(params, method, make(params), amount=0.5)


def per_parameter(what: str, second: Any, **options: Any) -> Call:
    """AlignedMagnitude with a good reference or good norms for the first weight."""

    def call(params: list[Pair]) -> None:
        first, _ = (
            m.weight.detach() if what == "reference" else torch.ones(m.in_features)
            for m, _ in params
        )
        given = second(params) if callable(second) else second
        tap.global_unstructured(params, AM, amount=0.5, **{what: [first, given]}, **options)

    return call


# What it is, what is done, the error, and what the message should say.
CASES: dict[str, tuple[Call, type[Exception], str]] = {
    # parameters
    "parameters are a number": (
        lambda ps: tap.global_unstructured(7, tap.Magnitude, amount=0.5),  # type: ignore[arg-type]
        TypeError,
        "parameters is not an Iterable",
    ),
    "parameters are modules": (
        lambda ps: tap.global_unstructured([m for m, _ in ps], tap.Magnitude, amount=0.5),  # type: ignore[misc]
        TypeError,
        r"\(module, name\) pairs, got Linear",
    ),
    "parameters are a model": (
        lambda ps: tap.global_unstructured(nn.Sequential(ps[0][0]), tap.Magnitude, amount=0.5),  # type: ignore[arg-type]
        TypeError,
        r"\(module, name\) pairs, got Linear",
    ),
    "no parameters": (
        lambda ps: tap.global_unstructured([], tap.Magnitude, amount=0.5),
        ValueError,
        "at least one .*got none",
    ),
    "pairs of three": (
        lambda ps: tap.global_unstructured([(*ps[0], 1)], tap.Magnitude, amount=0.5),  # type: ignore[list-item]
        TypeError,
        "pairs, got",
    ),
    "pairs the wrong way round": (
        lambda ps: tap.global_unstructured([p[::-1] for p in ps], tap.Magnitude, amount=0.5),  # type: ignore[misc]
        TypeError,
        r"pairs of a torch.nn.Module and a str, got \(str, Linear\)",
    ),
    "parameters instead of modules": (
        lambda ps: tap.global_unstructured([(m.weight, n) for m, n in ps], tap.Magnitude, amount=1),  # type: ignore[misc]
        TypeError,
        "pairs of a torch.nn.Module and a str",
    ),
    "an unknown name": (
        lambda ps: tap.global_unstructured([*ps, (ps[1][0], "wait")], tap.Magnitude, amount=0.5),
        AttributeError,
        r"parameters\[2\].*Linear has no attribute 'wait'",
    ),
    "a dotted name": (
        lambda ps: tap.global_unstructured([*ps, (ps[1][0], "a.b")], tap.Magnitude, amount=0.5),
        AttributeError,
        "has no attribute 'a.b'",
    ),
    "an attribute that is no parameter": (
        lambda ps: tap.global_unstructured(
            [*ps, (ps[1][0], "in_features")], tap.Magnitude, amount=0.5
        ),
        TypeError,
        r"parameters\[2\].*should be a torch.nn.Parameter.*got int",
    ),
    # the method
    "a method of torch": (
        lambda ps: tap.global_unstructured(ps, prune.L1Unstructured, amount=0.5),  # type: ignore[arg-type]
        TypeError,
        "one of torchalignprune's methods.*got .*L1Unstructured",
    ),
    "an instance of a method": (
        lambda ps: tap.global_unstructured(ps, tap.Magnitude(0.5)),  # type: ignore[arg-type]
        TypeError,
        "one of torchalignprune's methods",
    ),
    "the name of a method": (
        lambda ps: tap.global_unstructured(ps, "magnitude", amount=0.5),  # type: ignore[arg-type]
        TypeError,
        "one of torchalignprune's methods.*got 'magnitude'",
    ),
    "an option that the method has not": (
        ours(amount=0.5, alignment="cosine"),
        TypeError,
        "alignment",
    ),
    # amounts
    "no amount": (ours(), TypeError, "amount"),
    "a negative amount": (ours(amount=-1), ValueError, "amount=-1 "),
    "a negative share": (ours(amount=-0.1), ValueError, "amount=-0.1 "),
    "a share above one": (ours(amount=1.1), ValueError, "amount=1.1 "),
    "an infinite share": (ours(amount=INF), ValueError, "amount=inf"),
    "a share of NaN": (ours(amount=NAN), ValueError, "amount should be a number, got nan"),
    "an amount in words": (ours(amount="half"), TypeError, "half"),
    "an amount of None": (ours(amount=None), TypeError, "None"),
    "a tensor for an amount": (ours(amount=torch.tensor(0.5)), TypeError, "amount: 0.5"),
    "more than there is": (ours(amount=321), ValueError, r"amount=321 .* the 2 parameters .*\d+$"),
    "more than the smaller layer has": (
        ours(amount=150, budget="layer"),
        ValueError,
        r"amount=150 .*parameters\[\d\].*\d+$",
    ),
    "more than a unit has": (
        ours(amount=13, budget="unit"),
        ValueError,
        r"amount=13 .*each unit of parameters\[0\].* \d+$",
    ),
    "more than an input has": (
        ours(AM, amount=9, budget="unit", units="in"),
        ValueError,
        r"amount=9 .*each unit of parameters\[\d\].* \d+$",
    ),
    # options
    "an unknown budget": (ours(amount=0.5, budget="row"), ValueError, "budget .*'row'"),
    "an unknown alignment": (
        ours(AM, amount=0.5, alignment="sine"),
        ValueError,
        "alignment .*cosine.*'sine'",
    ),
    "unknown units": (ours(AM, amount=0.5, units="rows"), ValueError, "units .*out.*'rows'"),
    "an unhashable budget": (ours(amount=0.5, budget=[]), ValueError, "budget"),
    "no generator": (ours(tap.Random, amount=0.5, generator=7), TypeError, "Generator, got int"),
    "n above m": (ours(tap.AlignedNM, n=5, m=4), ValueError, "n=5, m=4"),
    "n of nothing": (ours(tap.AlignedNM, n=0, m=4), ValueError, "n=0, m=4"),
    "a share for n": (ours(tap.AlignedNM, n=0.5, m=4), TypeError, "n should be an int, got 0.5"),
    "m that does not divide": (
        ours(tap.AlignedNM, n=2, m=3),
        ValueError,
        r"parameters\[1\].*multiple of m=3.*\(8, 16\)",
    ),
    "n of m of a bias": (
        lambda ps: tap.global_unstructured([(ps[0][0], "bias")], tap.AlignedNM, n=2, m=4),
        ValueError,
        r"parameters\[0\].*multiple of m=4.*\(16,\)",
    ),
    # references
    "too few references": (
        ours(AM, amount=0.5, reference=[torch.ones(16, 12)]),
        ValueError,
        "reference should have one tensor for each of the 2 parameters, got 1",
    ),
    "one tensor for two": (
        ours(AM, amount=0.5, reference=torch.ones(16, 12)),
        ValueError,
        "reference should have one tensor for each of the 2 parameters, got 1",
    ),
    "a reference missing": (
        lambda ps: tap.global_unstructured(
            ps, AM, amount=0.5, reference={ps[0]: torch.ones(16, 12)}
        ),
        ValueError,
        r"reference has no entry for parameters\[1\]",
    ),
    "references by module": (
        lambda ps: tap.global_unstructured(
            ps, AM, amount=0.5, reference={m: m.weight for m, _ in ps}
        ),
        (TypeError, ValueError),  # type: ignore[dict-item]
        "reference",
    ),
    "a reference of another shape": (
        per_parameter("reference", torch.ones(16, 8)),
        ValueError,
        r"reference of parameters\[1\].*\(8, 16\), got \(16, 8\)",
    ),
    "a reference of integers": (
        per_parameter("reference", torch.ones(8, 16).int()),
        TypeError,
        r"reference of parameters\[1\].*[Ii]nt",
    ),
    "a reference of lists": (
        per_parameter("reference", [[1.0] * 16] * 8),
        TypeError,
        r"reference of parameters\[1\].*tensor, got list",
    ),
    "a reference with NaN": (
        per_parameter("reference", torch.full((8, 16), NAN)),
        ValueError,
        r"scores of parameters\[1\].*NaN",
    ),
    "a reference with NaN, frobenius": (
        per_parameter("reference", torch.full((8, 16), NAN), alignment="frobenius"),
        ValueError,
        r"scores of parameters\[1\].*NaN",
    ),
    "a reference with NaN, both": (
        per_parameter("reference", torch.full((8, 16), NAN), units="both"),
        ValueError,
        r"scores of parameters\[1\].*NaN",
    ),
    "a reference with infinity": (
        per_parameter("reference", torch.full((8, 16), INF)),
        ValueError,
        r"scores of parameters\[1\].*finite",
    ),
    "a sparse reference": (
        per_parameter("reference", torch.ones(8, 16).to_sparse()),
        TypeError,
        r"reference of parameters\[1\].*strided tensor, got torch.sparse_coo",
    ),
    "a reference without values": (
        per_parameter("reference", torch.ones(8, 16, device="meta")),
        ValueError,
        r"reference of parameters\[1\].*values, got a tensor on the meta device",
    ),
    # input norms
    "too few norms": (
        ours(AM, amount=0.5, input_norms=[torch.ones(12)]),
        ValueError,
        "input_norms should have one tensor for each of the 2 parameters, got 1",
    ),
    "norms of another length": (
        per_parameter("input_norms", torch.ones(8)),
        ValueError,
        r"input_norms of parameters\[1\].*\(16,\).*got \(8,\)",
    ),
    "norms as a matrix": (
        per_parameter("input_norms", torch.ones(1, 16)),
        ValueError,
        r"input_norms of parameters\[1\].*\(16,\).*got \(1, 16\)",
    ),
    "one number for norms": (
        per_parameter("input_norms", torch.tensor(1.0)),
        ValueError,
        r"input_norms of parameters\[1\].*\(16,\).*got \(\)",
    ),
    "sparse norms": (
        per_parameter("input_norms", torch.ones(16).to_sparse()),
        TypeError,
        r"input_norms of parameters\[1\].*strided tensor, got torch.sparse_coo",
    ),
    "norms without values": (
        per_parameter("input_norms", torch.ones(16, device="meta")),
        ValueError,
        r"input_norms of parameters\[1\].*values, got a tensor on the meta device",
    ),
    "negative norms": (
        per_parameter("input_norms", -torch.ones(16)),
        ValueError,
        r"input_norms of parameters\[1\].*not negative",
    ),
    "norms with NaN": (
        per_parameter("input_norms", torch.full((16,), NAN)),
        ValueError,
        r"input_norms of parameters\[1\].*finite",
    ),
    "infinite norms": (
        per_parameter("input_norms", torch.full((16,), INF)),
        ValueError,
        r"input_norms of parameters\[1\].*finite",
    ),
    "norms as a list": (
        per_parameter("input_norms", [1.0] * 16),
        TypeError,
        r"input_norms of parameters\[1\].*tensor, got list",
    ),
    # importance scores
    "scores in a list": (
        with_scores(lambda ps: [torch.ones(3)]),
        TypeError,
        "importance_scores must be of type dict",
    ),
    "scores of another shape": (
        with_scores(lambda ps: {ps[1]: torch.ones(16, 8)}),
        AssertionError,
        r"parameters\[1\].*\(16, 8\) vs \(8, 16\)",
    ),
    "sparse scores": (
        with_scores(lambda ps: {ps[1]: torch.ones(8, 16).to_sparse()}),
        TypeError,
        r"scores of parameters\[1\].*strided tensor, got torch.sparse_coo",
    ),
    "scores without values": (
        with_scores(lambda ps: {ps[1]: torch.ones(8, 16, device="meta")}),
        ValueError,
        r"scores of parameters\[1\].*values, got a tensor on the meta device",
    ),
    "scores that are no tensor": (
        with_scores(lambda ps: {ps[1]: [1.0]}),
        TypeError,
        r"importance_scores of parameters\[1\].*tensor, got list",
    ),
    "scores of other parameters": (
        with_scores(lambda ps: {"1.weight": torch.ones(8, 16)}),
        ValueError,
        "keyed by the .* pairs of the parameters, got 1 other keys",
    ),
    "scores with NaN": (
        with_scores(lambda ps: {ps[1]: torch.full((8, 16), NAN)}),
        ValueError,
        r"scores of parameters\[1\].*NaN",
    ),
    "complex scores": (
        with_scores(lambda ps: {ps[1]: torch.ones(8, 16, dtype=torch.complex64)}),
        TypeError,
        r"parameters\[1\].*complex",
    ),
    "scores for Random": (
        with_scores(lambda ps: {ps[1]: torch.ones(8, 16)}, tap.Random),
        TypeError,
        "importance_scores",
    ),
    # apply and the functional forms
    "apply to an unknown name": (
        lambda ps: AM.apply(ps[1][0], "wait", 0.5),
        AttributeError,
        "Linear has no attribute 'wait'",
    ),
    "apply more than there is": (
        lambda ps: tap.Magnitude.apply(*ps[1], 129),
        ValueError,
        r"amount=129 .*Linear.weight.*\d+$",
    ),
    "apply with scores of another shape": (
        lambda ps: tap.aligned_magnitude(*ps[1], 0.5, importance_scores=torch.ones(3)),
        AssertionError,
        r"\(3,\) vs \(8, 16\)",
    ),
    "apply without an amount": (lambda ps: tap.Magnitude.apply(*ps[1]), TypeError, "amount"),
    "n of m that does not divide": (
        lambda ps: tap.aligned_nm(*ps[1], n=1, m=5),
        ValueError,
        r"multiple of m=5.*\(8, 16\)",
    ),
    # torch's own function with our methods
    "torch: more than there is": (
        lambda ps: prune.global_unstructured(ps, pruning_method=AM, amount=321),
        ValueError,
        "amount=321",
    ),
    "torch: a structure of something else": (
        lambda ps: prune.global_unstructured(
            ps, pruning_method=AM, amount=0.5, structure=[(nn.Linear(3, 3), "weight")]
        ),
        ValueError,
        r"structure should be the parameters .* with \d+ entries .* yet, got 9",
    ),
    "torch: a structure of modules": (
        lambda ps: prune.global_unstructured(
            ps, pruning_method=AM, amount=0.5, structure=[m for m, _ in ps]
        ),
        TypeError,
        r"\(module, name\) pairs",
    ),
    "torch: a structure that is a number": (
        lambda ps: prune.global_unstructured(ps, pruning_method=AM, amount=0.5, structure=7),
        TypeError,
        "structure|iterable",
    ),
    "torch: too few references": (
        lambda ps: prune.global_unstructured(
            ps, pruning_method=AM, amount=0.5, reference=[torch.ones(16, 12)]
        ),
        ValueError,
        "reference should have one tensor for each of the 2 parameters, got 1",
    ),
    "torch: m that does not divide": (
        lambda ps: prune.global_unstructured(ps, pruning_method=tap.AlignedNM, n=2, m=3),
        ValueError,
        "multiple of m=3",
    ),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_an_error_that_leaves_the_model_alone(
    case: str, state: Callable[[], nn.Module]
) -> None:
    call, error, message = CASES[case]
    model = state()
    record = Record(model)
    with pytest.raises(error, match=message):
        call(pairs(model))
    record.assert_untouched()


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "magnitude": (tap.Magnitude, {}),
    "magnitude, unit": (tap.Magnitude, {"budget": "unit"}),
    "cosine": (AM, {}),
    "cosine, in": (AM, {"units": "in"}),
    "cosine, unit": (AM, {"budget": "unit"}),
    "both": (AM, {"units": "both"}),
    "frobenius": (AM, {"alignment": "frobenius"}),
    "frobenius, layer": (AM, {"alignment": "frobenius", "budget": "layer"}),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("amount", [0, 1, 0.5, 1.0])
def test_nan_among_the_weights(name: str, amount: float, state: Callable[[], nn.Module]) -> None:
    method, options = METHODS[name]
    model = state()
    spoil(NAN)(model)
    record = Record(model)
    with pytest.raises(ValueError, match=r"scores of parameters\[1\] .*NaN"):
        tap.global_unstructured(pairs(model), method, amount=amount, **options)
    record.assert_untouched()


@pytest.mark.parametrize("name", [name for name in METHODS if "magnitude" not in name])
def test_infinity_among_the_weights_of_an_aligned_method(name: str) -> None:
    method, options = METHODS[name]
    model = dense()
    spoil(INF)(model)
    record = Record(model)
    with pytest.raises(ValueError, match=r"scores of parameters\[1\]"):
        tap.global_unstructured(pairs(model), method, amount=0.5, **options)
    record.assert_untouched()


def test_infinity_is_the_largest_magnitude() -> None:
    model = dense()
    spoil(INF)(model)
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=319)
    assert bool(second_weight(model)[model.get_submodule("2").weight_mask].isinf().all())


def test_nan_that_is_pruned_already_does_not_count() -> None:
    layer = nn.Linear(4, 4)
    prune.custom_from_mask(layer, "weight", torch.eye(4))
    layer.weight_orig.data[0, 1] = NAN
    tap.magnitude(layer, "weight", 2)
    assert int(layer.weight_mask.sum()) == 2


@pytest.mark.parametrize("name", METHODS)
def test_nan_in_n_of_m_and_in_the_plain_call_of_torch(name: str) -> None:
    method, options = METHODS[name]
    model = dense()
    spoil(NAN)(model)
    record = Record(model)
    with pytest.raises(ValueError, match="NaN"):
        prune.global_unstructured(pairs(model), pruning_method=method, amount=0.5, **options)
    record.assert_untouched()
    with pytest.raises(ValueError, match=r"scores of parameters\[1\].*NaN"):
        tap.global_unstructured(pairs(model), tap.AlignedNM)
    record.assert_untouched()


# Parameters that cannot be pruned


def of_integers() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
    return module


def complex_numbers() -> nn.Module:
    return nn.Linear(4, 4, dtype=torch.complex64)


def float8() -> nn.Module:
    module = nn.Module()
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def sparse() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.eye(4).to_sparse())
    return module


def lazy() -> nn.Module:
    return nn.LazyLinear(4)


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 4))


def a_buffer() -> nn.Module:
    module = nn.Module()
    module.register_buffer("weight", torch.ones(4, 4))
    return module


def an_empty_slot() -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = None  # type: ignore[assignment]
    return module


def a_taken_mask() -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight_mask = None
    return module


def a_taken_orig() -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight_orig = "of old"  # type: ignore[assignment]
    return module


def a_mask_that_scales() -> nn.Module:
    module = nn.Linear(4, 4)
    prune.custom_from_mask(module, "weight", torch.full((4, 4), 0.5))
    return module


def a_mask_of_nan() -> nn.Module:
    module = nn.Linear(4, 4)
    prune.custom_from_mask(module, "weight", torch.full((4, 4), NAN))
    return module


def a_mask_of_its_own() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_buffer("weight_mask", torch.ones(4, 4))
    return module


UNFIT: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "integers": (of_integers, TypeError, "float32.*got torch.int64"),
    "complex numbers": (complex_numbers, TypeError, "float32.*got torch.complex64"),
    "float8": (float8, TypeError, "float32.*got torch.float8_e4m3fn"),
    "sparse": (sparse, TypeError, "strided tensor, got torch.sparse_coo"),
    "lazy": (lazy, TypeError, "not initialized yet"),
    "parametrized": (parametrized, TypeError, "torch.nn.Parameter of its module"),
    "a buffer": (a_buffer, TypeError, "torch.nn.Parameter of its module.*got Tensor"),
    "an empty slot": (an_empty_slot, TypeError, "torch.nn.Parameter of its module.*got NoneType"),
    "a taken mask": (a_taken_mask, ValueError, "attribute 'weight_mask' already"),
    "a taken orig": (a_taken_orig, ValueError, "attribute 'weight_orig' already"),
    "a mask that scales": (a_mask_that_scales, ValueError, "no numbers but 0 and 1, got 0.5"),
    "a mask of NaN": (a_mask_of_nan, ValueError, "no numbers but 0 and 1, got nan"),
    "a mask of its own": (a_mask_of_its_own, ValueError, "attribute 'weight_mask' already"),
}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (tap.Magnitude, {"amount": 0.5}),
        (tap.Magnitude, {"amount": 0.5, "budget": "unit"}),
        (AM, {"amount": 0.5}),
        (AM, {"amount": 0.5, "units": "both"}),
        (AM, {"amount": 0.5, "alignment": "frobenius"}),
        (tap.AlignedNM, {}),
        (tap.Random, {"amount": 0.5}),
    ],
)
@pytest.mark.parametrize("case", UNFIT)
def test_parameters_that_cannot_be_pruned(
    case: str, method: type[tap.PruningMethod], options: dict[str, Any]
) -> None:
    make, error, message = UNFIT[case]
    unfit, good = make(), mlp()
    params = [*pairs(good), (unfit, "weight")]
    records = Record(unfit), Record(good)
    with pytest.raises(error, match=rf"parameters\[2\].*{message}"):
        tap.global_unstructured(params, method, **options)
    for record in records:
        record.assert_untouched()


def test_names_of_prunable_parameters_are_in_the_message() -> None:
    model = mlp()
    params = tap.prunable_parameters(model)
    spoil(NAN)(model)
    with pytest.raises(ValueError, match=r"scores of 2.weight .*NaN"):
        tap.global_unstructured(params, AM, amount=0.5)
    with pytest.raises(ValueError, match=r"reference of 0.weight should have shape \(16, 12\)"):
        tap.global_unstructured(params, AM, amount=0.5, reference=[torch.ones(1)] * 2)


def test_tied_weights_with_masks_that_differ() -> None:
    model = Tied()
    tap.magnitude(model.a, "weight", 0.5)
    tap.random(model.b, "weight", 0.5)
    record = Record(model)
    params: list[Pair] = [(model.a, "weight"), (model.b, "weight")]
    with pytest.raises(ValueError, match=r"parameters\[1\].*tied to parameters\[0\].*masks differ"):
        tap.global_unstructured(params, AM, amount=0.5)
    record.assert_untouched()


def test_tied_weights_of_which_one_place_is_pruned() -> None:
    model = Tied()
    tap.magnitude(model.a, "weight", 0.5)
    record = Record(model)
    params: list[Pair] = [(model.a, "weight"), (model.b, "weight")]
    with pytest.raises(ValueError, match="masks differ"):
        tap.global_unstructured(params, AM, amount=0.5)
    record.assert_untouched()


def test_a_scripted_module_takes_no_hook() -> None:
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit.script"):
        scripted = torch.jit.script(nn.Linear(4, 4))
    before = sorted(scripted.state_dict())
    with pytest.raises(TypeError, match=r"parameters\[0\].*ScriptModule"):
        tap.magnitude(scripted, "weight", 0.5)
    assert sorted(scripted.state_dict()) == before


def test_running_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products with the masks are made for all parameters before the first is pruned."""
    model = pruned_by_us()
    held = [getattr(*pair) for pair in pairs(model)]  # so that their memory is not taken over
    record = Record(model)
    product = hooks._product
    calls = 0

    def second_fails(original: Tensor, mask: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no memory")
        return product(original, mask)

    monkeypatch.setattr(hooks, "_product", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.5)
    assert calls == 2
    record.assert_untouched()
    assert all(a is getattr(*pair) for a, pair in zip(held, pairs(model), strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_parameters_on_two_devices() -> None:
    model = mlp()
    model[2].cuda()
    record = Record(model)
    with pytest.raises(ValueError, match="on one device"):
        tap.global_unstructured(pairs(model), AM, amount=0.5)
    record.assert_untouched()


@pytest.mark.parametrize("made", [mlp, Tied])
@pytest.mark.parametrize(
    "call",
    [
        lambda model: tap.Pruner(model, tap.Magnitude, tap.schedules.constant(0.5)),
        tap.Pruner.freeze,
        tap.Reference.capture,
        lambda model: tap.CosineAlignment(model, []),
        tap.criteria.Movement,
        tap.criteria.magnitude,
        tap.alignment_report,
        lambda model: tap.Calibration.collect(model, [torch.ones(1, 12)], model),
        tap.to_semi_structured,
    ],
)
def test_a_model_in_the_place_of_its_parameters(
    call: Callable[[Any], Any], made: Callable[[], nn.Module]
) -> None:
    model = made()
    record = Record(model)
    with pytest.raises(TypeError, match=r"got (Sequential|Tied); prunable_parameters\(model\)"):
        call(model)
    record.assert_untouched()
