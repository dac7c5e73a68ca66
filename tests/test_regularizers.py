"""CosineAlignment and FrobeniusAlignment against three lines of plain torch."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import reference as plain
import torchalignprune as tap
from models import Pair, Tied, holder, mixed, mlp, pairs, prune_with_torch, prune_with_us
from torchalignprune.parameters import unit_dimension

Penalty = tap.CosineAlignment | tap.FrobeniusAlignment


def matrices(params: list[Pair], references: list[Tensor], units: str) -> list[Any]:
    """(pruned, reference) of each parameter with a row for each unit; pruned has a gradient."""
    found = []
    for (module, name), r in zip(params, references, strict=True):
        if hasattr(module, f"{name}_orig"):
            p = getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")
        else:
            p = getattr(module, name)
        dim = unit_dimension(module, name)
        dim = 1 - dim if units == "in" and p.dim() > 1 else dim
        found.append((plain.units_first(p, dim), plain.units_first(r.to(p.dtype), dim)))
    return found


def gradients(value: Tensor, params: list[Pair]) -> list[Tensor]:
    leaves = [
        getattr(module, f"{name}_orig", None)
        if hasattr(module, f"{name}_orig")
        else getattr(module, name)
        for module, name in params
    ]
    return list(torch.autograd.grad(value, leaves))


def references_near(params: list[Pair], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for module, name in params:
        w = getattr(module, name).detach()
        noise = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        found.append((w.double() + noise / 4).to(w.dtype))
    return found


def test_cosine_of_two_units() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data.copy_(torch.tensor([[4.0, 3.0], [1.0, 0.0]]))
    penalty = tap.CosineAlignment([(layer, "weight")], [layer.weight.detach().clone()])
    assert penalty().item() == 0
    prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert math.isclose(penalty().item(), 0.1, rel_tol=1e-6)  # (1 - 0.8 + 1 - 1) / 2
    layer.weight_orig.data.copy_(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    loss = penalty()
    assert math.isclose(loss.item(), 0.6, rel_tol=1e-6)  # (1 - 0.8 + 1 - 0) / 2
    loss.backward()
    # -m (r / (|p||r|) - A p / |p|^2) / 2
    torch.testing.assert_close(layer.weight_orig.grad, torch.tensor([[0.0, 0.0], [-0.5, 0.0]]))


def test_frobenius_of_two_parameters() -> None:
    a, b = nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False)
    a.weight.data.copy_(torch.tensor([[4.0, 3.0]]))
    b.weight.data.fill_(2.0)
    params = [(a, "weight"), (b, "weight")]
    reference = tap.Reference.capture(params)
    penalty = tap.FrobeniusAlignment(params, reference)
    prune.custom_from_mask(a, "weight", torch.tensor([[1.0, 0.0]]))
    b.weight.data.fill_(3.0)
    loss = penalty()
    assert math.isclose(loss.item(), (9 / 25 + 1 / 4) / 2, rel_tol=1e-6)
    assert penalty.per_parameter() == pytest.approx(
        {"parameters[0] (Linear.weight)": 0.18, "parameters[1] (Linear.weight)": 0.125}
    )
    loss.backward()
    torch.testing.assert_close(a.weight_orig.grad, torch.zeros(1, 2))
    torch.testing.assert_close(b.weight.grad, torch.tensor([[2 * 1 / 4 / 2]]))
    whole = tap.FrobeniusAlignment(params, reference, normalize=False)
    assert math.isclose(whole().item(), (9 + 1) / 2, rel_tol=1e-6)


@pytest.mark.parametrize("pruned", [None, prune_with_torch, prune_with_us])
@pytest.mark.parametrize("units", ["out", "in", "both"])
@pytest.mark.parametrize("make", [mlp, mixed, Tied])
def test_cosine_equals_plain_torch(
    make: Callable[[], nn.Module],
    units: Any,
    pruned: Callable[[list[Pair]], None] | None,
    dtype: torch.dtype,
) -> None:
    model = make().to(dtype)
    params = pairs(model)[:1] if isinstance(model, Tied) else pairs(model)
    references = references_near(params)
    if pruned:
        pruned(params)
    penalty = tap.CosineAlignment(params, references, units=units)
    sides = ["out", "in"] if units == "both" else [units]
    expected = sum(
        plain.cosine_alignment(matrices(params, references, side)) for side in sides
    ) / len(sides)
    value = penalty()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    low = dtype in (torch.float16, torch.bfloat16)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if low else {}
    torch.testing.assert_close(value.double(), expected, **({} if low is False else tolerance))
    for found, wanted in zip(gradients(value, params), gradients(expected, params), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pruned", [None, prune_with_torch, prune_with_us])
def test_frobenius_equals_plain_torch(
    normalize: bool, pruned: Callable[[list[Pair]], None] | None, dtype: torch.dtype
) -> None:
    params = pairs(mixed().to(dtype))
    references = references_near(params)
    if pruned:
        pruned(params)
    penalty = tap.FrobeniusAlignment(params, references, normalize=normalize, weights=range(1, 8))
    expected = plain.frobenius_alignment(
        matrices(params, references, "out"), normalize, [float(i) for i in range(1, 8)]
    )
    value = penalty()
    low = dtype in (torch.float16, torch.bfloat16)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if low else {}
    torch.testing.assert_close(value.double(), expected, **tolerance)
    for found, wanted in zip(gradients(value, params), gradients(expected, params), strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4)) | st.tuples(st.integers(1, 5)),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 10_000),
    share=st.floats(0, 1),
)
def test_zero_units_and_any_mask(shapes: list[tuple[int, ...]], seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).double()

    module = holder(*[draw(shape) for shape in shapes])
    params = pairs(module)
    references = [draw(shape) for shape in shapes]
    for (_, name), shape in zip(params, shapes, strict=True):
        mask = torch.rand(shape, generator=generator) >= share
        prune.custom_from_mask(module, name, mask.double())
    both = matrices(params, references, "out")
    cosine = tap.CosineAlignment(params, references)
    torch.testing.assert_close(cosine(), plain.cosine_alignment(both))
    frobenius = tap.FrobeniusAlignment(params, references)
    torch.testing.assert_close(frobenius(), plain.frobenius_alignment(both))
    for penalty in (cosine, frobenius):
        for grad in gradients(penalty(), params):
            assert grad.isfinite().all()
        whole = sum(penalty.per_parameter().values())
        assert math.isclose(whole, penalty().item(), rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("kind", [tap.CosineAlignment, tap.FrobeniusAlignment])
def test_double_precision_gradients(kind: type[Penalty]) -> None:
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    params = [(layer, "weight")]
    penalty = kind(params, references_near(params))
    prune.random_unstructured(layer, "weight", amount=0.3)

    def function(weight: Tensor) -> Tensor:
        layer._parameters["weight_orig"] = weight  # type: ignore[assignment]
        return penalty()

    weight = layer.weight_orig.detach().requires_grad_()
    assert torch.autograd.gradcheck(function, (weight,))
    assert torch.autograd.gradgradcheck(function, (weight,))


@pytest.mark.parametrize("kind", [tap.CosineAlignment, tap.FrobeniusAlignment])
def test_sees_the_mask_of_the_moment(kind: type[Penalty]) -> None:
    model = mlp()
    params = pairs(model)
    penalty = kind(params, tap.Reference.capture(params))
    values = [penalty().item()]
    for amount in (0.2, 0.2, 0.2):
        prune.global_unstructured(params, pruning_method=tap.AlignedMagnitude, amount=amount)
        values.append(penalty().item())
    assert values == sorted(values)
    assert abs(values[0]) < 1e-7
    assert values[1] > 0.001
    for module, name in params:
        prune.remove(module, name)
    assert math.isclose(penalty().item(), values[-1], rel_tol=1e-6)
    penalty().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("kind", [tap.CosineAlignment, tap.FrobeniusAlignment])
def test_descent_brings_the_weights_back(kind: type[Penalty]) -> None:
    model = mlp()
    params = pairs(model)
    penalty = kind(params, tap.Reference.capture(params))
    tap.global_unstructured(params, tap.Magnitude, amount=0.3)
    lowest = penalty().item()
    leaves = [module.weight_orig for module, _ in params]
    with torch.no_grad():
        for leaf in leaves:
            leaf.add_(torch.randn_like(leaf) * leaf.std() / 2)
    optimizer = torch.optim.SGD(leaves, lr=2.0)
    assert penalty().item() > 1.2 * lowest
    for _ in range(500):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert math.isclose(penalty().item(), lowest, rel_tol=0.02)


def test_a_unit_that_is_all_pruned_counts_one_and_has_no_gradient() -> None:
    layer = nn.Linear(3, 2, bias=False)
    penalty = tap.CosineAlignment([(layer, "weight")], [torch.ones(2, 3)])
    prune.custom_from_mask(layer, "weight", torch.tensor([[0.0] * 3, [1.0] * 3]))
    layer.weight_orig.data.fill_(1.0)
    loss = penalty()
    assert math.isclose(loss.item(), 0.5, rel_tol=1e-6)
    loss.backward()
    torch.testing.assert_close(layer.weight_orig.grad, torch.zeros(2, 3), atol=1e-7, rtol=0)


def test_units_and_parameters_without_a_reference_do_not_count() -> None:
    module = holder(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2))
    references = [torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2), torch.ones(2)]
    cosine = tap.CosineAlignment(pairs(module), references)
    assert math.isclose(cosine().item(), (1 - math.sqrt(0.5)) / 2, rel_tol=1e-6)
    frobenius = tap.FrobeniusAlignment(pairs(module), references)
    assert math.isclose(frobenius().item(), 3 / 2, rel_tol=1e-6)
    nothing = tap.CosineAlignment([(module, "weight1")], [torch.zeros(2, 2)])
    assert nothing().item() == 0
    first, *others = cosine.per_parameter().values()
    assert first == pytest.approx(cosine().item())
    assert others == pytest.approx([0, 0], abs=1e-12)


def test_parameters_without_entries() -> None:
    module = holder(torch.empty(0, 3), torch.ones(2, 2))
    for kind in (tap.CosineAlignment, tap.FrobeniusAlignment):
        penalty = kind(pairs(module), tap.Reference.capture(pairs(module)))
        assert penalty().item() == 0


def test_weights_that_are_their_reference_cost_exactly_nothing(dtype: torch.dtype) -> None:
    module = holder(*(torch.randn(50, n, dtype=dtype) for n in range(1, 20)))
    for kind in (tap.CosineAlignment, tap.FrobeniusAlignment):
        penalty = kind(pairs(module), tap.Reference.capture(pairs(module)))
        assert penalty().item() == 0


def test_weights_of_the_mean() -> None:
    module = holder(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    params, references = pairs(module), [torch.tensor([[1.0, 0.0]])] * 2
    gap = 1 - math.sqrt(0.5)
    for weights in ([3.0, 1.0], {params[0]: 3, params[1]: 1}):
        penalty = tap.CosineAlignment(params, references, weights=weights)
        assert math.isclose(penalty().item(), 0.75 * gap, rel_tol=1e-6)


def test_tied_weights_count_once() -> None:
    model = Tied()
    params = pairs(model)
    prune.global_unstructured(params[:1], pruning_method=prune.L1Unstructured, amount=0.0)
    prune.remove(*params[0])
    model.b.weight = model.a.weight
    references = references_near(params[:1])
    once = tap.CosineAlignment(params[:1], references)
    twice = tap.CosineAlignment(params, references)
    assert once().item() == twice().item()
    assert len(twice.per_parameter()) == 1


def test_frozen_parameters_have_a_value_and_no_gradient() -> None:
    model = mlp()
    params = pairs(model)
    penalty = tap.FrobeniusAlignment(params, references_near(params))
    model[0].weight.requires_grad_(False)
    penalty().backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


@pytest.mark.parametrize("kind", [tap.CosineAlignment, tap.FrobeniusAlignment])
def test_frozen_parameters_take_no_memory_in_the_backward(kind: Any) -> None:
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            outputs = made if isinstance(made, list | tuple) else [made]
            sizes.extend(o.numel() for o in outputs if isinstance(o, Tensor))
            return made

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(100, 100))
    params = pairs(model)
    penalty = kind(params, references_near(params))
    (expected,) = torch.autograd.grad(penalty(), model[0].weight)
    model[2].weight.requires_grad_(False)
    value = penalty()
    sizes: list[int] = []
    with Sizes():
        (found,) = torch.autograd.grad(value, model[0].weight)
    assert torch.equal(found, expected)
    assert sizes and max(sizes) < 10_000


def test_follows_the_model_to_another_dtype() -> None:
    model = mlp()
    params = pairs(model)
    reference = tap.Reference.capture(params, dtype=torch.bfloat16)
    penalty = tap.CosineAlignment(params, reference)
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    expected = penalty().item()
    model.to(torch.float64)
    assert penalty().dtype == torch.float64
    assert math.isclose(penalty().item(), expected, rel_tol=1e-5)


def test_the_penalty_owns_nothing_of_the_model() -> None:
    params = pairs(mlp())
    penalty = tap.CosineAlignment(params, tap.Reference.capture(params))
    assert not list(penalty.parameters())
    assert not penalty.state_dict()
    assert not list(penalty.children())


@pytest.mark.parametrize("kind", [tap.CosineAlignment, tap.FrobeniusAlignment])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(kind: type[Penalty], backend: str) -> None:
    model = mlp()
    params = pairs(model)
    penalty = kind(params, references_near(params))
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    expected = penalty()
    wanted = gradients(expected, params)
    compiled = torch.compile(penalty, fullgraph=True, backend=backend)
    value = compiled()
    torch.testing.assert_close(value, expected)
    for found, one in zip(gradients(value, params), wanted, strict=True):
        torch.testing.assert_close(found, one)


def test_autocast_changes_nothing() -> None:
    params = pairs(mlp())
    penalty = tap.CosineAlignment(params, references_near(params))
    expected = penalty()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = penalty()
    assert torch.equal(value, expected)
    for found, wanted in zip(gradients(value, params), gradients(expected, params), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_suggested_strength_makes_the_share(scale: float) -> None:
    model = mlp()
    params = pairs(model)
    with torch.no_grad():
        for module, _ in params:
            module.weight.mul_(scale)
    penalty = tap.CosineAlignment(params, tap.Reference.capture(params))
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    loss = model(torch.randn(6, 12)).square().mean()
    with pytest.raises(ValueError, match="have the weights moved since"):
        penalty.suggest_strength(loss)
    with torch.no_grad():
        model[0].weight_orig.add_(scale * torch.randn(16, 12) / 100)
    loss = model(torch.randn(6, 12)).square().mean()
    strength = penalty.suggest_strength(loss, share=0.25)
    assert all(parameter.grad is None for parameter in model.parameters())

    def norm(value: Tensor) -> float:
        return math.sqrt(sum(float(g.square().sum()) for g in gradients(value, params)))

    assert math.isclose(norm(strength * penalty()), 0.25 * norm(loss), rel_tol=1e-5)


def test_no_strength_without_a_gradient() -> None:
    model = mlp()
    params = pairs(model)
    penalty = tap.FrobeniusAlignment(params, tap.Reference.capture(params))
    loss = model(torch.randn(6, 12)).square().mean()
    with pytest.raises(ValueError, match=r"the gradient of the penalty .* got the norm 0.0e"):
        penalty.suggest_strength(loss)
    with pytest.raises(ValueError, match="share should be positive and finite, got 0"):
        penalty.suggest_strength(loss, share=0)
    with pytest.raises(
        ValueError, match="task_loss should have a grad_fn, got a tensor without one"
    ):
        penalty.suggest_strength(loss.detach())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the parameters of the penalty requires"):
        penalty.suggest_strength(loss)


@pytest.mark.parametrize("method", ["greedy", "hungarian"])
@pytest.mark.parametrize("units", ["out", "in"])
def test_matching_finds_units_that_changed_places(method: Any, units: Any) -> None:
    layer = nn.Linear(12, 16, bias=False)
    original = layer.weight.detach().clone()
    order = torch.randperm(16 if units == "out" else 12)
    layer.weight.data.copy_(original[order] if units == "out" else original[:, order])
    params = [(layer, "weight")]
    plainly = tap.CosineAlignment(params, [original], units=units)
    matched = tap.CosineAlignment(params, [original], units=units, matching=method)
    assert plainly().item() > 0.5
    assert abs(matched().item()) < 1e-6
    tap.magnitude(layer, "weight", amount=0.3)
    moved = original[order] if units == "out" else original[:, order]
    in_place = tap.CosineAlignment(params, [moved], units=units)
    torch.testing.assert_close(matched(), in_place())
    torch.testing.assert_close(gradients(matched(), params)[0], gradients(in_place(), params)[0])


def test_a_matching_is_kept_for_so_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    params = pairs(mlp())
    made = []
    match = tap.regularizers.match_units
    monkeypatch.setattr(
        tap.regularizers, "match_units", lambda *a, **k: made.append(1) or match(*a, **k)
    )
    penalty = tap.CosineAlignment(params, references_near(params), matching="greedy", match_every=3)
    for _ in range(7):
        penalty()
        if penalty.matching_state()["calls"] % 3:
            with torch.no_grad():  # as for a log, which is no step of the training
                penalty()
    assert len(made) == 3 * len(params)


@pytest.mark.parametrize("matching", [None, "greedy"])
def test_any_iterable_of_pairs_is_welcome(matching: Any) -> None:
    params = pairs(mlp())
    references = references_near(params)
    found = tap.CosineAlignment(iter(params), references, matching=matching)()
    assert torch.equal(found, tap.CosineAlignment(params, references, matching=matching)())


def test_what_is_pruned_of_a_unit_is_not_matched() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data.copy_(torch.tensor([[5.0, 1.0], [1.0, 1.0]]))
    params = [(layer, "weight")]
    prune.custom_from_mask(layer, "weight", torch.tensor([[0, 1], [1, 1]]))
    penalty = tap.CosineAlignment(params, [torch.eye(2)], matching="greedy")
    assert math.isclose(penalty().item(), (1 - math.sqrt(0.5)) / 2, rel_tol=1e-6)


def test_a_copy_shares_the_reference() -> None:
    params = pairs(mlp())
    penalty = tap.FrobeniusAlignment(params, references_near(params))
    for twin, target in zip(copy.deepcopy(penalty)._targets, penalty._targets, strict=True):
        assert twin.reference is target.reference


@pytest.mark.parametrize("kind", [tap.CosineAlignment, tap.FrobeniusAlignment])
def test_nan_is_not_hidden(kind: type[Penalty]) -> None:
    params = pairs(mlp())
    references = references_near(params)
    references[1][0, 0] = math.nan
    assert math.isnan(kind(params, references)().item())
    penalty = kind(params, references_near(params))
    params[0][0].weight.data[0, 0] = math.nan
    assert math.isnan(penalty().item())


def test_the_parameters_themselves_are_no_reference() -> None:
    params = pairs(mlp())
    with pytest.raises(
        ValueError, match=r"the reference of .* should be a copy, got the parameter itself"
    ):
        tap.CosineAlignment(params, {pair: getattr(*pair) for pair in params})


def test_a_coarse_reference_does_not_look_like_movement() -> None:
    model = mlp()
    params = pairs(model)
    penalty = tap.CosineAlignment(params, tap.Reference.capture(params, dtype=torch.bfloat16))
    loss = model(torch.randn(6, 12)).square().mean()
    with pytest.raises(ValueError, match="have the weights moved since"):
        penalty.suggest_strength(loss)
    with pytest.raises(TypeError, match="task_loss should be a scalar tensor"):
        penalty.suggest_strength(model(torch.randn(6, 12)))


def test_a_pickle_goes_on_counting() -> None:
    model = mlp()
    params = pairs(model)
    reference = references_near(params)
    penalty = tap.CosineAlignment(params, reference, matching="greedy", match_every=2)
    penalty()
    twin = pickle.loads(pickle.dumps(penalty))
    assert torch.equal(twin(), penalty())
    assert twin.matching_state()["calls"] == penalty.matching_state()["calls"] == 2


@pytest.mark.filterwarnings("ignore")  # torch's own, where the graph breaks
def test_matching_compiles() -> None:
    params = pairs(mlp())
    penalty = tap.CosineAlignment(params, references_near(params), matching="greedy", match_every=2)
    expected = penalty()
    compiled = torch.compile(penalty, backend="eager")
    for _ in range(4):
        torch.testing.assert_close(compiled(), expected)


def test_a_copy_looks_at_the_copied_model() -> None:
    model = mlp()
    params = pairs(model)
    penalty = tap.CosineAlignment(params, references_near(params))
    twin = copy.deepcopy(penalty)
    with torch.no_grad():
        model[0].weight.zero_()
    assert twin().item() < penalty().item()


P = pairs(mlp())
R = [module.weight.detach().clone() for module, _ in P]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tap.CosineAlignment(P, None), TypeError, "such as Reference.capture"),
        (lambda: tap.CosineAlignment([], R), ValueError, "at least one"),
        (lambda: tap.CosineAlignment(P, R[:1]), ValueError, "one tensor for each of the 2"),
        (
            lambda: tap.FrobeniusAlignment(P, R[::-1]),
            ValueError,
            r"the reference of parameters\[0\] \(Linear.weight\) should have shape \(16, 12\)",
        ),
        (lambda: tap.CosineAlignment(P, {P[0]: R[0]}), ValueError, "reference has no entry for"),
        (lambda: tap.CosineAlignment(P, R, units="rows"), ValueError, "units should be one of"),
        (
            lambda: tap.CosineAlignment(P, R, matching="exact"),
            ValueError,
            "matching should be one of",
        ),
        (
            lambda: tap.CosineAlignment(P, R, matching="greedy", units="both"),
            ValueError,
            "units should be 'out' or 'in' with matching, got 'both'",
        ),
        (
            lambda: tap.CosineAlignment(P, R, matching="greedy", match_every=0),
            ValueError,
            "match_every should be a number of calls of at least 1, got 0",
        ),
        (
            lambda: tap.CosineAlignment(P, R, weights=2.0),
            TypeError,
            "weights should be numbers, one for each parameter, got float",
        ),
        (
            lambda: tap.CosineAlignment(P, P[0][0]),
            TypeError,
            "reference should be tensors, one for each parameter, got Linear",
        ),
        (
            lambda: tap.FrobeniusAlignment(P, [r.long() for r in R]),
            TypeError,
            r"the reference of .* should have real numbers, got torch.int64",
        ),
        (
            lambda: tap.CosineAlignment(P, R, weights=[1]),
            ValueError,
            "one number for each of the 2",
        ),
        (
            lambda: tap.FrobeniusAlignment(P, R, weights=[1, -1]),
            ValueError,
            r"the weight of parameters\[1\] .* should be finite and not negative, got -1",
        ),
        (lambda: tap.CosineAlignment(P, R, weights=[0, 0]), ValueError, "not all be zero"),
        (lambda: tap.CosineAlignment(P, R, weights={P[0]: 1}), ValueError, "weights has no entry"),
    ],
)
def test_bad_input(make: Callable[[], Penalty], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_nothing_is_copied_to_the_device_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would wait for it."""
    model = mlp()
    params = tap.prunable_parameters(model)
    penalty = tap.CosineAlignment(params, tap.Reference.capture(params))

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("a tensor is made of numbers")

    monkeypatch.setattr(Tensor, "new_tensor", refuse)
    monkeypatch.setattr(torch, "tensor", refuse)
    penalty().backward()
