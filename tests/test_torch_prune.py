"""torch.nn.utils.prune's own functions with our methods, and next to its own."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
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
    prune_with_torch,
    weights_of,
)
from strategies import amounts, shapes, tensors

Pair = tuple[nn.Module, str]
BLIND = "cannot see which parameters"
# Somebody's own function, which does what torch's does and is not known.
like_torchs: Any = types.FunctionType(
    prune.global_unstructured.__code__.replace(),
    vars(prune),
    "like_torchs",
    prune.global_unstructured.__defaults__,
)


def options_for(params: list[Pair]) -> dict[str, tuple[type[tap.PruningMethod], dict[str, Any]]]:
    """Every method and every way to tell it something about the parameters."""
    generator = torch.Generator().manual_seed(7)
    weights = weights_of(params)
    noise = [torch.randn(w.shape, generator=generator) * w.std() for w in weights]
    moved = [w + e for w, e in zip(weights, noise, strict=True)]
    norms = [torch.rand(w.size(1), generator=generator) + 0.5 for w in weights]
    by_pair = dict(zip(params, moved, strict=True))
    norms_by_pair = dict(zip(params, norms, strict=True))
    aligned, share = tap.AlignedMagnitude, {"amount": 0.4}
    return {
        "magnitude": (tap.Magnitude, share),
        "magnitude, layer": (tap.Magnitude, {**share, "budget": "layer"}),
        "magnitude, unit": (tap.Magnitude, {**share, "budget": "unit"}),
        "cosine": (aligned, share),
        "cosine, number": (aligned, {"amount": 37}),
        "cosine, in": (aligned, {**share, "units": "in"}),
        "cosine, both": (aligned, {**share, "units": "both"}),
        "cosine, layer": (aligned, {**share, "budget": "layer"}),
        "cosine, unit": (aligned, {**share, "budget": "unit"}),
        "cosine, reference": (aligned, {**share, "reference": moved}),
        "cosine, reference by pair": (aligned, {**share, "reference": by_pair}),
        "cosine, reference, layer": (aligned, {**share, "reference": moved, "budget": "layer"}),
        "cosine, norms": (aligned, {**share, "input_norms": norms}),
        "cosine, norms by pair": (aligned, {**share, "input_norms": norms_by_pair}),
        "both, norms, unit": (
            aligned,
            {**share, "units": "both", "input_norms": norms, "budget": "unit"},
        ),
        "frobenius": (aligned, {**share, "alignment": "frobenius"}),
        "frobenius, reference": (
            aligned,
            {**share, "alignment": "frobenius", "reference": by_pair},
        ),
        "2:4": (tap.AlignedNM, {}),
        "2:4, reference": (tap.AlignedNM, {"reference": moved}),
        "random": (tap.Random, share),
        "random, unit": (tap.Random, {**share, "budget": "unit"}),
    }


NAMES = list(options_for(pairs(mlp())))


def both(
    name: str, prepare: Callable[[nn.Module], None] = lambda model: None, structure: bool = False
) -> tuple[list[Pair], list[Pair]]:
    """The same model in the same state, pruned by our function and by torch's."""
    found = []
    for run in (tap.global_unstructured, prune.global_unstructured):
        model = mlp()
        prepare(model)
        params = pairs(model)
        method, options = options_for(params)[name]
        if structure and run is prune.global_unstructured:
            options = {**options, "structure": params}
        if method is tap.Random:
            options = {**options, "generator": torch.Generator().manual_seed(3)}
        run(params, pruning_method=method, **options)
        found.append(params)
    return found[0], found[1]


# What a model may have gone through before it is pruned


def nothing(model: nn.Module) -> None:
    pass


def ours_before(model: nn.Module) -> None:
    tap.global_unstructured(pairs(model), tap.AlignedMagnitude, amount=0.3)


def torch_before(model: nn.Module) -> None:
    prune.global_unstructured(pairs(model), pruning_method=prune.L1Unstructured, amount=0.3)
    prune.l1_unstructured(model[0], "weight", amount=5)


def ours_through_torch_twice_before(model: nn.Module) -> None:
    for _ in range(2):
        prune.global_unstructured(pairs(model), pruning_method=tap.AlignedMagnitude, amount=0.2)


def one_layer_before(model: nn.Module) -> None:
    tap.magnitude(model[2], "weight", amount=0.5)


def forward_before(model: nn.Module) -> None:
    ours_before(model)
    model(torch.randn(3, 12))


def backward_before(model: nn.Module) -> None:
    ours_before(model)
    model(torch.randn(3, 12)).square().sum().backward()


def trained_dense(model: nn.Module) -> None:
    train_step(model)


def trained_before(model: nn.Module) -> None:
    """The weight that the module shows is that of the last forward, the stored one is newer."""
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.3)
    train_step(model)


def train_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(5)
    model(torch.randn(3, 12, generator=generator)).square().sum().backward()
    optimizer.step()


def removed_before(model: nn.Module) -> None:
    ours_before(model)
    for module, name in pairs(model):
        prune.remove(module, name)


VISIBLE = [
    nothing,
    ours_before,
    torch_before,
    ours_through_torch_twice_before,
    one_layer_before,
    forward_before,
    backward_before,
    trained_dense,
    trained_before,
    removed_before,
]


CASES = [(name, state) for name in NAMES for state in VISIBLE]
# torch hands over what the last forward showed. That is all that plain magnitude looks at.
CASES.remove(("magnitude", trained_before))


@pytest.mark.parametrize(("name", "state"), CASES)
def test_plain_call_is_aligned_as_ours_is(name: str, state: Callable[[nn.Module], None]) -> None:
    assert_same_masks(*both(name, state))


def test_ours_rank_the_stored_weights_and_not_those_of_the_last_forward() -> None:
    params, fresh = pairs(mlp()), pairs(mlp())
    for found in (params, fresh):
        tap.global_unstructured(found, tap.Magnitude, amount=0.3)
        for module, _ in found:
            module.weight_orig.data.copy_(module.weight_orig.flip(0))
    for module, _ in fresh:
        module(torch.randn(1, module.in_features))
    for found in (params, fresh):
        tap.global_unstructured(found, tap.Magnitude, amount=0.3)
    assert_same_masks(params, fresh)


@pytest.mark.parametrize("name", NAMES)
def test_the_states_above_do_change_what_is_pruned(name: str) -> None:
    """Were every state to give the same masks, the test above would say little."""
    fresh, _ = both(name, nothing)
    before, _ = both(name, ours_before)
    assert kept(before) <= kept(fresh)
    assert any(not torch.equal(a, b) for a, b in zip(*map(mask_list, (fresh, before)), strict=True))


def test_aligned_masks_are_not_those_of_magnitude() -> None:
    aligned, _ = both("cosine")
    for other in ("magnitude", "cosine, in", "cosine, both", "frobenius", "cosine, reference"):
        found, _ = both(other)
        same = [torch.equal(a, b) for a, b in zip(*map(mask_list, (aligned, found)), strict=True)]
        assert not all(same), other


@pytest.mark.parametrize(("name", "state"), CASES)
def test_structure_gives_the_same(name: str, state: Callable[[nn.Module], None]) -> None:
    assert_same_masks(*both(name, state, structure=True))


@given(data=st.data(), sizes=st.lists(shapes() | shapes(2, 2, 4), min_size=1, max_size=4))
def test_plain_call_equals_ours_for_any_shapes_and_dtypes(
    data: st.DataObject, sizes: list[tuple[int, ...]]
) -> None:
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
    weights = [
        data.draw(tensors(shape, data.draw(dtypes), values=None, layouts=["offset"]))
        for shape in sizes
    ]
    shares = data.draw(amounts())
    alignment = data.draw(
        st.sampled_from([{}, {"units": "in"}, {"units": "both"}, {"alignment": "frobenius"}])
    )
    budget = data.draw(st.sampled_from(["global", "layer", "unit"]))
    ours, theirs = pairs(holder(*weights)), pairs(holder(*(w.clone() for w in weights)))
    for amount in shares:
        options = {"amount": amount, "budget": budget, **alignment}
        tap.global_unstructured(ours, tap.AlignedMagnitude, **options)
        prune.global_unstructured(theirs, pruning_method=tap.AlignedMagnitude, **options)
    assert_same_masks(ours, theirs)


def test_layers_whose_outputs_lie_along_dimension_1_need_structure_or_prunable_parameters() -> None:
    expected = pairs(mixed())
    tap.global_unstructured(expected, tap.AlignedMagnitude, amount=0.5)

    structured = pairs(mixed())
    prune.global_unstructured(
        structured, pruning_method=tap.AlignedMagnitude, amount=0.5, structure=structured
    )
    assert_same_masks(structured, expected)

    known = tap.prunable_parameters(mixed())
    prune.global_unstructured(known, pruning_method=tap.AlignedMagnitude, amount=0.5)
    assert_same_masks(known, expected)


def test_prunable_parameters_know_dimension_1_on_repeated_pruning_and_of_copies() -> None:
    model = nn.Sequential(Conv1D(8, 12), nn.Linear(8, 8))
    for changed in (model, copy.deepcopy(model).double()):
        ours = pairs(copy.deepcopy(changed))
        theirs = tap.prunable_parameters(changed)
        for _ in range(2):
            tap.global_unstructured(ours, tap.AlignedMagnitude, amount=0.4)
            prune.global_unstructured(theirs, pruning_method=tap.AlignedMagnitude, amount=0.4)
            assert_same_masks(ours, theirs)


def test_random_is_the_same_through_both_on_first_and_repeated_pruning() -> None:
    ours, theirs = pairs(mlp()), pairs(mlp())
    left, right = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for _ in range(3):
        tap.global_unstructured(ours, tap.Random, amount=0.3, generator=left)
        prune.global_unstructured(theirs, pruning_method=tap.Random, amount=0.3, generator=right)
        assert_same_masks(ours, theirs)


def test_random_takes_no_scores_and_through_torch_does_not_look_at_them() -> None:
    params, expected = pairs(mlp()), pairs(mlp())
    scores = {(m, n): torch.arange(m.weight.numel()).view_as(m.weight) * 1.0 for m, n in params}
    with pytest.raises(TypeError, match="left out: Random draws its own scores"):
        tap.global_unstructured(params, tap.Random, scores, amount=0.3)
    for found, given_scores in ((params, scores), (expected, None)):
        generator = torch.Generator().manual_seed(1)
        prune.global_unstructured(found, tap.Random, given_scores, amount=0.3, generator=generator)
    assert_same_masks(params, expected)


# Where the parameters are out of sight


def under_no_grad(params: list[Pair], **options: Any) -> None:
    with torch.no_grad():
        prune.global_unstructured(params, pruning_method=tap.AlignedMagnitude, **options)


def frozen(params: list[Pair], **options: Any) -> None:
    for module, _ in params:
        module.requires_grad_(False)
    prune.global_unstructured(params, pruning_method=tap.AlignedMagnitude, **options)


def one_frozen(params: list[Pair], **options: Any) -> None:
    params[1][0].requires_grad_(False)
    prune.global_unstructured(params, pruning_method=tap.AlignedMagnitude, **options)


def evaluated(params: list[Pair], **options: Any) -> None:
    tap.global_unstructured(params, tap.Magnitude, amount=0.2)
    with torch.no_grad():
        for module, _ in params:
            module(torch.randn(1, module.in_features))
    prune.global_unstructured(params, pruning_method=tap.AlignedMagnitude, **options)


@pytest.mark.parametrize("call", [under_no_grad, frozen, one_frozen, evaluated])
@pytest.mark.parametrize("name", ["cosine", "cosine, both", "frobenius", "cosine, reference"])
@pytest.mark.parametrize("structure", [False, True])
def test_without_history_it_is_aligned_all_the_same(
    call: Callable[..., None], name: str, structure: bool
) -> None:
    params, expected = pairs(mlp()), pairs(mlp())
    if call is evaluated:
        tap.global_unstructured(expected, tap.Magnitude, amount=0.2)
    given: dict[str, Any] = {"structure": params} if structure else {}
    call(params, **options_for(params)[name][1], **given)
    tap.global_unstructured(expected, tap.AlignedMagnitude, **options_for(expected)[name][1])
    assert_same_masks(params, expected)


def test_where_the_parameters_stay_unknown_a_warning_names_structure_and_magnitude_decides() -> (
    None
):
    params, expected = pairs(mlp().requires_grad_(False)), pairs(mlp().requires_grad_(False))
    with pytest.warns(UserWarning, match=rf"{BLIND}.*structure=parameters") as caught:
        like_torchs(params, pruning_method=tap.AlignedMagnitude, amount=0.5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    prune.global_unstructured(expected, pruning_method=tap.Magnitude, amount=0.5)
    assert_same_masks(params, expected)
    params, expected = pairs(mlp().requires_grad_(False)), pairs(mlp())
    like_torchs(params, pruning_method=tap.AlignedMagnitude, amount=0.5, structure=params)
    tap.global_unstructured(expected, tap.AlignedMagnitude, amount=0.5)
    assert_same_masks(params, expected)


@pytest.mark.parametrize("run", ["torch's", "torch's, structure", "another's, structure"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (tap.AlignedMagnitude, {"amount": 0.5}),
        (tap.AlignedMagnitude, {"amount": 0.5, "units": "both"}),
        (tap.Magnitude, {"amount": 0.5, "budget": "unit"}),
        (tap.AlignedNM, {"n": 1, "m": 3}),
    ],
)
def test_frozen_tied_weights_are_pruned_as_trained_ones(
    run: str, method: type[tap.PruningMethod], options: dict[str, Any]
) -> None:
    """torch counts them at each of their places, and there is no history."""
    params, expected = pairs(Tied().requires_grad_(False)), pairs(Tied())
    call = like_torchs if run.startswith("another's") else prune.global_unstructured
    given: dict[str, Any] = {"structure": params} if run.endswith("structure") else {}
    for _ in range(1 if method is tap.AlignedNM else 2):
        call(params, pruning_method=method, **options, **given)
        tap.global_unstructured(expected, method, **options)
        assert_same_masks(params, expected)


@pytest.mark.parametrize("method", [tap.Magnitude, tap.Random])
def test_methods_that_need_no_structure_do_not_warn(method: type[tap.PruningMethod]) -> None:
    params = pairs(mlp().requires_grad_(False))
    prune.global_unstructured(params, pruning_method=method, amount=0.5)
    assert kept(params) == 160


def test_n_of_m_without_structure_is_an_error_that_names_it() -> None:
    params = pairs(mlp().requires_grad_(False))
    with pytest.raises(ValueError, match=r"structure=parameters"):
        like_torchs(params, pruning_method=tap.AlignedNM)
    assert not prune.is_pruned(params[0][0])
    params = pairs(mlp().requires_grad_(False))
    prune.global_unstructured(params, pruning_method=tap.AlignedNM)
    assert kept(params) == 160


def test_a_pickled_model_is_aligned() -> None:
    """The weight that a pickle brings back is a leaf of its own, and not the parameter."""
    model = mlp()
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.6)
    theirs = pairs(pickle.loads(pickle.dumps(model)))
    ours = pairs(model)
    tap.global_unstructured(ours, tap.AlignedMagnitude, amount=0.5)
    prune.global_unstructured(theirs, pruning_method=tap.AlignedMagnitude, amount=0.5)
    assert_same_masks(theirs, ours)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_model_is_aligned_after_a_forward(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model = mlp()
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.6)
    other = copied(model)
    other(torch.randn(2, 12))
    ours, theirs = pairs(model), pairs(other)
    tap.global_unstructured(ours, tap.AlignedMagnitude, amount=0.5)
    prune.global_unstructured(theirs, pruning_method=tap.AlignedMagnitude, amount=0.5)
    assert_same_masks(ours, theirs)


# Importance scores


@pytest.mark.parametrize("structure", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_scores_are_ranked_by_their_absolute_value(structure: bool, requires_grad: bool) -> None:
    ours, theirs = pairs(mlp()), pairs(mlp())
    generator = torch.Generator().manual_seed(2)
    scores = [torch.randn(m.weight.shape, generator=generator) for m, _ in ours]
    if requires_grad:  # computed from something that is trained
        scores = [score.requires_grad_() * 1.5 for score in scores]
    tap.global_unstructured(
        ours, tap.AlignedMagnitude, dict(zip(ours, scores, strict=True)), amount=0.5
    )
    given_scores = dict(zip(theirs, scores, strict=True))
    options: dict[str, Any] = {"structure": theirs} if structure else {}
    prune.global_unstructured(theirs, tap.AlignedMagnitude, given_scores, amount=0.5, **options)
    assert_same_masks(ours, theirs)
    flat = torch.cat([score.detach().abs().flatten() for score in scores])
    assert torch.equal(torch.cat([m.flatten() for m in mask_list(ours)]), flat > flat.median())


def test_scores_computed_from_the_weights_are_ranked_as_they_are() -> None:
    params, expected = pairs(mlp()), pairs(mlp())
    for run, found in ((prune.global_unstructured, params), (tap.global_unstructured, expected)):
        scores = {(m, n): m.weight * m.weight.detach().roll(1) for m, n in found}
        run(found, tap.AlignedMagnitude, scores, amount=0.5)
    assert_same_masks(params, expected)


def test_structure_that_is_not_what_is_pruned_is_an_error() -> None:
    params = pairs(mlp())
    with pytest.raises(ValueError, match="structure should be the parameters that are pruned"):
        prune.global_unstructured(
            params, pruning_method=tap.AlignedMagnitude, amount=0.5, structure=params[:1]
        )
    assert not prune.is_pruned(params[0][0])


# Next to torch's own methods


def test_torch_prunes_on_top_of_ours() -> None:
    model = mlp()
    params = pairs(model)
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
    before = mask_list(params)
    prune.global_unstructured(params, pruning_method=prune.L1Unstructured, amount=0.5)
    assert kept(params) == 80
    prune.ln_structured(model[2], "weight", amount=2, n=2, dim=0)
    assert bool((model[2].weight == 0).all(dim=1).sum() >= 2)
    prune.random_unstructured(model[0], "weight", amount=0.1)
    assert not any(
        bool((new & ~old).any()) for new, old in zip(mask_list(params), before, strict=True)
    )
    for module, _ in params:
        assert len(module._forward_pre_hooks) == 1
    model(torch.randn(2, 12)).sum().backward()


def test_ours_prune_on_top_of_torch() -> None:
    model = mlp()
    params = pairs(model)
    prune.global_unstructured(params, pruning_method=prune.L1Unstructured, amount=0.5)
    prune.random_unstructured(model[0], "weight", amount=0.1)
    prune.ln_structured(model[2], "weight", amount=2, n=2, dim=0)
    before = mask_list(params)
    left = kept(params)
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=10)
    assert kept(params) == left - 10
    assert not any(
        bool((new & ~old).any()) for new, old in zip(mask_list(params), before, strict=True)
    )
    for module, _ in params:
        assert len(module._forward_pre_hooks) == 1
        assert module.weight_mask.dtype == torch.bool


def test_a_container_of_torch_takes_our_methods() -> None:
    layer = nn.Linear(12, 8)
    twin = copy.deepcopy(layer)
    prune.l1_unstructured(layer, "weight", amount=0.25)
    container = prune.PruningContainer(*layer._forward_pre_hooks.values())
    method = tap.AlignedMagnitude(0.5)
    method._tensor_name = "weight"
    container.add_pruning_method(method)
    mask = container.compute_mask(layer.weight, layer.weight_mask)
    prune.l1_unstructured(twin, "weight", amount=0.25)
    tap.aligned_magnitude(twin, "weight", 0.5)
    assert torch.equal(mask != 0, twin.weight_mask)


@pytest.mark.parametrize("options", [{}, {"units": "in"}, {"units": "both"}])
def test_prune_of_a_tensor(options: dict[str, Any]) -> None:
    """BasePruningMethod.prune: no module, a tensor in and a tensor out."""
    layer = nn.Linear(12, 8)
    weight = layer.weight.detach().clone()
    tap.aligned_magnitude(layer, "weight", 0.5, **options)
    pruned = tap.AlignedMagnitude(0.5, **options).prune(weight)
    assert torch.equal(pruned, layer.weight.detach())


def test_prune_of_a_tensor_with_a_mask_and_with_scores() -> None:
    weight, scores = torch.randn(4, 6), torch.randn(4, 6)
    mask = (torch.rand(4, 6) < 0.7).float()
    count = int(mask.sum()) - 5
    pruned = tap.Magnitude(5).prune(weight, default_mask=mask)
    assert int((pruned != 0).sum()) == count
    by_scores = tap.AlignedMagnitude(12).prune(weight, importance_scores=scores)
    assert torch.equal(by_scores != 0, scores.abs() > scores.abs().median())


def test_tied_weights_through_torch_have_the_same_masks_in_all_places() -> None:
    model = Tied()
    params: list[Pair] = [(model.a, "weight"), (model.b, "weight")]
    prune.global_unstructured(params, pruning_method=tap.AlignedMagnitude, amount=0.5)
    assert model.a.weight_orig is model.b.weight_orig
    x = torch.randn(2, 12)
    model(x)
    assert torch.equal(model.a.weight, model.b.weight)


def test_mixed_dtypes_in_one_call() -> None:
    def model() -> nn.Module:
        found = mlp()
        found[2].to(torch.bfloat16)
        return found

    ours, theirs = pairs(model()), pairs(model())
    for _ in range(2):
        tap.global_unstructured(ours, tap.AlignedMagnitude, amount=0.4)
        prune.global_unstructured(theirs, pruning_method=tap.AlignedMagnitude, amount=0.4)
        assert_same_masks(ours, theirs)


def test_only_parameters_without_entries() -> None:
    params = pairs(holder(torch.empty(0, 5)))
    prune.global_unstructured(params, pruning_method=tap.AlignedMagnitude, amount=0.5)
    assert mask_list(params)[0].shape == (0, 5)


@pytest.mark.parametrize(
    ("functional", "method", "options"),
    [
        (tap.magnitude, tap.Magnitude, {"amount": 0.5}),
        (tap.aligned_magnitude, tap.AlignedMagnitude, {"amount": 0.5, "units": "both"}),
        (tap.aligned_nm, tap.AlignedNM, {"n": 1, "m": 4}),
    ],
)
def test_functional_forms_return_the_module_and_do_what_apply_does(
    functional: Callable[..., nn.Module], method: type[tap.PruningMethod], options: dict[str, Any]
) -> None:
    left, right = mlp()[0], mlp()[0]
    assert functional(left, "weight", **options) is left
    hook = method.apply(right, "weight", **options)
    assert list(right._forward_pre_hooks.values()) == [hook]
    assert torch.equal(left.weight_mask, right.weight_mask)
    scores = torch.randn(left.weight.shape)
    for module, call in ((left, functional), (right, method.apply)):
        call(module, "weight", **options, importance_scores=scores)
    assert torch.equal(left.weight_mask, right.weight_mask)


def test_is_pruned_and_remove() -> None:
    model = mlp()
    assert not prune.is_pruned(model)
    tap.global_unstructured(pairs(model), tap.AlignedMagnitude, amount=0.5)
    assert prune.is_pruned(model)
    x = torch.randn(2, 12)
    before = model(x)
    originals = [module.weight_orig for module, _ in pairs(model)]
    for (module, name), original in zip(pairs(model), originals, strict=True):
        prune.remove(module, name)
        assert module.weight is original
    assert not prune.is_pruned(model)
    assert sorted(model.state_dict()) == sorted(mlp().state_dict())
    assert torch.equal(model(x), before)
    assert [len(module._forward_pre_hooks) for module, _ in pairs(model)] == [0, 0]


def prune_by_torch_and_by_us(params: list[Pair]) -> None:
    prune_with_torch(params)
    tap.global_unstructured(params, tap.Magnitude, amount=0.1)


def test_remove_after_both() -> None:
    model = mlp()
    prune_by_torch_and_by_us(pairs(model))
    prune_with_torch(pairs(model))
    shown: list[Tensor] = [module.weight.detach().clone() for module, _ in pairs(model)]
    for (module, name), weight in zip(pairs(model), shown, strict=True):
        prune.remove(module, name)
        assert torch.equal(module.weight, weight)
