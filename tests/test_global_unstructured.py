"""tap.global_unstructured, and Magnitude against torch's L1Unstructured."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import torchalignprune as tap
from models import (
    Tied,
    assert_same_masks,
    holder,
    kept,
    mask_list,
    mixed,
    mlp,
    pairs,
    weights_of,
)
from strategies import SHARES, amounts, laid_out, masks, shapes, tensors, thorough
from torchalignprune.hooks import MaskHook

METHODS: dict[str, tuple[type[tap.PruningMethod], dict[str, Any]]] = {
    "magnitude": (tap.Magnitude, {"amount": 0.4}),
    "magnitude, layer": (tap.Magnitude, {"amount": 0.4, "budget": "layer"}),
    "magnitude, unit": (tap.Magnitude, {"amount": 0.4, "budget": "unit"}),
    "cosine": (tap.AlignedMagnitude, {"amount": 0.4}),
    "cosine, in": (tap.AlignedMagnitude, {"amount": 0.4, "units": "in"}),
    "cosine, both": (tap.AlignedMagnitude, {"amount": 0.4, "units": "both"}),
    "cosine, unit": (tap.AlignedMagnitude, {"amount": 0.4, "budget": "unit"}),
    "frobenius": (tap.AlignedMagnitude, {"amount": 0.4, "alignment": "frobenius"}),
    "2:4": (tap.AlignedNM, {"n": 2, "m": 4}),
    "random": (tap.Random, {"amount": 0.4}),
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> tuple[type[tap.PruningMethod], dict[str, Any]]:
    return METHODS[request.param]


# One hook, one mask


def hooks_of(module: nn.Module, name: str) -> list[object]:
    return [
        hook
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name
    ]


def test_one_hook_and_one_bool_mask_however_often_it_is_pruned(
    method: tuple[type[tap.PruningMethod], dict[str, Any]], dtype: torch.dtype, device: str
) -> None:
    model = mlp(dtype).to(device)
    params = pairs(model)
    originals = [getattr(*pair) for pair in params]
    tap.global_unstructured(params, method[0], **method[1])
    first = [hooks_of(module, name) for module, name in params]
    for _ in range(3):
        model(torch.randn(2, 12, dtype=dtype, device=device))
        tap.global_unstructured(params, method[0], **method[1])
    for (module, name), original, hooks in zip(params, originals, first, strict=True):
        (hook,) = hooks_of(module, name)
        assert [hook] == hooks
        assert type(hook) is MaskHook
        assert len(module._forward_pre_hooks) == 1
        assert module.weight_orig is original
        assert dict(module.named_buffers()).keys() == {"weight_mask"}
        assert module.weight_mask.dtype == torch.bool
        assert module.weight_mask.device.type == device
        assert dict(module.named_parameters()).keys() == {"weight_orig", "bias"}
        assert torch.equal(module.weight, original * module.weight_mask)
        assert module.weight.dtype == dtype


def test_pruned_entries_stay_pruned(
    method: tuple[type[tap.PruningMethod], dict[str, Any]],
) -> None:
    params = pairs(mlp())
    before = [torch.ones_like(w, dtype=torch.bool) for w in weights_of(params)]
    for _ in range(3):
        tap.global_unstructured(params, method[0], **method[1])
        after = mask_list(params)
        assert not any(bool((new & ~old).any()) for new, old in zip(after, before, strict=True))
        before = after


def test_weights_and_gradients_are_left_alone(
    method: tuple[type[tap.PruningMethod], dict[str, Any]],
) -> None:
    model = mlp()
    params = pairs(model)
    model(torch.randn(2, 12)).sum().backward()
    before = [(module.weight.clone(), module.weight.grad.clone()) for module, _ in params]
    tap.global_unstructured(params, method[0], **method[1])
    for (module, _), (weight, grad) in zip(params, before, strict=True):
        assert torch.equal(module.weight_orig, weight)
        assert torch.equal(module.weight_orig.grad, grad)


def test_pruned_entries_get_no_gradient_and_the_others_do() -> None:
    model = mlp()
    tap.global_unstructured(pairs(model), tap.AlignedMagnitude, amount=0.5)
    model(torch.randn(64, 12)).square().sum().backward()
    for module, _ in pairs(model):
        grad = module.weight_orig.grad
        assert bool((grad[~module.weight_mask] == 0).all())
        assert bool((grad[module.weight_mask] != 0).any())


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "channels_last"])
def test_the_weight_is_there_and_differentiable_before_the_first_forward(
    layout: str, dtype: torch.dtype
) -> None:
    params = pairs(holder(laid_out(torch.randn(8, 6, 3, 2).to(dtype), layout), torch.ones(())))
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    (module, _), (mask, _) = params[0], mask_list(params)
    assert torch.equal(module.weight0, module.weight0_orig * mask)
    first = module.weight0
    (grad,) = torch.autograd.grad((first**3).sum(), module.weight0_orig, create_graph=True)
    torch.testing.assert_close(grad, 3 * module.weight0_orig**2 * mask)
    (second,) = torch.autograd.grad(grad.sum(), module.weight0_orig)
    torch.testing.assert_close(second, 6 * module.weight0_orig * mask)


def test_the_weight_of_a_big_parameter_is_the_product() -> None:
    params = pairs(holder(torch.randn(1500, 1501), torch.randn(1501, 1500).t()))
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    module = params[0][0]
    assert torch.equal(module.weight0, module.weight0_orig * module.weight0_mask)
    assert torch.equal(module.weight1, module.weight1_orig * module.weight1_mask)


def test_methods_and_references_are_not_kept_alive() -> None:
    model = mlp()
    params = pairs(model)
    references = [w.clone() for w in weights_of(params)]
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5, reference=references)
    watched = weakref.ref(references[0])
    del references
    gc.collect()
    assert watched() is None


# Which parameters


def test_any_iterable_of_pairs_is_welcome() -> None:
    for make in (list, tuple, iter, lambda ps: (p for p in ps), lambda ps: [list(p) for p in ps]):
        model = mlp()
        tap.global_unstructured(make(pairs(model)), tap.Magnitude, amount=10)
        assert kept(pairs(model)) == 320 - 10


def test_biases_and_vectors_can_be_pruned_too() -> None:
    model = mlp()
    params = [*pairs(model), (model[0], "bias"), (model[2], "bias")]
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
    assert sum(int(m.sum()) for m in mask_list(params)) == 344 // 2
    model(torch.randn(2, 12))


def test_two_parameters_of_one_module_have_a_hook_each() -> None:
    layer = nn.Linear(4, 3)
    tap.global_unstructured([(layer, "weight"), (layer, "bias")], tap.Magnitude, amount=7)
    assert [len(hooks_of(layer, name)) for name in ("weight", "bias")] == [1, 1]
    assert torch.equal(layer(torch.zeros(4)), layer.bias_orig * layer.bias_mask)


def test_a_pair_given_twice_counts_once() -> None:
    layer = nn.Linear(4, 4)
    tap.global_unstructured([(layer, "weight")] * 2, tap.Magnitude, amount=0.5)
    assert kept([(layer, "weight")]) == 8


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "channels_last"])
def test_any_strides(
    layout: str, method: tuple[type[tap.PruningMethod], dict[str, Any]], device: str
) -> None:
    values = [torch.randn(8, 4, 3, 5), torch.randn(6, 8)]
    plain = pairs(holder(*(v.to(device) for v in values)))
    other = pairs(holder(*(laid_out(v, layout).to(device) for v in values)))
    for params in (plain, other):
        torch.manual_seed(1)
        tap.global_unstructured(params, method[0], **method[1])
    assert_same_masks(plain, other)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "2:4"])
def test_parameters_without_entries_and_numbers(name: str) -> None:
    method, options = METHODS[name]
    weights = [torch.empty(0, 4), torch.tensor(3.0), torch.empty(4, 0), torch.randn(4, 4)]
    params = pairs(holder(*weights))
    tap.global_unstructured(params, method, **options)
    assert [mask.shape for mask in mask_list(params)] == [w.shape for w in weights]
    tap.global_unstructured(params, method, **{**options, "amount": 1.0})
    assert kept(params) == 0


def test_the_meta_device_goes_through_the_motions() -> None:
    layer = nn.Linear(4, 4, device="meta")
    tap.global_unstructured([(layer, "weight")], tap.Magnitude, amount=0.5)
    assert layer.weight_mask.device.type == "meta"


# Tied weights


def tied_pairs(model: Tied) -> list[tuple[nn.Module, str]]:
    return [(model.a, "weight"), (model.b, "weight")]


def test_tied_weights_are_counted_and_pruned_once_and_stay_tied(
    method: tuple[type[tap.PruningMethod], dict[str, Any]],
) -> None:
    model, single = Tied(), nn.Linear(12, 12)
    single.weight.data.copy_(model.a.weight)
    for _ in range(3):
        for params in (tied_pairs(model), [(single, "weight")]):
            torch.manual_seed(1)
            tap.global_unstructured(params, method[0], **method[1])
        assert torch.equal(model.a.weight_mask, single.weight_mask)
        assert model.a.weight_orig is model.b.weight_orig
        assert model.a.weight_mask is model.b.weight_mask
        assert len(model.a._forward_pre_hooks) == len(model.b._forward_pre_hooks) == 1
    x = torch.randn(2, 12)
    model(x)
    assert torch.equal(model.a.weight, model.b.weight)
    prune.remove(model.a, "weight")
    prune.remove(model.b, "weight")
    assert model.a.weight is model.b.weight


def test_a_shared_module_is_pruned_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    params = [(model[0], "weight"), (model[2], "weight")]
    tap.global_unstructured(params, tap.Magnitude, amount=0.5)
    assert kept(params[:1]) == 8
    assert len(layer._forward_pre_hooks) == 1


def test_tied_weights_of_which_one_place_is_pruned_leave_the_other_dense() -> None:
    model = Tied()
    tap.magnitude(model.a, "weight", 0.5)
    assert model.b.weight is model.a.weight_orig
    assert not prune.is_pruned(model.b)


# Importance scores


@pytest.mark.parametrize("aligned", [tap.Magnitude, tap.AlignedMagnitude])
def test_scores_are_ranked_by_their_absolute_value(aligned: type[tap.PruningMethod]) -> None:
    params = pairs(holder(torch.randn(3, 4), torch.randn(5)))
    scores = {pair: torch.randn(getattr(*pair).shape) for pair in params}
    tap.global_unstructured(params, aligned, scores, amount=7)
    flat = torch.cat([scores[pair].abs().flatten() for pair in params])
    threshold = flat.sort().values[7]
    masks_found = torch.cat([mask.flatten() for mask in mask_list(params)])
    assert torch.equal(masks_found, flat >= threshold)


def test_scores_for_some_parameters_stand_beside_the_weights_of_the_others() -> None:
    params = pairs(holder(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 9.0])))
    scores = {params[1]: torch.tensor([-1.5, 0.5])}
    tap.global_unstructured(params, tap.AlignedMagnitude, scores, amount=3)
    assert [mask.tolist() for mask in mask_list(params)] == [[False, True, True], [False, False]]


def test_scores_of_integers_are_welcome() -> None:
    params = pairs(holder(torch.randn(4)))
    scores = {params[0]: torch.tensor([3, -7, 2, 5])}
    tap.global_unstructured(params, tap.Magnitude, scores, amount=2)
    assert mask_list(params)[0].tolist() == [False, True, False, True]


@pytest.mark.parametrize("budget", ["layer", "unit"])
def test_scores_with_another_budget(budget: str) -> None:
    params = pairs(holder(torch.randn(4, 6), torch.randn(2, 6)))
    scores = {pair: torch.randn(getattr(*pair).shape) for pair in params}
    tap.global_unstructured(params, tap.AlignedMagnitude, scores, amount=0.5, budget=budget)
    for pair, mask in zip(params, mask_list(params), strict=True):
        score = scores[pair].abs().reshape((-1, 6) if budget == "unit" else (1, -1))
        half = score.size(1) // 2
        expected = score >= score.sort(dim=1).values[:, half : half + 1]
        assert torch.equal(mask.reshape(expected.shape), expected)


# Magnitude is a drop-in for torch's L1Unstructured


def pruned_with_both(
    model: nn.Module, amounts: list[float], scores: list[Tensor] | None = None
) -> tuple[list[tuple[nn.Module, str]], list[tuple[nn.Module, str]]]:
    """The same model pruned again and again, by us and by torch."""
    twin = copy.deepcopy(model)
    ours, theirs = pairs(model), pairs(twin)
    for amount in amounts:
        for params, run, method in (
            (ours, tap.global_unstructured, tap.Magnitude),
            (theirs, prune.global_unstructured, prune.L1Unstructured),
        ):
            given = None if scores is None else dict(zip(params, scores, strict=True))
            run(params, method, importance_scores=given, amount=amount)
    return ours, theirs


@st.composite
def models(draw: st.DrawFn, values: str) -> nn.Module:
    """Up to four parameters of any shape and dtype.

    ``"distinct"``: no two entries have the same magnitude, in any dtype and in all of the model.
    """
    sizes = draw(st.lists(shapes(max_dims=4) | shapes(2, 2, 4), min_size=1, max_size=4))
    sizes = [shape for shape in sizes if torch.Size(shape).numel() <= 60] or [(3, 4)]
    total = sum(torch.Size(shape).numel() for shape in sizes)
    if total == 0:
        sizes, total = [(3, 4)], 12
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    if values == "ties":
        return holder(*(draw(tensors(shape, draw(dtypes), layouts=["offset"])) for shape in sizes))
    # Integers up to 256 are exact in bfloat16.
    numbers = torch.tensor(draw(st.permutations(range(1, total + 1))), dtype=torch.float64)
    signs = torch.tensor(
        draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=total, max_size=total))
    )
    pieces = (numbers * signs).split([torch.Size(shape).numel() for shape in sizes])
    both = zip(pieces, sizes, strict=True)
    return holder(*(piece.reshape(shape).to(draw(dtypes)) for piece, shape in both))


AMOUNTS = amounts(others=[0, 0.5, 1, 2, 1.0])


def possible(model: nn.Module, wanted: list[float]) -> list[float]:
    """The amounts with the integers that are too large left out."""
    left = sum(p.numel() for p in model.parameters())
    found = []
    for amount in wanted:
        count = amount if isinstance(amount, int) else round(amount * left)
        if count <= left:
            found.append(amount)
            left -= count
    assume(found)
    return found


@thorough
@given(data=st.data(), model=models("distinct"), wanted=AMOUNTS)
def test_magnitude_prunes_the_entries_that_l1_unstructured_prunes(
    data: st.DataObject, model: nn.Module, wanted: list[float]
) -> None:
    ours, theirs = pruned_with_both(model, possible(model, wanted))
    assert_same_masks(ours, theirs)
    for pair, twin in zip(ours, theirs, strict=True):
        assert torch.equal(getattr(*pair), getattr(*twin))


def kept_magnitudes(params: list[tuple[nn.Module, str]]) -> Tensor:
    both = zip(weights_of(params), mask_list(params), strict=True)
    return torch.cat([weight[mask].double().abs() for weight, mask in both]).sort().values


@thorough
@given(model=models("ties"), wanted=AMOUNTS)
def test_magnitude_prunes_as_many_and_as_small_entries_among_ties(
    model: nn.Module, wanted: list[float]
) -> None:
    ours, theirs = pruned_with_both(model, possible(model, wanted))
    assert kept(ours) == kept(theirs)
    assert torch.equal(kept_magnitudes(ours), kept_magnitudes(theirs))


@given(data=st.data(), model=models("distinct"), wanted=AMOUNTS)
def test_magnitude_of_scores_is_that_of_l1_unstructured(
    data: st.DataObject, model: nn.Module, wanted: list[float]
) -> None:
    sizes = [parameter.shape for parameter in model.parameters()]
    total = sum(size.numel() for size in sizes)
    order = torch.tensor(data.draw(st.permutations(range(total))), dtype=torch.float32)
    scores = [
        (piece - total / 2 + 0.25).reshape(size)
        for piece, size in zip(order.split([s.numel() for s in sizes]), sizes, strict=True)
    ]
    ours, theirs = pruned_with_both(model, possible(model, wanted), scores)
    assert_same_masks(ours, theirs)


@given(data=st.data(), shape=shapes(1, 4, 1) | shapes(2, 2, 4), amount=SHARES)
def test_apply_is_that_of_l1_unstructured(
    data: st.DataObject, shape: tuple[int, ...], amount: float
) -> None:
    weight = data.draw(tensors(shape, torch.float32, values=None, layouts=["contiguous"]))
    already = data.draw(masks(shape))
    results: list[nn.Module] = []
    for method in (tap.Magnitude, prune.L1Unstructured):
        module = holder(weight.clone())
        prune.custom_from_mask(module, "weight0", already.float())
        method.apply(module, "weight0", amount)
        results.append(module)
    ours, theirs = results
    assert torch.equal(ours.weight0_mask, theirs.weight0_mask != 0)
    assert torch.equal(ours.weight0, theirs.weight0)


def test_among_ties_the_lower_position_goes_first_over_all_parameters() -> None:
    params = pairs(holder(torch.ones(2, 2), torch.ones(3)))
    tap.global_unstructured(params, tap.Magnitude, amount=5)
    assert [m.flatten().tolist() for m in mask_list(params)] == [[False] * 4, [False, True, True]]


@pytest.mark.parametrize(
    "fail",
    [
        lambda run, method, ps: run(ps, method, amount=-1),
        lambda run, method, ps: run(ps, method, amount=1.5),
        lambda run, method, ps: run(ps, method, amount=10_000),
        lambda run, method, ps: run(ps, method, amount="half"),
        lambda run, method, ps: run(ps, method),
        lambda run, method, ps: run(ps, method, amount=0.5, share=0.5),
        lambda run, method, ps: run(7, method, amount=0.5),
        lambda run, method, ps: run([], method, amount=0.5),
        lambda run, method, ps: run([(ps[0][0], "wait")], method, amount=0.5),
        lambda run, method, ps: run(ps, method, importance_scores=[1], amount=0.5),
        lambda run, method, ps: method.apply(ps[0][0], "weight", -1),
        lambda run, method, ps: method.apply(ps[0][0], "weight", 10_000),
        lambda run, method, ps: method.apply(ps[0][0], "wait", 0.5),
        lambda run, method, ps: method.apply(
            ps[0][0], "weight", 0.5, importance_scores=torch.ones(3)
        ),
    ],
)
def test_errors_are_of_the_type_that_torch_raises(fail: Callable[..., object]) -> None:
    raised = []
    for run, method in (
        (prune.global_unstructured, prune.L1Unstructured),
        (tap.global_unstructured, tap.Magnitude),
    ):
        with pytest.raises(Exception) as caught:
            fail(run, method, pairs(mlp()))
        raised.append(caught.type)
    assert raised[0] is raised[1]


def test_a_float_amount_is_a_share_of_what_remains() -> None:
    params = pairs(mlp())
    for remaining in (160, 80, 40, 20):
        tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
        assert kept(params) == remaining


@pytest.mark.parametrize("amount", [0, 0.0])
def test_an_amount_of_nothing_masks_nothing(amount: float) -> None:
    params = pairs(mlp())
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=amount)
    assert kept(params) == 320
    assert all(prune.is_pruned(module) for module, _ in params)


@pytest.mark.parametrize("amount", [320, 1.0])
def test_an_amount_of_everything_leaves_nothing(amount: float) -> None:
    params = pairs(mlp())
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=amount)
    assert kept(params) == 0


@pytest.mark.parametrize("name", METHODS)
def test_masks_do_not_depend_on_the_number_of_threads(name: str) -> None:
    method, options = METHODS[name]
    weights = [
        torch.randn(300, 400),
        torch.randn(1, 120_000),
        laid_out(torch.randn(400, 300), "transposed"),
        laid_out(torch.randn(500, 200), "strided"),
    ]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        params = pairs(holder(*weights))
        tap.global_unstructured(params, method, **options)
        found.append(params)
    assert_same_masks(found[0], found[1])
    assert_same_masks(found[0], found[2])


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_layer(name: str, device: str) -> None:
    method, options = METHODS[name]
    model = mixed().to(device)
    params = pairs(model)
    if name == "2:4":
        params = [(m, n) for m, n in params if isinstance(m, (nn.Conv1d, nn.Conv2d))]
    tap.global_unstructured(params, method, **options)
    found = mask_list(params)
    budget = options.get("budget", "global")
    if budget == "unit":
        transposed = (Conv1D, nn.ConvTranspose1d, nn.ConvTranspose2d)
        dims = [1 if isinstance(module, transposed) else 0 for module, _ in params]
        found = [unit for mask, dim in zip(found, dims, strict=True) for unit in mask.unbind(dim)]
    elif budget == "global":
        found = [torch.cat([mask.flatten() for mask in found])]
    for mask in found:
        size = mask.numel()
        assert int(mask.sum()) == (size // 2 if name == "2:4" else size - round(0.4 * size))
