"""match_units against the plain twin, whole and in blocks; AlignedMagnitude with it."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference
import torchalignprune as tap
from torchalignprune import matching
from torchalignprune.matching import Matching, match_units

METRICS = ("cosine", "dot", "euclidean")
INF = float("inf")
NAN = float("nan")


def similarities(a: Tensor, b: Tensor, metric: str) -> Tensor:
    x, y = a.flatten(1).double(), b.flatten(1).double()
    if metric == "euclidean":
        return -(x[:, None] - y).norm(dim=2)
    if metric == "cosine":
        x, y = (units / units.norm(dim=1, keepdim=True).clamp(min=1e-300) for units in (x, y))
    return x @ y.t()


def assert_same(found: Matching, expected: Matching) -> None:
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(
        found.similarity, expected.similarity, rtol=0, atol=0, equal_nan=True
    )
    assert found.total == expected.total
    assert torch.equal(found.unmatched, expected.unmatched)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_permuted_units_find_each_other(metric: Any, device: str) -> None:
    b = torch.randn(40, 3, 2, 2, device=device)
    order = torch.randperm(40, device=device)
    found = match_units(b[order] + 0.01 * torch.randn_like(b), b, metric=metric)
    assert torch.equal(found.index, order)
    assert found.unmatched.tolist() == []
    assert found.index.device == found.similarity.device == b.device


def test_what_a_matching_holds() -> None:
    a = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    found = match_units(a, b)
    assert found.index.tolist() == [1, -1, 0]
    torch.testing.assert_close(found.similarity, torch.tensor([1.0, NAN, 0.5**0.5]), equal_nan=True)
    assert found.total == pytest.approx(1 + 0.5**0.5)
    assert found.unmatched.tolist() == []
    assert match_units(b, a).unmatched.tolist() == [1]
    assert match_units(a, b, metric="dot").similarity.tolist()[::2] == [2.0, 3.0]
    euclidean = match_units(a.double(), 4 * b.double(), metric="euclidean")
    assert euclidean.index.tolist() == [1, -1, 0]
    assert euclidean.similarity.tolist()[::2] == pytest.approx([-2.0, -(122**0.5)])


def test_a_zero_unit_has_the_similarity_zero() -> None:
    a = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    found = match_units(a, -a)
    # 0 with the zero units is more than -1 with the one that is opposite.
    assert found.index.tolist() == [0, 2, 1]
    assert found.similarity.tolist() == [0.0, 0.0, 0.0]


def test_units_of_any_size_count_alike_for_the_cosine() -> None:
    units = torch.eye(3)
    for scale in (1e-30, 1e-20, 1e30):
        found = match_units(units * scale, units.flip(0))
        assert found.index.tolist() == [2, 1, 0]
        assert found.similarity.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("metric", METRICS)
def test_equals_the_plain_form(metric: Any, dtype: torch.dtype, device: str) -> None:
    a, b = torch.randn(60, 4, 3).to(dtype), torch.randn(50, 4, 3).to(dtype)
    found = match_units(a.to(device), b.to(device), metric=metric)
    wide = dtype == torch.float64
    assert found.similarity.dtype == (torch.float64 if wide else torch.float32)
    expected = similarities(a, b, metric)
    assert torch.equal(found.index.cpu(), reference.greedy_match(expected))
    rows = (found.index >= 0).nonzero().flatten().cpu()
    torch.testing.assert_close(
        found.similarity.cpu()[rows].double(),
        expected[rows, found.index.cpu()[rows]],
        rtol=1e-5,
        atol=1e-9 if wide else 1e-5,
    )
    assert found.total == pytest.approx(float(found.similarity.nansum()), rel=1e-5)
    assert len(found.unmatched) == 0


@pytest.mark.parametrize("shapes", [((0, 4), (3, 4)), ((3, 4), (0, 4)), ((0, 4), (0, 4))])
@pytest.mark.parametrize("options", [{}, {"block": 8}, {"method": "hungarian"}])
def test_nothing_to_match(shapes: Any, options: Any, device: str) -> None:
    if "method" in options:
        pytest.importorskip("scipy")
    a, b = (torch.randn(shape, device=device) for shape in shapes)
    found = match_units(a, b, **options)
    assert found.index.tolist() == [-1] * len(a)
    assert found.unmatched.tolist() == list(range(len(b)))
    assert found.total == 0


def test_units_without_entries_are_all_alike() -> None:
    for metric in METRICS:
        found = match_units(torch.empty(2, 0), torch.empty(3, 0), metric=metric)  # type: ignore[arg-type]
        assert found.index.tolist() == [0, 1]
        assert found.total == 0


def test_units_of_one_number() -> None:
    found = match_units(torch.tensor([1.0, 5.0]), torch.tensor([4.0, 1.0]), metric="euclidean")
    assert found.index.tolist() == [1, 0]


# In blocks


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "TILE", 4)


@st.composite
def units(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    seed, dtype = draw(st.integers(0, 2**31)), draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(seed)
    length = draw(st.integers(1, 3))
    sides = []
    for _ in range(2):
        rows = draw(st.integers(1, 60))
        side = torch.randn(rows, length, generator=generator, dtype=dtype)
        kind = draw(st.sampled_from(["normal", "round", "repeated", "shifted", "zero"]))
        if kind == "round":
            side = side.round()
        elif kind == "repeated":  # near ties where a product is not the same bits everywhere
            side = side[torch.randint(0, min(rows, 3), (rows,), generator=generator)]
        elif kind == "shifted":
            side = side + 3
        elif kind == "zero":
            side = side * (torch.rand(rows, 1, generator=generator) < 0.3)
        sides.append(side)
    return sides[0], sides[1]


@settings(
    max_examples=3 * settings().max_examples,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    both=units(),
    metric=st.sampled_from(METRICS),
    block=st.sampled_from([1, 4, 5, 20]),
    pairs=st.sampled_from([1, 2, 32]),
)
def test_blocks_give_the_same_matching(
    both: tuple[Tensor, Tensor],
    metric: Any,
    block: int,
    pairs: int,
    small_tiles: None,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    monkeypatch.setattr(matching, "_PAIRS_EACH", pairs)
    a, b = (side.to(device) for side in both)
    assert_same(match_units(a, b, metric=metric, block=block), match_units(a, b, metric=metric))


@pytest.mark.parametrize(
    ("some_zero", "expected"),
    [
        (False, ["_match_band", "_match_rest"]),
        (True, ["_match_band", "_match_band", "_match_equals"]),
    ],
)
def test_blocks_go_in_rounds(
    some_zero: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands of pairs, pairs that are all as similar, and the rest in one matrix."""
    monkeypatch.setattr(matching, "TILE", 16)
    rounds = []

    def count(name: str) -> None:
        own = getattr(matching, name)

        def counted(*args: Any) -> Any:
            rounds.append(name)
            return own(*args)

        monkeypatch.setattr(matching, name, counted)

    for name in ("_match_band", "_match_equals", "_match_rest"):
        count(name)
    a, b = torch.randn(200, 20), torch.randn(180, 20)
    if some_zero:
        a[::2] = 0
    whole = match_units(a, b)
    assert rounds == []
    assert_same(match_units(a, b, block=16), whole)
    assert rounds == expected


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that an operator returns."""

    size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.size = max(self.size, value.numel())
        return result


def test_blocks_make_no_large_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "TILE", 16)
    a, b = torch.randn(400, 8), torch.randn(420, 8)
    with LargestTensor() as whole:
        match_units(a, b)
    assert whole.size == 400 * 420
    with LargestTensor() as blocks:
        match_units(a, b, block=16)
    assert blocks.size <= 3 * matching._PAIRS_EACH * 400


@pytest.mark.parametrize("metric", METRICS)
def test_blocks_of_the_real_size(metric: Any, device: str) -> None:
    a, b = torch.randn(4300, 24, device=device), torch.randn(4200, 24, device=device)
    a[::7], b[::5] = a[3].clone(), b[2].clone()
    whole = match_units(a, b, metric=metric)
    for block in (1, 3000):
        assert_same(match_units(a, b, metric=metric, block=block), whole)


# Hungarian


def test_hungarian_has_the_largest_total(device: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    a, b = torch.randn(30, 5, device=device), torch.randn(40, 5, device=device)
    found = match_units(a, b, method="hungarian")
    expected = similarities(a.cpu(), b.cpu(), "cosine").numpy()
    best = expected[optimize.linear_sum_assignment(expected, maximize=True)].sum()
    assert found.total == pytest.approx(best, rel=1e-5)
    assert len(found.index.unique()) == 30
    assert len(found.unmatched) == 10
    assert found.index.device == a.device
    assert match_units(a, b).total <= found.total + 1e-5
    assert len(match_units(b, a, method="hungarian").unmatched) == 0


def test_hungarian_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    own = builtins.__import__

    def without_scipy(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r"torchalignprune\[matching\]"):
        match_units(torch.eye(2), torch.eye(2), method="hungarian")


def test_no_gradient_and_no_autocast() -> None:
    a = torch.randn(50, 300, requires_grad=True)
    b = torch.randn(50, 300)
    expected = match_units(a, b)
    assert not expected.similarity.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(match_units(a, b), expected)


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": [[1.0]]}, TypeError, "a should be a tensor, got list"),
        ({"b": ONES.long()}, TypeError, "b should be float32.*got torch.int64"),
        ({"a": torch.tensor(1.0)}, ValueError, "a should have one unit per row, got a 0-dim"),
        ({"b": torch.ones(3, 4)}, ValueError, r"of the same shape, got \(2,\) and \(4,\)"),
        ({"b": torch.ones(3, 2, 1)}, ValueError, r"of the same shape, got \(2,\) and \(2, 1\)"),
        ({"b": torch.ones(3, 2, device="meta")}, ValueError, "same device, got cpu and meta"),
        ({"metric": "l2"}, ValueError, "metric should be one of .*got 'l2'"),
        ({"method": "sinkhorn"}, ValueError, "method should be one of .*got 'sinkhorn'"),
        ({"block": 0}, ValueError, "block should be at least 1, got 0"),
        ({"block": 2.0}, TypeError, "block should be an int, got 2.0"),
        ({"block": True}, TypeError, "block should be an int, got True"),
        (
            {"block": 8, "method": "hungarian"},
            ValueError,
            "method should be 'greedy' with block, got 'hungarian'",
        ),
        ({"a": ONES * NAN}, ValueError, "a should be finite, got NaN or infinity"),
        ({"b": ONES * INF}, ValueError, "b should be finite, got NaN or infinity"),
        (
            {"a": ONES * 1e20, "b": ONES * 1e20, "metric": "dot"},
            ValueError,
            r"do not overflow torch.float32, got entries of up to 1e\+20",
        ),
    ],
)
def test_bad_input_says_what_was_expected(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"a": ONES, "b": ONES, **changes}
    with pytest.raises(error, match=message):
        match_units(given.pop("a"), given.pop("b"), **given)


@pytest.mark.parametrize(
    ("metric", "size", "expected"),
    [("cosine", 1e38, -1.0), ("dot", 1e19, -1e38), ("euclidean", 4e18, -8e18)],
)
def test_similarities_that_overflow_are_refused(metric: Any, size: float, expected: float) -> None:
    # The product of two entries is a float32, and the sum of 16 is not.
    units = torch.full((1, 16), size)
    with pytest.raises(ValueError, match="similarities that do not overflow"):
        match_units(units, -units, metric=metric)
    found = match_units(units / 4, -units / 4, metric=metric)
    assert found.total == pytest.approx(expected)


def test_equal_units_have_a_distance() -> None:
    units = torch.randn(60, 300)
    found = match_units(units, units.clone(), metric="euclidean")
    assert torch.equal(found.index, torch.arange(60))
    assert bool((found.similarity <= 0).all())


def test_equal_pairs_of_very_many_units_are_in_order() -> None:
    """Their number is no int32."""
    one = torch.ones(1, 1)
    pairs = matching._Pairs(4, matching._Similarity(one, one, "dot"))
    for row in (40_000, 10):
        pairs.add(one, row, 0)
    _, rows, _ = pairs.in_order(70_000)
    assert rows.tolist() == [10, 40_000]


# AlignedMagnitude(matching=...)


def masks_of(layers: list[nn.Module], **options: Any) -> list[Tensor]:
    tap.global_unstructured(
        [(layer, "weight") for layer in layers], tap.AlignedMagnitude, amount=0.5, **options
    )
    return [layer.weight_mask for layer in layers]


def layers_of(seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Linear(12, 20), nn.Conv2d(6, 8, 3), nn.Linear(20, 12)]


@pytest.mark.parametrize("method", ["greedy", "hungarian"])
@pytest.mark.parametrize("units", ["out", "in"])
@pytest.mark.parametrize("alignment", ["cosine", "frobenius"])
def test_a_permuted_reference_is_put_back(alignment: str, units: str, method: str) -> None:
    if method == "hungarian":
        pytest.importorskip("scipy")
    dim = 0 if units == "out" else 1
    straight, permuted = [], []
    for layer in layers_of():
        weight = layer.weight.detach()
        straight.append(weight + 0.1 * torch.randn_like(weight) * weight.std())
        permuted.append(straight[-1].index_select(dim, torch.randperm(weight.size(dim))))
    options = {"alignment": alignment, "units": units}
    expected = masks_of(layers_of(), reference=straight, **options)
    found = masks_of(layers_of(), reference=permuted, matching=method, **options)
    without = masks_of(layers_of(), reference=permuted, **options)
    assert all(map(torch.equal, found, expected))
    assert not all(map(torch.equal, without, expected))


def test_the_masked_weights_are_matched() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[5.0, 1.0], [1.0, 4.0]])
    reference = torch.tensor([[1.0, 0.9], [0.0, 1.0]])
    seen: list[Tensor] = []
    own = tap.ops.cosine_gains

    def spy(weight: Tensor, **options: Any) -> Tensor:
        seen.append(options["reference"])
        return own(weight, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tap.ops, "cosine_gains", spy)
        tap.AlignedMagnitude.apply(layer, "weight", 0, reference=reference, matching="greedy")
        layer.weight_mask.copy_(torch.tensor([[False, True], [True, True]]))
        tap.AlignedMagnitude.apply(layer, "weight", 0, reference=reference, matching="greedy")
    # As stored, the first unit is nearest to the first of the reference; without its pruned entry
    # it is the second of the reference.
    assert torch.equal(seen[0], reference)
    assert torch.equal(seen[1], reference.flip(0))


def test_input_norms_are_in_the_matching() -> None:
    weight = torch.tensor([[1.0, 5.0], [1.0, -5.0]])
    reference = torch.tensor([[-1.0, 5.0], [1.0, 5.0]])
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = weight.clone()
    options = {
        "reference": [reference],
        "matching": "greedy",
        "input_norms": [torch.tensor([1.0, 0.0])],
    }
    matched = tap.AlignedMagnitude(0.5, **options)  # type: ignore[arg-type]
    (target,) = matched.prepare(tap.targets.targets_of([(layer, "weight")]))
    assert target.reference is not None
    assert target.reference.tolist() == [[1.0, 5.0], [-1.0, 5.0]]


def test_the_reference_may_stay_on_the_cpu(device: str) -> None:
    here = layers_of()
    there = [layer.to(device) for layer in layers_of()]
    reference = [layer.weight.detach().flip(0) for layer in here]
    expected = masks_of(here, reference=reference, matching="greedy")
    found = masks_of(there, reference=reference, matching="greedy")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, found, strict=True))


def test_through_torch() -> None:
    layers = layers_of()
    params = [(layer, "weight") for layer in layers]
    references = [layer.weight.detach().flip(0) for layer in layers]
    torch.nn.utils.prune.global_unstructured(
        params, tap.AlignedMagnitude, amount=0.5, reference=references, matching="greedy"
    )
    expected = masks_of(layers_of())
    for layer, mask in zip(layers, expected, strict=True):
        assert torch.equal(layer.weight_mask != 0, mask)


def test_many_units_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    own = matching.match_units

    def spy(*args: Any, **options: Any) -> Matching:
        seen.append(options["block"])
        return own(*args, **options)

    monkeypatch.setattr(tap.ranking, "match_units", spy)
    monkeypatch.setattr(tap.ranking, "_MANY_UNITS", 10)
    layers = layers_of()
    masks_of(layers, reference=[layer.weight.detach() for layer in layers], matching="greedy")
    assert seen == [4096, None, 4096]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"matching": "greedy"},
            ValueError,
            "reference should be given with matching='greedy', .* got None",
        ),
        ({"matching": "best", "reference": [ONES]}, ValueError, "matching should be one of"),
        (
            {"matching": "greedy", "reference": [ONES], "units": "both"},
            ValueError,
            "units should be 'out' or 'in' with matching='greedy', got 'both'",
        ),
    ],
)
def test_a_matching_that_cannot_be(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tap.AlignedMagnitude(0.5, **options)


def test_a_failed_match_leaves_the_layer() -> None:
    layer = nn.Linear(3, 3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    message = r"weight\) \(a\) cannot be matched with its reference \(b\): b should be finite"
    with pytest.raises(ValueError, match=message):
        tap.aligned_magnitude(
            layer, "weight", 0.5, reference=torch.full((3, 3), math.nan), matching="greedy"
        )
    assert list(layer.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
