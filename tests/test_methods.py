"""The methods against the formulas of their docstrings, written out unit by unit in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import reference
import torchalignprune as tap
from models import Pair, assert_same_masks, holder, kept, mask_list, mixed, mlp, pairs, weights_of

LAYERS = range(len(mixed()))


def outputs_first(layer: nn.Module, weight: Tensor) -> Tensor:
    """(outputs, inputs, ...), however the layer keeps its weight."""
    turned = isinstance(layer, (Conv1D, nn.ConvTranspose1d, nn.ConvTranspose2d))
    return weight.transpose(0, 1) if turned else weight


def departed(weights: Sequence[Tensor]) -> list[Tensor]:
    """References at some distance from the weights."""
    generator = torch.Generator().manual_seed(11)
    return [w + torch.randn(w.shape, generator=generator) * w.std() / 2 for w in weights]


def norms_for(params: Sequence[Pair]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(12)
    return [
        torch.rand(outputs_first(layer, layer.weight).size(1), generator=generator) * 3 + 0.1
        for layer, _ in params
    ]


def own_gains(unit: Tensor) -> Tensor:
    """sqrt(C_k) - sqrt(C_{k-1}) over |w|, the entries by falling |w|."""
    gains = torch.zeros(unit.numel(), dtype=torch.float64)
    size, before = float(unit.norm()), 0.0
    for position in unit.flatten().abs().argsort(descending=True).tolist():
        square = before**2 + float(unit.flatten()[position]) ** 2
        gains[position] = (math.sqrt(square) - before) / size
        before = math.sqrt(square)
    return gains.reshape(unit.shape)


def plain_scores(
    layer: nn.Module,
    weight: Tensor,
    r: Tensor | None,
    norms: Tensor | None,
    alignment: str = "cosine",
    units: str = "out",
) -> Tensor:
    """What an entry is worth, shaped like the weight of the layer."""
    w = outputs_first(layer, weight).double()
    own = r is None
    ref = w if r is None else outputs_first(layer, r).double()
    if norms is not None:
        column = norms.double().reshape(1, -1, *[1] * (w.dim() - 2))
        w, ref = w * column, ref * column
    if alignment == "frobenius":
        score = w * (2 * ref - w) / ref.square().sum()
    elif units == "both":
        rows = ref.flatten(1).norm(dim=1).reshape(-1, 1, *[1] * (w.dim() - 2))
        columns = ref.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (w.dim() - 2))
        score = w.abs() / (rows * columns).sqrt() if own else w * (2 * ref - w) / (rows * columns)
    else:
        turned = [t.transpose(0, 1) if units == "in" else t for t in (w, ref)]
        if own:
            score = torch.stack([own_gains(unit) for unit in turned[0]])
        else:
            score = reference.cosine_gains(turned[0].contiguous(), reference=turned[1].contiguous())
        score = score.transpose(0, 1) if units == "in" else score
    return outputs_first(layer, score)


def cut(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    flat = torch.cat([score.flatten() for score in scores])
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    mask[flat.argsort(stable=True)[:count]] = False
    pieces = mask.split([score.numel() for score in scores])
    return [piece.reshape(score.shape) for piece, score in zip(pieces, scores, strict=True)]


FORMS: dict[str, dict[str, Any]] = {
    "out": {},
    "in": {"units": "in"},
    "both": {"units": "both"},
    "frobenius": {"alignment": "frobenius"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("with_reference", [False, True], ids=["", "reference"])
def test_masks_of_all_layers_together(
    form: str, with_reference: bool, with_norms: bool, device: str
) -> None:
    model = mixed()
    params = pairs(model)
    weights = weights_of(params)
    references = departed(weights) if with_reference else None
    norms = norms_for(params) if with_norms else None
    scores = [
        plain_scores(
            layer,
            weight,
            None if references is None else references[i],
            None if norms is None else norms[i],
            **FORMS[form],
        )
        for i, ((layer, _), weight) in enumerate(zip(params, weights, strict=True))
    ]
    model.to(device)
    count = sum(weight.numel() for weight in weights) // 2
    tap.global_unstructured(
        params,
        tap.AlignedMagnitude,
        amount=count,
        reference=None if references is None else [r.to(device) for r in references],
        input_norms=None if norms is None else [n.to(device) for n in norms],
        **FORMS[form],
    )
    for mask, expected in zip(mask_list(params), cut(scores, count), strict=True):
        assert torch.equal(mask.cpu(), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", LAYERS)
def test_masks_of_one_layer_unit_by_unit(which: int, form: str) -> None:
    layer = mixed()[which]
    weight = layer.weight.detach().clone()
    (norms,) = norms_for([(layer, "weight")])
    (r,) = departed([weight])
    scores = plain_scores(layer, weight, r, norms, **FORMS[form])
    options = {**FORMS[form], "reference": r, "input_norms": norms, "budget": "unit"}
    tap.AlignedMagnitude.apply(layer, "weight", 0.5, **options)
    by_unit = outputs_first(layer, scores), outputs_first(layer, layer.weight_mask)
    if form == "in":
        by_unit = by_unit[0].transpose(0, 1), by_unit[1].transpose(0, 1)
    for score, mask in zip(*by_unit, strict=True):
        (expected,) = cut([score], round(0.5 * score.numel()))
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("budget", ["global", "layer"])
@pytest.mark.parametrize("form", FORMS)
def test_earlier_masks_leave_the_reference_whole(form: str, budget: str) -> None:
    """Pruned entries are no candidates, but |r| stays that of the whole unit."""
    params = pairs(mlp())
    tap.global_unstructured(
        params, tap.Random, amount=0.3, generator=torch.Generator().manual_seed(0)
    )
    before = mask_list(params)
    scores = []
    for (layer, _), weight, mask in zip(params, weights_of(params), before, strict=True):
        if form in ("out", "in"):
            w = (weight if form == "out" else weight.t()).double()
            m = mask if form == "out" else mask.t()
            rows = []
            for unit, alive in zip(w, m, strict=True):
                left = unit * alive
                rows.append(own_gains(left) * left.norm() / unit.norm())
            score = torch.stack(rows)
            score = score if form == "out" else score.t()
        else:
            score = plain_scores(layer, weight, None, None, **FORMS[form])
        scores.append(score.masked_fill(~mask, math.inf))
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.4, budget=budget, **FORMS[form])
    if budget == "global":
        count = round(0.4 * sum(int(mask.sum()) for mask in before))
        expected = cut(scores, count)
    else:
        expected = [
            cut([score], round(0.4 * int(mask.sum())))[0]
            for score, mask in zip(scores, before, strict=True)
        ]
    for mask, new, old in zip(mask_list(params), expected, before, strict=True):
        assert torch.equal(mask, new & old)


@pytest.mark.parametrize("form", FORMS)
def test_the_scale_of_all_weights_does_not_matter(form: str, dtype: torch.dtype) -> None:
    """As far as the dtype reaches: powers of two, so that no entry is rounded."""
    reach = {torch.float16: (-8, 8), torch.float64: (-500, 500)}.get(dtype, (-60, 60))
    values = [torch.randn(6, 8).to(dtype), torch.randn(4, 6).to(dtype)]
    plain = pairs(holder(*values))
    tap.global_unstructured(plain, tap.AlignedMagnitude, amount=0.5, **FORMS[form])
    for power in reach:
        scaled = [value * 2.0**power for value in values]
        for options in ({}, {"reference": scaled}):
            params = pairs(holder(*(s.clone() for s in scaled)))
            tap.global_unstructured(
                params, tap.AlignedMagnitude, amount=0.5, **FORMS[form], **options
            )
            assert_same_masks(params, plain)


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_as_their_own_reference_change_nothing(form: str) -> None:
    plain, other = pairs(mlp()), pairs(mlp())
    tap.global_unstructured(plain, tap.AlignedMagnitude, amount=0.5, **FORMS[form])
    tap.global_unstructured(
        other, tap.AlignedMagnitude, amount=0.5, reference=weights_of(other), **FORMS[form]
    )
    assert_same_masks(plain, other)


@pytest.mark.parametrize("form", FORMS)
def test_equal_input_norms_change_nothing(form: str) -> None:
    plain, other = pairs(mlp()), pairs(mlp())
    tap.global_unstructured(plain, tap.AlignedMagnitude, amount=0.5, **FORMS[form])
    norms = [torch.full((module.in_features,), 2.0) for module, _ in other]
    tap.global_unstructured(
        other, tap.AlignedMagnitude, amount=0.5, input_norms=norms, **FORMS[form]
    )
    assert_same_masks(plain, other)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_are_always_zero_go_first(form: str) -> None:
    layer = nn.Linear(6, 4)
    norms = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    tap.AlignedMagnitude.apply(layer, "weight", 8, input_norms=norms, **FORMS[form])
    assert torch.equal(layer.weight_mask, (norms > 0).expand(4, 6))


@pytest.mark.parametrize("form", FORMS)
def test_units_of_zeros_go_first(form: str) -> None:
    layer = nn.Linear(6, 4)
    layer.weight.data[1] = 0
    layer.weight.data[:, 2] = 0
    tap.AlignedMagnitude.apply(layer, "weight", 9, **FORMS[form])
    assert torch.equal(layer.weight_mask, layer.weight_orig != 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_vector_is_one_unit(form: str) -> None:
    params = pairs(holder(torch.tensor([3.0, -4.0]), torch.tensor([[0.1, 0.2], [0.2, 0.1]])))
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5, **FORMS[form])
    assert kept(params) == 3
    assert mask_list(params)[0][1]


def test_vectors_have_no_input_norms() -> None:
    layer, plain = nn.Linear(6, 4), nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    for module, norms in ((layer, [torch.ones(6), torch.ones(1)]), (plain, None)):
        params = [(module, "weight"), (module, "bias")]
        tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5, input_norms=norms)
    assert torch.equal(layer.weight_mask, plain.weight_mask)
    assert torch.equal(layer.bias_mask, plain.bias_mask)


def test_order_and_mapping_give_the_same_reference_and_norms() -> None:
    found = []
    for form in ("list", "mapping", "tuple"):
        params = pairs(mlp())
        references, norms = departed(weights_of(params)), norms_for(params)
        given: list[Any] = [references, norms]
        if form == "mapping":
            given = [dict(zip(params, tensors, strict=True)) for tensors in given]
        if form == "tuple":
            given = [tuple(tensors) for tensors in given]
        tap.global_unstructured(
            params, tap.AlignedMagnitude, amount=0.5, reference=given[0], input_norms=given[1]
        )
        found.append(params)
    assert_same_masks(found[0], found[1])
    assert_same_masks(found[0], found[2])


def test_a_mapping_may_hold_more_than_is_pruned() -> None:
    params = pairs(mlp())
    references = dict(zip(params, departed(weights_of(params)), strict=True))
    tap.global_unstructured(params[1:], tap.AlignedMagnitude, amount=0.5, reference=references)
    alone = pairs(mlp())
    tap.aligned_magnitude(*alone[1], 0.5, reference=references[params[1]])
    assert torch.equal(alone[1][0].weight_mask, params[1][0].weight_mask)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_references_and_norms_of_other_dtypes(half: torch.dtype) -> None:
    found = []
    for cast in (torch.float64, half):
        params = pairs(mlp(half))
        references = [r.to(half) for r in departed(weights_of(params))]
        norms = [n.to(half) for n in norms_for(params)]
        tap.global_unstructured(
            params,
            tap.AlignedMagnitude,
            amount=0.5,
            reference=[r.to(cast) for r in references],
            input_norms=[n.to(cast) for n in norms],
        )
        found.append(params)
    assert_same_masks(*found)


# Where the amount is counted


BUDGETED: dict[str, tuple[type[tap.PruningMethod], dict[str, Any]]] = {
    "magnitude": (tap.Magnitude, {}),
    "cosine": (tap.AlignedMagnitude, {}),
    "both": (tap.AlignedMagnitude, {"units": "both"}),
    "frobenius": (tap.AlignedMagnitude, {"alignment": "frobenius"}),
    "random": (tap.Random, {}),
}


def counts(params: Sequence[Pair], dim: int | None) -> list[list[int]]:
    """How many are left: of each layer, or of each of its units."""
    found = []
    for (layer, _), mask in zip(params, mask_list(params), strict=True):
        by_output = outputs_first(layer, mask)
        if dim is None:
            found.append([int(mask.sum())])
        else:
            found.append(by_output.movedim(dim, 0).flatten(1).sum(dim=1).tolist())
    return found


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("budget", ["global", "layer", "unit"])
def test_budgets_count_exactly_on_first_and_repeated_pruning(name: str, budget: str) -> None:
    method, options = BUDGETED[name]
    params = pairs(mixed())
    dim = 0 if budget == "unit" else None
    left = [
        [weight.numel()]
        if dim is None
        else [weight.numel() // outputs_first(layer, weight).size(0)]
        * outputs_first(layer, weight).size(0)
        for (layer, _), weight in zip(params, weights_of(params), strict=True)
    ]
    for amount in (0.3, 2, 0.5, 0.0, 1, 0.25):
        if budget == "global":
            total = kept(params) if hasattr(params[0][0], "weight_mask") else sum(map(sum, left))
            going = amount if isinstance(amount, int) else round(amount * total)
            tap.global_unstructured(params, method, amount=amount, budget=budget, **options)
            assert kept(params) == total - going
            continue
        tap.global_unstructured(params, method, amount=amount, budget=budget, **options)
        left = [
            [n - (amount if isinstance(amount, int) else round(amount * n)) for n in group]
            for group in left
        ]
        assert counts(params, dim) == left


def test_the_unit_of_the_budget_is_the_input_with_units_in() -> None:
    params = pairs(mixed())
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=1, units="in", budget="unit")
    for (layer, _), group in zip(params, counts(params, 1), strict=True):
        per_input = outputs_first(layer, layer.weight)
        assert group == [per_input.size(0) * per_input[0, 0].numel() - 1] * per_input.size(1)


def test_a_vector_is_one_unit_of_the_budget() -> None:
    layer = nn.Linear(3, 8)
    tap.magnitude(layer, "bias", 2, budget="unit")
    assert int(layer.bias_mask.sum()) == 6


@pytest.mark.parametrize("budget", ["global", "layer", "unit"])
def test_magnitude_with_a_budget(budget: str) -> None:
    params = pairs(mixed())
    tap.global_unstructured(params, tap.Magnitude, amount=0.5, budget=budget)
    scores = [weight.abs() for weight in weights_of(params)]
    if budget == "global":
        expected = cut(scores, sum(s.numel() for s in scores) // 2)
    elif budget == "layer":
        expected = [cut([score], score.numel() // 2)[0] for score in scores]
    else:
        expected = []
        for (layer, _), score in zip(params, scores, strict=True):
            units = outputs_first(layer, score)
            masks = [cut([unit], round(unit.numel() / 2))[0] for unit in units]
            expected.append(outputs_first(layer, torch.stack(masks)))
    for mask, plain in zip(mask_list(params), expected, strict=True):
        assert torch.equal(mask, plain)


# n of m


def groups_of(layer: nn.Module, tensor: Tensor, m: int) -> Tensor:
    """(outputs, groups, m): along the inputs, at each place of the kernel."""
    by_output = outputs_first(layer, tensor).movedim(1, -1)
    return by_output.reshape(by_output.size(0), -1, m)


@pytest.mark.parametrize("with_norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 4)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(8, 5),
        lambda: Conv1D(5, 8),
        lambda: nn.Conv1d(8, 5, 3),
        lambda: nn.Conv2d(4, 5, (2, 3)),
        lambda: nn.ConvTranspose2d(8, 5, 2),
    ],
)
def test_n_of_m_keeps_the_best_of_every_group(make: Any, n: int, m: int, with_norms: bool) -> None:
    layer = make()
    weight = layer.weight.detach().clone().normal_()
    layer.weight.data.copy_(weight)
    worth = outputs_first(layer, weight).abs()
    norms = None
    if with_norms:
        (norms,) = norms_for([(layer, "weight")])
        worth = worth * norms.reshape(1, -1, *[1] * (worth.dim() - 2))
    tap.AlignedNM.apply(layer, "weight", n=n, m=m, input_norms=norms)
    worths = groups_of(layer, outputs_first(layer, worth), m)
    masks = groups_of(layer, layer.weight_mask, m)
    assert bool((masks.sum(dim=-1) == n).all())
    for group, mask in zip(worths.reshape(-1, m), masks.reshape(-1, m), strict=True):
        assert set(mask.nonzero().flatten().tolist()) == set(group.topk(n).indices.tolist())


def test_n_of_m_with_a_reference() -> None:
    layer = nn.Linear(8, 5).double()
    w = layer.weight.detach().clone()
    (r,) = departed([w])
    rho = (w * r).sum(dim=1, keepdim=True) / (w * w).sum(dim=1, keepdim=True)
    worth = w * (r - rho * w / 2)
    tap.AlignedNM.apply(layer, "weight", reference=r)
    for group, mask in zip(worth.reshape(-1, 4), layer.weight_mask.reshape(-1, 4), strict=True):
        assert set(mask.nonzero().flatten().tolist()) == set(group.topk(2).indices.tolist())


def test_n_of_m_on_top_of_other_masks_leaves_what_is_sparse_enough() -> None:
    layer = nn.Linear(8, 1)
    layer.weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0, 4.0, 3.0, 2.0, 1.0]])
    scores = torch.tensor([[0.0, 9.0, 0.0, 0.0, 9.0, 0.0, 9.0, 9.0]])
    tap.magnitude(layer, "weight", 4, importance_scores=scores)
    tap.aligned_nm(layer, "weight")
    assert layer.weight_mask.tolist() == [[False, True, False, False, True, False, True, False]]
    tap.aligned_nm(layer, "weight")
    assert int(layer.weight_mask.sum()) == 3


def test_n_of_m_with_a_reference_on_top_of_other_masks() -> None:
    """rho is that of what is left, as the entries are ranked among those."""
    layer = nn.Linear(8, 6).double()
    w = layer.weight.detach().clone()
    (r,) = departed([w])
    alive = torch.ones(6, 2, 4).scatter_(2, torch.randint(4, (6, 2, 1)), 0).reshape(6, 8)
    w[alive == 0] = 9.0
    layer.weight.data.copy_(w)
    prune.custom_from_mask(layer, "weight", alive)
    left = w * alive
    rho = (left * r).sum(dim=1, keepdim=True) / (left * left).sum(dim=1, keepdim=True)
    worth = (w * (r - rho * w / 2)).masked_fill(alive == 0, -math.inf)
    tap.AlignedNM.apply(layer, "weight", reference=r)
    for group, mask in zip(worth.reshape(-1, 4), layer.weight_mask.reshape(-1, 4), strict=True):
        assert set(mask.nonzero().flatten().tolist()) == set(group.topk(2).indices.tolist())


def test_n_of_m_goes_by_scores_if_there_are_some() -> None:
    layer = nn.Linear(4, 1)
    scores = torch.tensor([[1.0, -4.0, 2.0, 3.0]])
    tap.aligned_nm(layer, "weight", importance_scores=scores)
    assert layer.weight_mask.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("n_of_m", [(2, 4), (1, 4)])
def test_the_alignment_of_n_of_m_with_a_reference_is_close_to_the_best(
    n_of_m: tuple[int, int],
) -> None:
    n, m = n_of_m
    of_group = [
        torch.tensor([i in chosen for i in range(m)], dtype=torch.float64)
        for chosen in itertools.combinations(range(m), n)
    ]
    masks = torch.stack([torch.cat(two) for two in itertools.product(of_group, repeat=2)])
    layer = nn.Linear(2 * m, 100).double()
    w = layer.weight.detach().clone()
    (r,) = departed([w])
    tap.AlignedNM.apply(layer, "weight", n=n, m=m, reference=r)
    cosine = torch.nn.functional.cosine_similarity
    best = torch.stack([cosine(masks * a, b, dim=1).max() for a, b in zip(w, r, strict=True)])
    ours = cosine(layer.weight.detach(), r, dim=1)
    assert bool((ours <= best + 1e-12).all())
    assert float(ours.mean()) >= 0.99 * float(best.mean())


# Random


def test_every_entry_has_the_same_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    times = torch.zeros(20)
    for _ in range(2000):
        params = pairs(holder(torch.ones(3, 4), torch.zeros(8)))
        tap.global_unstructured(params, tap.Random, amount=5, generator=generator)
        assert kept(params) == 15
        times += torch.cat([~mask.flatten() for mask in mask_list(params)])
    # 2000 draws with a chance of a quarter: 500, give or take 19.4.
    assert bool(((times - 500).abs() < 5 * 19.4).all()), times
    assert float(((times - 500) ** 2 / 375).sum()) < 45  # chi square, 19 degrees of freedom


def test_later_draws_leave_every_remaining_entry_the_same_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    times = torch.zeros(10)
    for _ in range(2000):
        params = pairs(holder(torch.ones(10)))
        for _ in range(2):
            tap.global_unstructured(params, tap.Random, amount=3, generator=generator)
        times += ~mask_list(params)[0]
    assert bool(((times - 1200).abs() < 5 * 22).all()), times


def test_a_seed_gives_the_same_masks_and_another_seed_others() -> None:
    def masks(seed: int) -> list[Tensor]:
        params = pairs(mlp())
        generator = torch.Generator().manual_seed(seed)
        tap.global_unstructured(params, tap.Random, amount=0.5, generator=generator)
        return mask_list(params)

    assert all(torch.equal(a, b) for a, b in zip(masks(1), masks(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(masks(1), masks(2), strict=True))


def test_without_a_generator_torchs_own_draws(device: str) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        params = pairs(mlp().to(device))
        tap.global_unstructured(params, tap.Random, amount=0.5)
        found.append(params)
    assert_same_masks(*found)


def test_random_does_not_look_at_the_weights() -> None:
    found = []
    for weight in (torch.randn(4, 5), torch.full((4, 5), math.nan)):
        params = pairs(holder(weight))
        generator = torch.Generator().manual_seed(3)
        tap.global_unstructured(params, tap.Random, amount=0.5, generator=generator)
        found.append(params)
    assert_same_masks(*found)


def test_random_functional_form() -> None:
    layer = nn.Linear(4, 4)
    assert tap.random(layer, "weight", amount=0.5) is layer
    assert int(layer.weight_mask.sum()) == 8


def test_grouped_convolutions_take_no_input_norms() -> None:
    conv = nn.Conv2d(8, 16, 3, groups=4)
    calibration = tap.Calibration.collect(conv, [torch.randn(2, 8, 5, 5)], [(conv, "weight")])
    with pytest.raises(ValueError, match=r"should have shape \(2,\).*grouped convolution"):
        tap.aligned_magnitude(conv, "weight", 0.5, input_norms=calibration)
    with pytest.raises(TypeError, match=r"input_norms of .* should be real numbers, got .*complex"):
        tap.aligned_magnitude(conv, "weight", 0.5, input_norms=torch.ones(2, dtype=torch.cfloat))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"alignment": "frobenius"}, {"units": "both"}, {"units": "both", "of": True}]
)
def test_a_reference_that_is_not_finite_is_refused_even_where_pruned(
    options: dict[str, Any], value: float
) -> None:
    """The reference counts whole, where it is pruned too, so that its size is not known."""
    layer = nn.Linear(4, 4, bias=False)
    tap.global_unstructured([(layer, "weight")], tap.Magnitude, amount=1)
    pruned = ~layer.weight_mask
    reference = layer.weight_orig.detach().clone()
    options = dict(options)
    if options.pop("of", False):
        options["reference"] = [reference.masked_fill(pruned, value)]
    else:
        layer.weight_orig.data[pruned] = value
    before = layer.weight_mask.clone()
    with pytest.raises(ValueError, match=r"scores of .* should be finite numbers"):
        tap.global_unstructured([(layer, "weight")], tap.AlignedMagnitude, amount=5, **options)
    assert torch.equal(layer.weight_mask, before)


def test_nan_under_the_mask_does_not_change_the_masks() -> None:
    """In the magnitudes, and in the alignment with a reference of one's own."""
    layer = nn.Linear(4, 4, bias=False)
    params = [(layer, "weight")]
    reference = layer.weight.detach() + torch.randn(4, 4) / 9
    tap.global_unstructured(params, tap.Magnitude, amount=4)
    clean = nn.Linear(4, 4, bias=False)
    tap.load_state_dict(clean, layer.state_dict())
    layer.weight_orig.data[~layer.weight_mask] = math.nan
    for module in (layer, clean):
        tap.AlignedNM.apply(module, "weight", 2, 4, reference=reference)
    assert torch.equal(layer.weight_mask, clean.weight_mask)
    options: dict[str, Any] = {"alignment": "frobenius", "matching": "greedy"}
    for module in (layer, clean):
        tap.aligned_magnitude(module, "weight", 3, reference=reference, **options)
    assert torch.equal(layer.weight_mask, clean.weight_mask)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (tap.Magnitude, {"amount": 0.5, "budget": "unit"}),
        (tap.AlignedMagnitude, {"amount": 0.5, "budget": "layer"}),
        (tap.AlignedMagnitude, {"amount": 0.5, "budget": "unit", "units": "both"}),
        (tap.AlignedNM, {"input_norms": [torch.rand(12), torch.rand(16)]}),
    ],
)
def test_scores_for_some_parameters(method: Any, options: dict[str, Any]) -> None:
    """The others are ranked by their weights, whatever the budget, as by torch's function."""
    ours, torchs = pairs(mlp()), pairs(mlp())
    score = torch.rand(16, 12)
    tap.global_unstructured(ours, method, {ours[0]: score}, **options)
    prune.global_unstructured(torchs, method, {torchs[0]: score}, **options)
    assert_same_masks(ours, torchs)


def test_scores_by_their_place_as_in_torch() -> None:
    ours, torchs = nn.Linear(6, 5), nn.Linear(6, 5)
    score = torch.rand(5, 6)
    tap.Magnitude.apply(ours, "weight", 0.5, score)
    prune.L1Unstructured.apply(torchs, "weight", 0.5, score)
    assert torch.equal(ours.weight_mask, torchs.weight_mask.bool())


def test_torchs_function_finds_the_outputs_of_transposed_convolutions() -> None:
    """Though nobody has called prunable_parameters."""
    layers = [nn.ConvTranspose1d(4, 3, 3), nn.ConvTranspose1d(4, 3, 3)]
    layers[1].load_state_dict(layers[0].state_dict())
    prune.global_unstructured([(layers[0], "weight")], tap.AlignedMagnitude, amount=0.5)
    tap.global_unstructured([(layers[1], "weight")], tap.AlignedMagnitude, amount=0.5)
    assert torch.equal(layers[0].weight_mask.bool(), layers[1].weight_mask)


def test_scores_that_are_computed_from_parameters() -> None:
    ours, torchs = pairs(mlp()), pairs(mlp())
    chosen = torch.rand(16, 12) < 0.5
    for params, call in ((ours, tap.global_unstructured), (torchs, prune.global_unstructured)):
        scores = {
            params[0]: params[0][0].weight * chosen,
            params[1]: nn.Parameter(torch.arange(128.0).reshape(8, 16)),
        }
        call(params, tap.AlignedMagnitude, scores, amount=0.5)
    assert_same_masks(ours, torchs)


def test_scores_that_equal_the_weights() -> None:
    """Ranked by their magnitude, as by the function here."""
    ours, torchs = pairs(mlp()), pairs(mlp())
    for params, call in ((ours, tap.global_unstructured), (torchs, prune.global_unstructured)):
        scores = {pair: pair[0].weight.detach().clone() for pair in params}
        call(params, tap.AlignedMagnitude, scores, amount=0.5)
    assert_same_masks(ours, torchs)


def test_a_structure_in_another_order() -> None:
    params = [(nn.Linear(4, 4), "weight"), (nn.Linear(4, 4), "weight")]
    match = "in their order, with Linear.weight at index 0, got Linear.weight of another module"
    with pytest.raises(ValueError, match=match):
        prune.global_unstructured(params, tap.AlignedMagnitude, amount=0.5, structure=params[::-1])
    assert not any(prune.is_pruned(module) for module, _ in params)
