"""ops.select_global against sort and cut, wherever the two could part ways."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from strategies import GRID, LAYOUTS, ODD, laid_out, masks, shapes, tensors, thorough
from torchalignprune import _C, ops

INF = float("inf")
NAN = float("nan")


def flat(kept: list[Tensor]) -> list[list[bool]]:
    return [mask.flatten().tolist() for mask in kept]


# Literal examples


def test_lowest_magnitudes_of_all_tensors_go() -> None:
    weights = [torch.tensor([3.0, -1.0]), torch.tensor([[2.0], [-0.5]])]
    assert flat(ops.select_global(weights, 2)) == [[True, False], [True, False]]


def test_among_equals_the_lower_position_goes_first() -> None:
    weights = [torch.tensor([[1.0, -1.0], [2.0, 1.0]]), torch.tensor([-1.0, 1.0])]
    assert flat(ops.select_global(weights, 4)) == [[False, False, True, False], [False, True]]


def test_position_is_the_flat_index_whatever_the_strides() -> None:
    weight = torch.ones(2, 3).t()
    assert ops.select_global([weight], 3)[0].tolist() == [[False, False], [False, True], [True] * 2]


def test_value_ranks_with_the_sign() -> None:
    weight = torch.tensor([3.0, -4.0, 0.0, -1.0])
    kept = ops.select_global([weight], 2, score="value")
    assert flat(kept) == [[True, False, True, False]]


def test_worth_is_w_times_two_r_minus_w() -> None:
    # 1 * (2 - 1) = 1, 2 * (0 - 2) = -4, 1 * (-2 - 1) = -3, 3 * (6 - 3) = 9
    weight, r = torch.tensor([1.0, 2.0, 1.0, 3.0]), torch.tensor([1.0, 0.0, -1.0, 3.0])
    kept = ops.select_global([weight], 2, score="worth", references=[r])
    assert flat(kept) == [[True, False, False, True]]


def test_scales_multiply_rows_and_columns() -> None:
    weight = torch.ones(2, 3)
    rows, columns = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 1.0, 4.0])
    # 10 2 8 / 15 3 12
    kept = ops.select_global([weight], 3, row_scales=[rows], column_scales=[columns])
    assert kept[0].tolist() == [[True, False, False], [True, False, True]]


def test_scales_multiply_the_reference_too() -> None:
    # v (2 u - v) with v = 2, 2 and u = 2, 2 * 0.5: 4 and 0
    weight, r = torch.ones(1, 2), torch.tensor([[1.0, 0.5]])
    other = torch.tensor([1.0])
    kept = ops.select_global(
        [weight, other],
        2,
        score="worth",
        references=[r, None],
        row_scales=[torch.tensor([4.0]), None],
        column_scales=[torch.tensor([0.5, 0.5]), None],
    )
    assert flat(kept) == [[True, False], [False]]


def test_trailing_dimensions_share_the_scale_of_their_column() -> None:
    weight = torch.ones(1, 2, 3)
    kept = ops.select_global([weight], 3, column_scales=[torch.tensor([2.0, 1.0])])
    assert kept[0].tolist() == [[[True] * 3, [False] * 3]]


def test_scales_of_one_entry_are_for_the_whole_tensor() -> None:
    weights = [torch.full((2, 2), 3.0), torch.full((3,), 2.0)]
    scales = [torch.tensor([1.0]), torch.tensor([2.0])]
    none = [None, None]
    assert flat(ops.select_global(weights, 4, row_scales=scales, column_scales=none)) == [
        [False] * 4,
        [True] * 3,
    ]
    assert flat(ops.select_global(weights, 4, column_scales=scales)) == [[False] * 4, [True] * 3]


def test_masked_entries_stay_pruned_and_do_not_count() -> None:
    weight = torch.tensor([0.5, 3.0, 1.0, 2.0])
    mask = torch.tensor([False, False, True, True])
    assert flat(ops.select_global([weight], 1, masks=[mask])) == [[False, False, False, True]]
    assert flat(ops.select_global([weight], 0, masks=[mask])) == [mask.tolist()]
    assert flat(ops.select_global([weight], 2, masks=[mask])) == [[False] * 4]


def test_zero_and_minus_zero_are_equals() -> None:
    for score in ("value", "magnitude", "worth"):
        weight = torch.tensor([0.0, -0.0, 0.0, -0.0])
        kept = ops.select_global([weight], 2, score=score)  # type: ignore[arg-type]
        assert flat(kept) == [[False, False, True, True]], score


def test_denormals_and_infinities_have_their_places(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    weight = torch.tensor([INF, tiny / 2, 1.0, 0.0, tiny / 4, tiny, -INF], dtype=dtype)
    order = [3, 4, 1, 5, 2, 0, 6]
    for count in range(8):
        expected = [i not in order[:count] for i in range(7)]
        assert flat(ops.select_global([weight], count)) == [expected]
    by_value = [6, 3, 4, 1, 5, 2, 0]
    for count in range(8):
        expected = [i not in by_value[:count] for i in range(7)]
        assert flat(ops.select_global([weight], count, score="value")) == [expected]


@pytest.mark.parametrize("count", [0, 1, 6, 11, 12])
def test_all_equal_goes_by_position(count: int, device: str, dtype: torch.dtype) -> None:
    weights = [torch.full((2, 3), -1.0, dtype=dtype, device=device) for _ in range(2)]
    kept = torch.cat([mask.flatten() for mask in ops.select_global(weights, count)])
    assert kept.tolist() == [False] * count + [True] * (12 - count)


def test_nothing_to_prune_of() -> None:
    assert ops.select_global([], 0) == []
    for shape in [(0,), (0, 3), (3, 0), (2, 0, 4)]:
        (kept,) = ops.select_global([torch.empty(shape)], 0)
        assert kept.shape == shape
        assert kept.dtype == torch.bool
    weights = [torch.empty(0, 3), torch.tensor(2.0), torch.empty(2, 0), torch.tensor([1.0])]
    assert flat(ops.select_global(weights, 1)) == [[], [True], [], [False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_ranks_by_its_value(device: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = every[~every.isnan()].to(device)
    for count in range(0, numbers.numel(), 4_001):
        for score in ("value", "magnitude"):
            [kept] = ops.select_global([numbers], count, score=score)
            [wanted] = ops.select_global([numbers.double()], count, score=score)
            assert torch.equal(kept, wanted), (count, score)


def test_scores_are_computed_in_float64_as_soon_as_one_tensor_is_float64() -> None:
    a = torch.tensor([1.0])
    b = torch.tensor([1.0 - 1e-12], dtype=torch.float64)
    assert flat(ops.select_global([a, b], 1)) == [[True], [False]]


# Properties


@dataclass
class Selection:
    weights: list[Tensor]
    count: int
    options: dict[str, Any] = field(default_factory=dict)


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    score = draw(st.sampled_from(["value", "magnitude", "worth"]))
    dtypes = draw(
        st.sampled_from(
            [
                (torch.float32,),
                (torch.float64,),
                (torch.bfloat16, torch.float16),
                (torch.float32, torch.float16, torch.bfloat16, torch.float64),
            ]
        )
    )
    # Infinities times zero scales would be NaN, and an infinite worth inf - inf.
    scaled = score != "value" and draw(st.booleans())
    values = GRID if scaled or score == "worth" else draw(st.sampled_from([GRID, ODD, None]))
    weights, kept, references, rows, columns = [], [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(shapes())
        dtype = draw(st.sampled_from(dtypes))
        weights.append(draw(tensors(shape, dtype, values=values)))
        kept.append(draw(st.none() | masks(shape)))
        needs = score == "worth" and draw(st.booleans())
        references.append(draw(tensors(shape, draw(st.sampled_from(dtypes)))) if needs else None)
        length = (1, weights[-1].numel()) if len(shape) < 2 else shape[:2]
        rows.append(draw(st.sampled_from([None, 1, length[0]])) if scaled else None)
        columns.append(draw(st.sampled_from([None, 1, length[1]])) if scaled else None)
    wide = any(weight.dtype == torch.float64 for weight in weights)
    of_scores = torch.float64 if wide else torch.float32
    factors = [0.0, 0.5, 1.0, 3.0]
    row_scales, column_scales = (
        [
            None
            if length is None
            else draw(tensors((length,), of_scores, values=factors, layouts=["offset", "strided"]))
            for length in lengths
        ]
        for lengths in (rows, columns)
    )
    alive = sum(
        weight.numel() if mask is None else int(mask.sum())
        for weight, mask in zip(weights, kept, strict=True)
    )
    count = draw(st.sampled_from([0, alive]) | st.integers(0, alive))
    options = {
        "score": score,
        "masks": kept,
        "references": references,
        "row_scales": row_scales,
        "column_scales": column_scales,
    }
    return Selection(weights, count, options)


def to(device: str, given: Any) -> Any:
    """Tensors of a list moved to a device, with the strides that they have."""
    if not isinstance(given, list):
        return given
    return [entry if entry is None or device == "cpu" else _moved(entry, device) for entry in given]


def _moved(tensor: Tensor, device: str) -> Tensor:
    room = torch.empty(1, device=device, dtype=tensor.dtype)
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    room = torch.empty(max(size, 1), device=device, dtype=tensor.dtype)
    room = room.as_strided(tensor.shape, tensor.stride())
    return room.copy_(tensor) if 0 not in tensor.stride() else tensor.to(device)


@thorough
@given(selection=selections())
def test_equals_sort_and_cut(selection: Selection, device: str) -> None:
    expected = reference.select_global(selection.weights, selection.count, **selection.options)
    options = {name: to(device, given) for name, given in selection.options.items()}
    kept = ops.select_global(to(device, selection.weights), selection.count, **options)
    for mask, plain in zip(kept, expected, strict=True):
        assert mask.dtype == torch.bool
        assert torch.equal(mask.cpu(), plain)


@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    layout=st.sampled_from([name for name in LAYOUTS if name != "expanded"]),
)
def test_masks_lie_in_memory_as_the_weights_do(
    data: st.DataObject, shape: tuple[int, ...], layout: str
) -> None:
    weight = data.draw(tensors(shape, torch.float32, layouts=[layout]))
    (kept,) = ops.select_global([weight], weight.numel() // 2)
    assert kept.shape == weight.shape
    assert kept.stride() == torch.empty_like(weight, dtype=torch.bool).stride()


@given(selection=selections())
def test_nothing_that_is_given_changes(selection: Selection) -> None:
    everything = [*selection.weights, *(t for v in selection.options.values() for t in v)]
    tensors_given = [t for t in everything if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors_given]
    kept = ops.select_global(selection.weights, selection.count, **selection.options)
    for tensor, copy in zip(tensors_given, before, strict=True):
        assert torch.equal(tensor, copy)
    # Writing to a mask must not reach the weights or the masks that were handed in.
    for mask in kept:
        mask.logical_not_()
    for tensor, copy in zip(tensors_given, before, strict=True):
        assert torch.equal(tensor, copy)


def test_weights_that_require_grad_are_welcome() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    (kept,) = ops.select_global([weight], 1)
    assert kept.tolist() == [False, True]
    assert not kept.requires_grad


# Sizes at which the passes, the sample, the histogram and several threads come in


SAMPLE_RUNS = 1 << 13  # of select_global.cpp, so that a tensor can mislead its sample
SAMPLE_RUN = 16


def sampled_positions(size: int) -> Tensor:
    """Where the sample looks."""
    run = torch.arange(SAMPLE_RUNS, dtype=torch.float64)
    scatter = torch.fmod(run * 0.6180339887498949, 1.0)
    start = ((run + scatter) * (size / SAMPLE_RUNS)).long()
    return (start[:, None] + torch.arange(SAMPLE_RUN)).flatten().clamp(max=size - 1)


def misled(weight: Tensor, to_values: Tensor) -> Tensor:
    """The weight with other values at all the places where the sample looks."""
    where = sampled_positions(weight.numel())
    flat = weight.flatten().clone()
    flat[where] = to_values[torch.arange(where.numel()) % to_values.numel()]
    return flat.reshape(weight.shape)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def crowded(size: int) -> Tensor:
    """Neighbouring floats only: far too many in every bin of a wide histogram."""
    step = torch.randint(0, 2000, (size,), generator=torch.Generator().manual_seed(2))
    return (torch.ones(size).view(torch.int32) + step.to(torch.int32)).view(torch.float32)


def tied(size: int, share: float) -> Tensor:
    """That share of the entries is 1, the others lie on both sides."""
    values = normal(size) + 1
    equal = torch.rand(size, generator=torch.Generator().manual_seed(3)) < share
    values[equal] = 1
    return values


N = 1_400_003  # no multiple of any block


@dataclass
class Big:
    make: Callable[[], list[Tensor]]
    amount: float = 0.5  # a share, or how many
    options: Callable[[list[Tensor]], dict[str, Any]] = lambda weights: {}


def half_masked(weights: list[Tensor]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    return {"masks": [torch.rand(w.shape, generator=generator) < 0.5 for w in weights]}


def nearly_all_masked(weights: list[Tensor]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    return {"masks": [torch.rand(w.shape, generator=generator) < 1e-3 for w in weights]}


def scaled(weights: list[Tensor]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32

    def one(n: int) -> Tensor:
        return torch.rand(n, generator=generator, dtype=dtype) + 0.5

    return {
        "score": "worth",
        "references": [w + 0.3 * w.roll(1).to(w.dtype) for w in weights],
        "row_scales": [one(w.size(0)) for w in weights],
        "column_scales": [one(w.size(1)) for w in weights],
    }


BIG: dict[str, Big] = {
    "normal": Big(lambda: [normal(N)]),
    "few go": Big(lambda: [normal(N)], 1e-4),
    "one goes": Big(lambda: [normal(N)], 1 / N),
    "few stay": Big(lambda: [normal(N)], 1 - 1e-4),
    "one stays": Big(lambda: [normal(N)], 1 - 1 / N),
    "all go": Big(lambda: [normal(N)], 1.0),
    "none goes": Big(lambda: [normal(N)], 0.0),
    "value": Big(lambda: [normal(N)], 0.3, lambda w: {"score": "value"}),
    "float64": Big(lambda: [normal(N, dtype=torch.float64)]),
    "float64, neighbours": Big(lambda: [1 + normal(N, dtype=torch.float64) * 1e-13]),
    "bfloat16": Big(lambda: [normal(N, dtype=torch.bfloat16)]),
    "float16": Big(lambda: [normal(N, dtype=torch.float16)], 0.7),
    "every dtype": Big(
        lambda: [
            normal(300_001, dtype=torch.bfloat16),
            normal(500, 901),
            normal(400_001, dtype=torch.float64),
            normal(333, 1001, dtype=torch.float16),
        ]
    ),
    "many small tensors": Big(lambda: [normal(37, 41) * (i % 7 + 1) for i in range(1000)]),
    "sorted": Big(lambda: [normal(N).sort().values], 0.4),
    "few of the ties go": Big(lambda: [tied(N, 0.6)], 0.25),
    "most of the ties go": Big(lambda: [tied(N, 0.6)], 0.75),
    "ties in a short row": Big(lambda: [tied(N, 0.001)]),
    "all equal, few go": Big(lambda: [torch.ones(N)], 0.1),
    "all equal, most go": Big(lambda: [torch.ones(N)], 0.9),
    "two values, the lower goes": Big(lambda: [(normal(N) > 0).float()], 0.3),
    "two values, into the higher": Big(lambda: [(normal(N) > 0).float()], 0.7),
    "crowded": Big(lambda: [crowded(3 * N)]),
    "crowded below the sample": Big(lambda: [misled(crowded(3 * N), torch.tensor([2.0, 3.0]))]),
    "crowded above the sample": Big(lambda: [misled(crowded(3 * N), torch.tensor([0.1, 0.5]))]),
    "sample all too high": Big(lambda: [misled(normal(N), torch.tensor([1e3, 1e4]))]),
    "sample all too high, all below it go": Big(
        lambda: [misled(normal(N), torch.tensor([1e3, 1e4]))],
        N - len(sampled_positions(N).unique()),
    ),
    "sample all too low": Big(lambda: [misled(normal(N), torch.tensor([1e-9, 1e-8]))]),
    "sample of one value": Big(lambda: [misled(normal(N), torch.tensor([0.1]))]),
    "sample of infinities": Big(lambda: [misled(normal(N), torch.tensor([INF]))]),
    "sample all masked": Big(
        lambda: [normal(N)],
        options=lambda w: {"masks": [misled(torch.ones(N), torch.zeros(1)) != 0]},
    ),
    "float64, sample too low": Big(
        lambda: [misled(normal(N, dtype=torch.float64), torch.tensor([1e-300]).double())]
    ),
    "float64, sample too high": Big(
        lambda: [misled(normal(N, dtype=torch.float64), torch.tensor([1e300]).double())]
    ),
    "float64, infinities above the sample": Big(
        lambda: [misled(torch.full((N,), INF).double(), torch.tensor([-2.0 + 2**-52]).double())],
        options=lambda w: {"score": "value"},
    ),
    "float64, ties, transposed": Big(
        lambda: [laid_out(tied(N - 3, 0.6).double().view(1000, 1400), "transposed")], 0.6
    ),
    "half masked": Big(lambda: [normal(N), normal(701, 999)], options=half_masked),
    "ties, half masked": Big(lambda: [tied(N, 0.6)], 0.3, half_masked),
    "nearly all masked": Big(lambda: [normal(N), normal(701, 999)], options=nearly_all_masked),
    "worth and scales": Big(lambda: [normal(701, 999), normal(1203, 501)], options=scaled),
    "worth and scales, float64": Big(
        lambda: [normal(701, 999, dtype=torch.float64), normal(1203, 501)], options=scaled
    ),
    "transposed and strided": Big(
        lambda: [laid_out(normal(701, 999), "transposed"), laid_out(normal(903, 801), "strided")]
    ),
    "ties, transposed": Big(lambda: [laid_out(tied(N - 3, 0.6).view(1000, 1400), "transposed")]),
    "worth and scales, transposed": Big(
        lambda: [laid_out(normal(701, 999), "transposed"), normal(1203, 501)], options=scaled
    ),
    "channels last": Big(lambda: [laid_out(normal(64, 33, 31, 29), "channels_last")]),
    "expanded": Big(lambda: [normal(1, 1201).expand(1301, 1201)]),
}


@pytest.mark.parametrize("case", BIG)
def test_big_equals_sort_and_cut_with_any_number_of_threads(case: str, device: str) -> None:
    big = BIG[case]
    weights = big.make()
    options = big.options(weights)
    alive = sum(w.numel() for w in weights)
    if "masks" in options:
        alive = sum(int(mask.sum()) for mask in options["masks"])
    count = big.amount if isinstance(big.amount, int) else round(big.amount * alive)
    expected = reference.select_global(weights, count, **options)
    on_device = {name: to(device, given) for name, given in options.items()}
    for threads in (1, 2, 3) if device == "cpu" else (1,):
        torch.set_num_threads(threads)
        kept = ops.select_global(to(device, weights), count, **on_device)
        for mask, plain in zip(kept, expected, strict=True):
            assert torch.equal(mask.cpu(), plain), f"{threads} threads"


def test_a_bracket_that_begins_right_behind_the_last_one_to_go() -> None:
    size = 300_000
    where = sampled_positions(size)
    weight = torch.ones(size)
    others = size - len(where)
    # As large a share of the sample is 2 as of all entries is 1, which the sample does not see.
    equal = len(where) * others // size
    weight[where] = torch.cat([torch.full((equal,), 2.0), 2 + torch.rand(len(where) - equal)])
    (kept,) = ops.select_global([weight], others)
    assert torch.equal(kept, weight > 1)


def test_nan_anywhere_in_a_big_tensor_is_found() -> None:
    weights = [normal(N), normal(N)]
    for position in (0, 70_000, N - 1):
        wrong = [weights[0], weights[1].clone()]
        wrong[1][position] = NAN
        for count in (0, 5, N, 2 * N):
            with pytest.raises(ValueError, match=r"scores of second should be numbers, got NaN"):
                ops.select_global(wrong, count, names=["first", "second"])


def free_memory() -> int:
    """Bytes, together with those that the system would take back from its cache."""
    listed = Path("/proc/meminfo")
    text = listed.read_text() if listed.exists() else ""
    if found := re.search(r"MemAvailable: *(\d+) kB", text):
        return int(found[1]) << 10
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


@pytest.mark.slow
@pytest.mark.skipif(free_memory() < 4 << 30, reason="needs 4 GiB of free memory")
def test_more_than_two_to_the_31_entries() -> None:
    columns, rows = 1 << 16, (1 << 15) + 3
    row = torch.arange(1, columns + 1, dtype=torch.float32).to(torch.bfloat16)
    row = row[torch.randperm(columns)]
    weight = row.expand(rows, columns)
    assert weight.numel() > 1 << 31
    values = row.unique()
    threshold = values[values.numel() // 2]
    below, equal = int((row < threshold).sum()), int((row == threshold).sum())
    # All that is below, and of the equals those of 20,000 rows and one in the next.
    count = below * rows + equal * 20_000 + 1
    (kept,) = ops.select_global([weight], count)
    assert bool((kept[:20_000] == (row > threshold)).all())
    assert bool((kept[20_001:] == (row >= threshold)).all())
    between = row >= threshold
    between[(row == threshold).nonzero()[0]] = False
    assert torch.equal(kept[20_000], between)


# Every level of SIMD. A level is chosen once in a process.


LEVELS = ("portable", "avx2", "avx512")

HASH_OF_RESULTS = """
import hashlib, sys
sys.path[:0] = {path!r}
import torch
from torchalignprune import _C, ops
from test_select_global import BIG
names = {names!r}
found = hashlib.sha256()
for name in names:
    weights = BIG[name].make()
    options = BIG[name].options(weights)
    count = sum(w.numel() for w in weights) // 5
    for mask in ops.select_global(weights, count, **options):
        found.update(mask.contiguous().numpy().tobytes())
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    w = torch.linspace(-3, 5, 41 * 1500, dtype=torch.float64).sin().reshape(41, 1500).to(dtype)
    r = w.roll(3, 1) + w
    counts = torch.arange(41) * 30
    gains = ops.cosine_gains(w), ops.cosine_gains(w, reference=r)
    for result in (ops.select_rows(w, counts), *gains, *ops.square_sums(w)):
        found.update(result.contiguous().view(torch.uint8).numpy().tobytes())
torch.manual_seed(0)
for w in (torch.randn(300, 333), torch.randn(300, 333).double(), torch.randn(70, 99).round()):
    found.update(ops.greedy_match(w).numpy().tobytes())
print(_C.simd_level(), found.hexdigest())
"""


def test_every_level_of_simd_gives_the_same_bits() -> None:
    names = ["normal", "float64", "every dtype", "most of the ties go", "ties, half masked"]
    names += ["worth and scales", "worth and scales, float64", "transposed and strided", "value"]
    script = HASH_OF_RESULTS.format(path=[os.path.dirname(__file__)], names=names)
    hashes: dict[str, str] = {}
    for level in LEVELS:
        environment = {**os.environ, "TORCHALIGNPRUNE_SIMD": level}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:  # a level that this processor has not is an error that says so
            assert "TORCHALIGNPRUNE_SIMD" in done.stderr, done.stderr
            continue
        used, found = done.stdout.split()
        assert used == level
        hashes[level] = found
    assert _C.simd_level() in hashes
    assert "portable" in hashes
    assert len(set(hashes.values())) == 1, hashes


# The operator in torch's machinery


def arguments(**changes: Any) -> tuple[Any, ...]:
    given = {
        "weights": [torch.randn(3, 4), torch.randn(5, dtype=torch.bfloat16)],
        "masks": [torch.rand(3, 4) < 0.7, None],
        "references": [torch.randn(3, 4), None],
        "row_scales": [torch.rand(3), None],
        "column_scales": [None, torch.rand(5)],
        "names": ["a", "b"],
        "count": 3,
        "score": "worth",
    }
    return tuple({**given, **changes}.values())


def test_opcheck(device: str) -> None:
    operator = torch.ops.torchalignprune.select_global.default
    torch.library.opcheck(operator, tuple(to(device, a) for a in arguments()))
    none = [None, None]
    transposed = [torch.randn(4, 3, device=device).t(), torch.randn(2, 3, 4, 5, device=device)]
    torch.library.opcheck(
        operator, (transposed, none, none, none, none, ["a", "b"], 20, "magnitude")
    )


def test_compiles_into_one_graph(device: str) -> None:
    weights = [torch.randn(3, 4, device=device), torch.randn(5, device=device)]
    compiled = torch.compile(
        lambda a, b: ops.select_global([a, b], 6), fullgraph=True, backend="aot_eager"
    )
    assert flat(compiled(*weights)) == flat(ops.select_global(weights, 6))


# Bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": [torch.ones(3).long()]}, TypeError, "here should be float32.*got Long"),
        (
            {"weights": [torch.ones(3).to(torch.float8_e4m3fn)]},
            TypeError,
            "here should be float32.*got Float8_e4m3fn",
        ),
        ({"weights": [torch.ones(3, dtype=torch.complex64)]}, TypeError, "here should be float32"),
        ({"weights": [torch.tensor([1.0, NAN])]}, ValueError, "scores of here.*got NaN"),
        ({"count": -1}, ValueError, "count should not be negative, got -1"),
        ({"count": 7}, ValueError, "count=7 should not be larger than .*6"),
        ({"count": 4, "masks": [torch.eye(2, 3) > 0]}, ValueError, "count=4 .*2"),
        ({"score": "size"}, ValueError, "score should be 'value', .*got 'size'"),
        ({"masks": [torch.ones(3, 2) > 0]}, ValueError, r"mask of here .*\[2, 3\], got \[3, 2\]"),
        ({"masks": [torch.ones(2, 3)]}, TypeError, "mask of here should be bool, got Float"),
        ({"masks": []}, ValueError, "masks should have one entry for each of the 1 weights, got 0"),
        ({"score": "worth", "references": []}, ValueError, "references should have one entry for"),
        ({"names": ["a", "b"]}, ValueError, "names should have one entry"),
        ({"references": [torch.ones(2, 3)]}, ValueError, r"score='worth' only.*here"),
        (
            {"score": "worth", "references": [torch.ones(6)]},
            ValueError,
            r"reference of here .*\[2, 3\], got \[6\]",
        ),
        (
            {"score": "worth", "references": [torch.ones(2, 3).int()]},
            TypeError,
            "reference of here should be float32.*got Int",
        ),
        ({"row_scales": [torch.ones(3)]}, ValueError, r"row scale of here .*\[2\] or \[1\], got"),
        ({"row_scales": [torch.ones(2).double()]}, TypeError, "row scale of here .*got Double"),
        ({"column_scales": [torch.ones(1, 3)]}, ValueError, r"column scale of here .*\[3\]"),
        ({"column_scales": [torch.tensor([NAN, 1, 1])]}, ValueError, "scores of here.*NaN"),
        ({"score": "value", "row_scales": [torch.ones(2)]}, ValueError, "scales do not go.*here"),
    ],
)
def test_bad_input_says_what_was_expected(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"weights": [torch.ones(2, 3)], "count": 1, "names": ["here"], **changes}
    with pytest.raises(error, match=message):
        ops.select_global(given.pop("weights"), given.pop("count"), **given)


def test_count_without_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="count=1 should be 0"):
        ops.select_global([], 1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_on_two_devices_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"weights should be on one device.*there on cuda"):
        ops.select_global([torch.ones(2), torch.ones(2).cuda()], 1, names=["here", "there"])
