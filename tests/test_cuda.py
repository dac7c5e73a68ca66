"""The operators on a GPU: the same bits as on the CPU, whatever goes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import reference
import torchalignprune as tap
from models import assert_same_masks, mixed, pairs
from strategies import LAYOUTS, laid_out
from torchalignprune import ops

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SAMPLED = (1 << 24) + 4099  # so many entries are sampled first
INF = float("inf")
NAN = float("nan")
GIB = 1 << 30


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchalignprune::select_rows", "CUDA"):
        return "the extension was built without CUDA"
    return None


pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


def needs_memory(size: int) -> None:
    """Skips what the GPU at hand is too small for: tensors of more than 2^31 entries, say."""
    if torch.cuda.mem_get_info()[0] < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free GPU memory")


def on_gpu(given: Any) -> Any:
    """The same tensors on the GPU, with their strides and their offset in memory."""
    if isinstance(given, dict):
        return {name: on_gpu(value) for name, value in given.items()}
    if isinstance(given, list):
        return [on_gpu(value) for value in given]
    if not isinstance(given, Tensor):
        return given
    whole = given.untyped_storage().size() // given.element_size()
    memory = given.as_strided((whole,), (1,), 0).to(DEVICE)
    return memory.as_strided(given.shape, given.stride(), given.storage_offset())


def assert_same(found: Tensor, expected: Tensor) -> None:
    """On the GPU as on the CPU, bit for bit and stride for stride."""
    assert found.device.type == torch.device(DEVICE).type
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    differ = int((found.cpu() != expected).sum())
    assert differ == 0, f"{differ} of {expected.numel()} entries differ"


class Draw:
    """Chooses by a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def share(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def index(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def one(self, choices: Any) -> Any:
        return choices[self.index(len(choices))]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Many ties or none, all equal, half zero, of any spread, in any layout."""
        values = self.normal(*shape)
        kind = self.index(6)
        if kind == 0:
            values = values.round()
        elif kind == 1:
            values = torch.full(shape, self.one([0.0, -0.0, -1.5]))
        elif kind == 2:
            values = values * (self.uniform(*shape) < 0.5)
        elif kind == 3:
            values = values * torch.exp(2 * self.normal(*shape))
        return laid_out(values.to(dtype), self.one(LAYOUTS))

    def mask(self, shape: tuple[int, ...]) -> Tensor:
        share = self.one([0.5, 0.95, 0.02])
        return laid_out(self.uniform(*shape) < share, self.one(LAYOUTS))

    def scale(self, length: int, dtype: torch.dtype) -> Tensor:
        return self.uniform(self.one([1, length])).to(dtype)

    def shape(self) -> tuple[int, ...]:
        sides = [1 + self.index(60) for _ in range(4)]
        shapes = [
            (),
            (0,),
            (3, 0),
            (sides[0],),
            (sides[0], 7 * sides[1]),
            (sides[0] % 9, sides[1], 3, 3),
            (2, 3, 2, sides[0], 2),
            (sides[0] % 5, 8192),
            (8192 * (1 + sides[0] % 4),),
            (8192 + sides[0], 9),
            (301, 257),
        ]
        return tuple(self.one(shapes))


def rows_and_columns(weight: Tensor) -> tuple[int, int]:
    return (1, weight.numel()) if weight.dim() < 2 else (weight.size(0), weight.size(1))


def outcome(run: Callable[[], Any]) -> Any:
    """What a call returns, or its error."""
    try:
        return run()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


# select_global


def random_selection(seed: int) -> tuple[list[Tensor], int, dict[str, Any]]:
    draw = Draw(seed)
    dtypes = draw.one([[dtype] for dtype in DTYPES] + [DTYPES, DTYPES[::3], DTYPES[2:]])
    score = draw.one(["value", "magnitude", "worth"])
    weights = [draw.tensor(draw.shape(), draw.one(dtypes)) for _ in range(1 + draw.index(5))]
    wide = any(weight.dtype == torch.float64 for weight in weights)
    dtype = torch.float64 if wide else torch.float32

    def some(make: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        return [make(weight) if draw.share() < 0.4 else None for weight in weights]

    options: dict[str, Any] = {
        "score": score,
        "masks": some(lambda weight: draw.mask(tuple(weight.shape))),
    }
    if score == "worth":
        # A reference in float64 beside weights in float32 is rounded to it.
        options["references"] = some(lambda w: draw.tensor(tuple(w.shape), draw.one(DTYPES)))
    if score != "value":
        options["row_scales"] = some(lambda w: draw.scale(rows_and_columns(w)[0], dtype))
        options["column_scales"] = some(lambda w: draw.scale(rows_and_columns(w)[1], dtype))
    alive = sum(
        weight.numel() if mask is None else int(mask.sum())
        for weight, mask in zip(weights, options["masks"], strict=True)
    )
    amounts = [0, 1, alive // 2, round(draw.share() * alive), alive - 1, alive]
    return weights, min(max(0, draw.one(amounts)), alive), options


@pytest.mark.parametrize("seed", range(150))
def test_select_global_equals_the_cpu_and_the_plain_form(seed: int) -> None:
    weights, count, options = random_selection(seed)
    expected = ops.select_global(weights, count, **options)
    found = ops.select_global(on_gpu(weights), count, **on_gpu(options))
    plain = reference.select_global(weights, count, **options)
    for mask, cpu, slow in zip(found, expected, plain, strict=True):
        assert_same(mask, cpu)
        assert torch.equal(cpu, slow)


def sampled_positions(size: int) -> Tensor:
    """Where csrc/cuda/select_global.cu looks first."""
    run = torch.arange(1 << 14, dtype=torch.float64)
    scattered = run + (run * 0.6180339887498949).frac()
    starts = (scattered * (size / (1 << 14))).long()
    return (starts[:, None] + torch.arange(4)).clamp(max=size - 1).flatten()


def misled(values: float) -> Tensor:
    """All that the sample sees is one value."""
    weight = torch.randn(SAMPLED)
    weight[sampled_positions(SAMPLED)] = values
    return weight


def neighbours(size: int) -> Tensor:
    """Neighbouring floats only, so that the bins hold many keys each."""
    steps = torch.randint(0, 2000, (size,), dtype=torch.int32)
    return (torch.ones(size).view(torch.int32) + steps).view(torch.float32)


LARGE: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(SAMPLED),
    "normal rows": lambda: torch.randn(4099, 4100) * torch.exp(torch.randn(4099, 1)),
    "float64": lambda: torch.randn(SAMPLED, dtype=torch.float64),
    "float16": lambda: torch.randn(SAMPLED).half(),
    "bfloat16": lambda: torch.randn(SAMPLED).bfloat16(),
    "unaligned": lambda: torch.randn(SAMPLED + 1)[1:],
    "unaligned bfloat16": lambda: torch.randn(SAMPLED + 1).bfloat16()[1:],
    "transposed": lambda: torch.randn(4100, 4099).t(),
    "channels last": lambda: torch.randn(512, 3700, 3, 3).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1, 5000).expand(3400, 5000),
    "half zero": lambda: torch.randn(SAMPLED) * (torch.rand(SAMPLED) < 0.5),
    "three values": lambda: torch.randn(SAMPLED).clamp(-1, 1).round(),
    "coarse": lambda: (torch.randn(SAMPLED) * 8).round() / 8,
    "all equal": lambda: torch.full((SAMPLED,), -2.0),
    "neighbours": lambda: neighbours(SAMPLED),
    "wide": lambda: torch.randn(SAMPLED) * torch.exp(10 * torch.randn(SAMPLED)),
    "sample too low": lambda: misled(1e-30),
    "sample too high": lambda: misled(1e30),
    "sample of one value": lambda: misled(0.5),
    "sample of infinities": lambda: misled(INF),
}


@pytest.mark.parametrize("case", LARGE)
def test_select_global_of_many_entries_equals_the_cpu(case: str) -> None:
    weight = LARGE[case]()
    moved = on_gpu(weight)
    for share in (0.0, 1e-6, 0.01, 0.3, 0.5, 0.9, 1 - 1e-6, 1.0):
        count = round(share * weight.numel())
        (expected,) = ops.select_global([weight], count)
        (found,) = ops.select_global([moved], count)
        assert_same(found, expected)


@pytest.mark.parametrize("share", [1e-5, 0.5, 0.999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_select_global_of_many_tensors_with_all_that_goes_with_them(
    dtype: torch.dtype, share: float
) -> None:
    shapes = [(3000, 2050), (77,), (1500, 30, 3, 3), (0, 5), (1,), (2111, 2999), (513, 8192)]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = [rows_and_columns(weight) for weight in weights]
    options: dict[str, Any] = {
        "masks": [torch.rand(w.shape) < 0.7 if i % 2 else None for i, w in enumerate(weights)],
        "row_scales": [torch.rand(n, dtype=wide) + 0.5 for n, _ in sizes],
        "column_scales": [torch.rand(n, dtype=wide) + 0.5 for _, n in sizes],
    }
    alive = sum(
        w.numel() if mask is None else int(mask.sum())
        for w, mask in zip(weights, options["masks"], strict=True)
    )
    count = round(share * alive)
    for score in ("magnitude", "worth"):
        if score == "worth":
            options["references"] = [w + torch.randn(w.shape).to(dtype) for w in weights]
        expected = ops.select_global(weights, count, score=score, **options)  # type: ignore[arg-type]
        found = ops.select_global(on_gpu(weights), count, score=score, **on_gpu(options))  # type: ignore[arg-type]
        for mask, cpu in zip(found, expected, strict=True):
            assert_same(mask, cpu)


@pytest.mark.slow
def test_select_global_of_more_than_two_to_the_31_entries() -> None:
    needs_memory(24 * GIB)
    size = (1 << 31) + 12_345
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    weight.normal_(generator=generator)
    count = int(0.6 * size)
    (kept,) = ops.select_global([weight], count)
    assert int(kept.sum()) == size - count
    largest, smallest, last, first = -1.0, INF, -1, size
    step = 1 << 28
    for begin in range(0, size, step):  # the threshold
        part, own = weight[begin : begin + step].abs(), kept[begin : begin + step]
        largest = max(largest, float(part[~own].max()))
        smallest = min(smallest, float(part[own].min()))
    assert largest == smallest  # bfloat16 has equals there
    for begin in range(0, size, step):  # their order
        part, own = weight[begin : begin + step].abs() == largest, kept[begin : begin + step]
        gone, stayed = (part & ~own).nonzero(), (part & own).nonzero()
        last = max(last, begin + int(gone[-1])) if gone.numel() else last
        first = min(first, begin + int(stayed[0])) if stayed.numel() else first
    assert -1 < last < first < size


@pytest.mark.slow
def test_select_global_of_an_expanded_tensor_of_more_than_two_to_the_31_entries() -> None:
    needs_memory(8 * GIB)
    columns, rows = 30_000, (1 << 31) // 30_000 + 5
    row = torch.arange(1, columns + 1, device=DEVICE).short().view(torch.bfloat16)
    row = row[torch.randperm(columns, device=DEVICE)]  # positive numbers, no two of them equal
    weight = row.expand(rows, columns)
    assert weight.numel() > 1 << 31
    (kept,) = ops.select_global([weight], 1234 * rows + 567)
    order = row.float().argsort()
    assert not bool(kept[:, order[:1234]].any())
    assert kept[:, order[1234]].tolist() == [False] * 567 + [True] * (rows - 567)
    assert bool(kept[:, order[1235:]].all())


def test_select_global_needs_little_memory() -> None:
    weights = [torch.randn(5000, 4000, device=DEVICE) for _ in range(5)]
    ops.select_global(weights[:1], 10)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masks = ops.select_global(weights, 50_000_000)
    extra = torch.cuda.max_memory_allocated() - before - sum(mask.numel() for mask in masks)
    assert extra < 0.02 * sum(weight.nbytes for weight in weights)


# shard_counts, shard_ties and shard_masks


@pytest.mark.parametrize("seed", range(100))
def test_shards_equal_the_cpu(seed: int) -> None:
    weights, _, options = random_selection(seed)
    draw = Draw(seed)
    bits = 64 if any(weight.dtype == torch.float64 for weight in weights) else 32
    here, given = on_gpu(weights), on_gpu(options)
    # Near the key of one of the entries.
    counts = ops.shard_counts(weights, 0, bits - 11, 2048, **options)
    bins = counts[:2048].nonzero().flatten().tolist() or [0]
    low = draw.one(bins) << (bits - 11)
    for start, shift, number in [(0, bits - 11, 2048), (low, bits - 22, 2048), (low, 3, 77)]:
        expected = ops.shard_counts(weights, start, shift, number, **options)
        assert_same(ops.shard_counts(here, start, shift, number, **given), expected)
    alone = {k: v[:1] if isinstance(v, list) else v for k, v in options.items()}
    key = low
    if (weights[0].dtype == torch.float64) == (bits == 64):
        (known,) = reference.candidates(weights[:1], **alone)
        key = draw.one(list(known.values())[:50] or [low])
    edges, splits = [], []
    for weight in weights:
        own = [draw.index(weight.numel() + 1) for _ in range(1 + draw.index(9))]
        edges.append(torch.tensor(sorted(own)))
        splits.append(draw.index(weight.numel() + 1))
    expected = ops.shard_ties(weights, key, edges, **options)
    assert_same(ops.shard_ties(here, key, edges, **given), expected)
    masks = ops.shard_masks(weights, key, splits, **options)
    for found, mask in zip(ops.shard_masks(here, key, splits, **given), masks, strict=True):
        assert_same(found, mask)


def test_shards_of_many_entries_equal_the_cpu() -> None:
    weights = [torch.randn(3001, 4099).round().mul_(0.25), torch.randn(1 << 20).bfloat16()]
    here = on_gpu(weights)
    key = 0x3E800000 | 1 << 31  # that of 0.25
    for low, shift in [(0, 21), (key, 0)]:
        expected = ops.shard_counts(weights, low, shift, 2048)
        assert_same(ops.shard_counts(here, low, shift, 2048), expected)
    edges = [torch.arange(0, weight.numel(), 7919) for weight in weights]
    assert_same(ops.shard_ties(here, key, edges), ops.shard_ties(weights, key, edges))
    splits = [5_000_001, 77]
    masks = ops.shard_masks(weights, key, splits)
    for found, mask in zip(ops.shard_masks(here, key, splits), masks, strict=True):
        assert_same(found, mask)


def test_nan_of_a_shard_is_found() -> None:
    weights = [torch.ones(9), torch.empty(0), torch.ones(20_000), torch.ones(5)]
    weights[2][19_999] = weights[3][0] = NAN
    assert int(ops.shard_counts(on_gpu(weights), 0, 21, 2048)[-1]) == 3
    assert int(ops.shard_counts(on_gpu(weights[:2]), 0, 21, 2048)[-1]) == 0


# select_rows

COLUMNS = [1, 2, 4, 5, 31, 32, 33, 63, 100, 512, 513, 768, 4097, 8192, 8193, 70_001, (1 << 20) + 3]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_select_rows_equals_the_cpu(columns: int, dtype: torch.dtype) -> None:
    for seed in range(6):
        draw = Draw(seed)
        rows = 1 + draw.index(max(2, 200_000 // columns))
        scores = draw.tensor((rows, columns), dtype)
        mask = draw.mask((rows, columns)) if seed % 2 else None
        alive = torch.full((rows,), columns) if mask is None else mask.sum(dim=1)
        counts = (alive * draw.uniform(rows)).round().long()
        counts[0] = draw.one([0, int(alive[0])])
        given = {"counts": laid_out(counts, draw.one(["contiguous", "strided"])), "mask": mask}
        expected = ops.select_rows(scores, **given)
        assert_same(ops.select_rows(on_gpu(scores), **on_gpu(given)), expected)
        if rows * columns < 20_000:
            assert torch.equal(expected, reference.select_rows(scores, counts, mask=mask))


def test_two_of_every_four() -> None:
    groups = torch.randn(1_000_003, 4)
    counts = torch.full((groups.size(0),), 2)
    expected = ops.select_rows(groups, counts)
    assert_same(ops.select_rows(groups.to(DEVICE), counts.to(DEVICE)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [16, 700, 1 << 15])
def test_select_rows_of_more_than_two_to_the_31_entries(columns: int) -> None:
    needs_memory(12 * GIB)
    rows = (1 << 31) // columns + 7
    scores = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE).normal_()
    counts = torch.arange(rows, device=DEVICE) % (columns + 1)
    kept = ops.select_rows(scores, counts)
    step = max(1, (1 << 28) // columns)
    for begin in range(0, rows, step):
        own = kept[begin : begin + step].sum(dim=1)
        assert torch.equal(own, columns - counts[begin : begin + step])
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    expected = ops.select_rows(scores[some].cpu(), counts[some].cpu())
    assert torch.equal(kept[some].cpu(), expected)


# cosine_gains

UNITS = [1, 7, 32, 33, 512, 513, 768, 1024, 1025, 2048, 2049, 3072, 4096, 4097, 11_008, 70_001]


def check_cosine_gains(size: int, dtype: torch.dtype, with_reference: bool, entries: int) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for seed in range(6):
        draw = Draw(seed)
        rows = 1 + draw.index(max(2, entries // size))
        weight = draw.tensor((rows, size), dtype)
        options: dict[str, Any] = {
            "mask": draw.mask((rows, size)) if seed % 2 else None,
            "column_scale": draw.scale(size, wide) if seed % 3 == 2 else None,
        }
        if with_reference:
            other = draw.tensor((rows, size), draw.one(DTYPES))
            near = (weight.double() + 0.3 * draw.normal(rows, size)).to(dtype)
            options["reference"] = draw.one([other, near, weight])
        expected = ops.cosine_gains(weight, **options)
        assert_same(ops.cosine_gains(on_gpu(weight), **on_gpu(options)), expected)


@pytest.mark.parametrize("size", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_reference", [False, True])
def test_cosine_gains_equal_the_cpu(size: int, dtype: torch.dtype, with_reference: bool) -> None:
    check_cosine_gains(size, dtype, with_reference, entries=40_000)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 0), (7, 5, 3, 3), (2, 3, 2, 5, 2)])
def test_cosine_gains_of_any_shape(shape: tuple[int, ...], layout: str) -> None:
    weight = laid_out(torch.randn(shape), layout)
    r = laid_out(torch.randn(shape), layout)
    mask = laid_out(torch.rand(shape) < 0.7, layout)
    scale = torch.rand(rows_and_columns(weight)[1])
    for options in ({}, {"mask": mask}, {"reference": r}, {"reference": r, "column_scale": scale}):
        expected = ops.cosine_gains(weight, **options)
        assert_same(ops.cosine_gains(on_gpu(weight), **on_gpu(options)), expected)
        plain = reference.cosine_gains(weight, **options)
        torch.testing.assert_close(expected, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [768, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosine_gains_of_many_units_equal_the_cpu(size: int, dtype: torch.dtype) -> None:
    weight = torch.randn((1 << 24) // size + 1500, size).to(dtype)  # more than is sorted at a time
    expected = ops.cosine_gains(weight)
    assert_same(ops.cosine_gains(weight.to(DEVICE)), expected)


def test_cosine_gains_of_a_zero_unit_are_zero() -> None:
    weight = torch.randn(40, 100)
    weight[::3] = 0
    expected = ops.cosine_gains(weight)
    found = ops.cosine_gains(weight.to(DEVICE))
    assert_same(found, expected)
    assert not bool(found[::3].any())
    # A reference that is zero, of weights that are not.
    assert not bool(ops.cosine_gains(weight.to(DEVICE) + 1, reference=weight.to(DEVICE))[::3].any())


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_cosine_gains_do_not_overflow_in_float64(scale: float) -> None:
    weight = torch.randn(20, 300, dtype=torch.float64) * scale
    assert_same(ops.cosine_gains(weight.to(DEVICE)), ops.cosine_gains(weight))
    r = weight.flip(0)
    expected = ops.cosine_gains(weight, reference=r)
    assert_same(ops.cosine_gains(weight.to(DEVICE), reference=r.to(DEVICE)), expected)


# square_sums


@pytest.mark.parametrize("seed", range(60))
def test_square_sums_equal_the_cpu(seed: int) -> None:
    draw = Draw(seed)
    weight = draw.tensor(draw.one([draw.shape(), (700, 900), (3, 100_001)]), draw.one(DTYPES))
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows, columns = rows_and_columns(weight)
    options = {
        "row_scale": draw.one([None, draw.scale(rows, wide)]),
        "column_scale": draw.one([None, draw.scale(columns, wide)]),
    }
    if weight.dim() > 1:
        options["all_columns"] = draw.one([None, columns, 3 * columns, 100 * columns])
    expected = ops.square_sums(weight, **options)
    found = ops.square_sums(on_gpu(weight), **on_gpu(options))
    for sums, cpu in zip(found, expected, strict=True):
        assert_same(sums, cpu)


# unit_products and unit_combination


def random_units(seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    draw = Draw(seed)
    dtypes = draw.one([DTYPES, *([dtype] for dtype in DTYPES)])
    shapes = [(700, 900), (3, 50_001), (2000, 7), (40, 6, 3, 3), (5000, 4), (300, 64, 2)]
    # Now and then more tensors than go into one launch.
    number = draw.one([1, 3, 5]) if seed % 10 else 70
    weights = [
        draw.tensor(draw.one([draw.shape(), *shapes]) if number < 70 else draw.shape(), dtype)
        for dtype in (draw.one(dtypes) for _ in range(number))
    ]
    dims = [draw.index(2) if weight.dim() > 1 else 0 for weight in weights]

    def some(make: Callable[[Tensor, int], Tensor]) -> list[Tensor | None]:
        pairs_of = zip(weights, dims, strict=True)
        return [make(w, dim) if draw.share() < 0.6 else None for w, dim in pairs_of]

    def reference_of(weight: Tensor, dim: int) -> Tensor:
        near = (weight.double() + 0.3 * draw.normal(*weight.shape)).to(weight.dtype)
        return draw.one([near, draw.tensor(tuple(weight.shape), draw.one(DTYPES))])

    def index_of(weight: Tensor, dim: int) -> Tensor:
        units = weight.size(dim) if weight.dim() > 1 else 1
        index = torch.randperm(units, generator=draw.generator)
        return laid_out(index, draw.one(["contiguous", "strided"]))

    return weights, {
        "masks": some(lambda weight, dim: draw.mask(tuple(weight.shape))),
        "references": some(reference_of),
        "indices": some(index_of) if draw.share() < 0.5 else None,
        "dims": dims,
    }


def assert_same_products(
    found: Tensor, expected: Tensor, weights: list[Tensor], options: dict[str, Any]
) -> None:
    """The sums may be in another order: they differ by no more than the rounding of float64."""
    assert found.device.type == torch.device(DEVICE).type
    assert found.dtype == expected.dtype
    references = [None if r is None else r.abs() for r in options["references"]]
    sizes = ops.unit_products([w.abs() for w in weights], **{**options, "references": references})
    assert bool(((found.cpu() - expected).abs() <= 1e-12 * sizes).all())


@pytest.mark.parametrize("seed", range(120))
def test_unit_products_equal_the_cpu(seed: int) -> None:
    weights, options = random_units(seed)
    expected = ops.unit_products(weights, **options)
    moved, with_them = on_gpu(weights), on_gpu(options)
    found = ops.unit_products(moved, **with_them)
    assert_same_products(found, expected, weights, options)
    assert torch.equal(ops.unit_products(moved, **with_them), found)


@pytest.mark.parametrize("seed", range(120))
def test_unit_combination_equals_the_cpu(seed: int) -> None:
    weights, options = random_units(seed)
    units = ops.unit_products(weights, **options).size(1)
    coefficients = Draw(seed).normal(units, 2).double().t()
    expected = ops.unit_combination(weights, coefficients, **options)
    found = ops.unit_combination(on_gpu(weights), on_gpu(coefficients), **on_gpu(options))
    for tensor, cpu in zip(found, expected, strict=True):
        assert_same(tensor, cpu)


@pytest.mark.parametrize("seed", range(1, 9))
def test_the_sums_of_a_unit_do_not_depend_on_the_other_tensors(seed: int) -> None:
    weights, options = random_units(seed)
    weights, options = on_gpu(weights), on_gpu(options)
    together = ops.unit_products(weights, **options)
    each = [
        ops.unit_products(
            [weight], **{name: None if all is None else [all[i]] for name, all in options.items()}
        )
        for i, weight in enumerate(weights)
    ]
    assert torch.equal(torch.cat(each, dim=1), together)


@pytest.mark.parametrize("shape", [(SAMPLED,), (1, SAMPLED), (SAMPLED, 1), (3_000_001, 4)])
@pytest.mark.parametrize("dim", [0, 1])
def test_long_units_equal_the_cpu(shape: tuple[int, ...], dim: int) -> None:
    dim = dim if len(shape) > 1 else 0
    weight, r = torch.randn(shape), torch.randn(shape)
    options = {"masks": [r > -1], "references": [r], "dims": [dim]}
    expected = ops.unit_products([weight], **options)  # type: ignore[arg-type]
    found = ops.unit_products(on_gpu([weight]), **on_gpu(options))
    assert_same_products(found, expected, [weight], options)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("seed", range(10, 20))
def test_references_may_stay_on_the_cpu(seed: int, pinned: bool) -> None:
    weights, options = random_units(seed)
    moved, with_them = on_gpu(weights), on_gpu(options)
    references = options["references"]
    if pinned:
        # torch cannot pin a tensor whose entries share memory.
        references = [
            None if r is None else (r.contiguous() if 0 in r.stride() else r).pin_memory()
            for r in references
        ]
    at_home = {**with_them, "references": references}
    # Their copies on the device are aligned, which those that are there already need not be.
    expected = ops.unit_products(moved, **with_them).cpu()
    assert_same_products(ops.unit_products(moved, **at_home), expected, weights, options)
    coefficients = torch.randn(2, expected.size(1), dtype=torch.float64, device=DEVICE)
    combined = ops.unit_combination(moved, coefficients, **at_home)
    others = ops.unit_combination(moved, coefficients, **with_them)
    for found, other in zip(combined, others, strict=True):
        assert torch.equal(found, other)


def test_few_references_from_the_cpu_are_on_the_device_at_a_time() -> None:
    weights = [torch.randn(1000, 1000, device=DEVICE) for _ in range(12)]
    references = [torch.randn(1000, 1000).pin_memory() for _ in weights]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.unit_products(weights, references=references)
    assert torch.cuda.max_memory_allocated() - before < 2.5 * references[0].nbytes


def test_units_are_looked_at_without_waiting_for_the_device() -> None:
    weights = [torch.randn(60, 70, device=DEVICE), torch.randn(9000, device=DEVICE)]
    masks = [weights[0] > 0, None]
    references = [torch.randn(60, 70, device=DEVICE), torch.randn(9000).pin_memory()]
    coefficients = torch.ones(2, 61, dtype=torch.float64, device=DEVICE)
    ops.unit_products(weights, masks=masks, references=references)  # what is loaded once
    ops.unit_combination(weights, coefficients, masks=masks, references=references)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        ops.unit_products(weights, masks=masks, references=references)
        ops.unit_combination(weights, coefficients, masks=masks, references=references)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_units_in_a_cuda_graph() -> None:
    weights = [torch.randn(60, 70, device=DEVICE), torch.randn(50_000, device=DEVICE)]
    references = [torch.randn_like(weight) for weight in weights]
    ops.unit_products(weights, references=references)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.unit_products(weights, references=references)
    for weight in weights:
        weight.mul_(3)
    graph.replay()
    assert torch.equal(found, ops.unit_products(weights, references=references))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        (((1 << 31) + 12_345,), 0),
        ((4, (1 << 29) + 99), 0),
        (((1 << 29) + 99, 4), 1),
        ((65_600, 32_768), 0),
        ((65_600, 32_768), 1),
        ((65_537, 32_771), 0),
        ((65_537, 32_771), 1),
    ],
)
def test_units_of_more_than_two_to_the_31_entries(shape: tuple[int, ...], dim: int) -> None:
    needs_memory(12 * GIB)
    weight = torch.ones(shape, dtype=torch.bfloat16, device=DEVICE)
    weight.view(-1)[-1] = 3
    units = shape[dim] if len(shape) > 1 else 1
    each = weight.numel() // units
    products = ops.unit_products([weight], dims=[dim])
    expected = torch.full((3, units), each, dtype=torch.float64, device=DEVICE)
    expected[:, -1] += 8
    assert torch.equal(products, expected)
    coefficients = torch.ones(2, units, dtype=torch.float64, device=DEVICE)
    coefficients[:, -1] = 4
    (found,) = ops.unit_combination([weight], coefficients, dims=[dim])
    assert float(found.view(-1)[-1]) == 24
    total = 2 * (units - 1) * each + 8 * (each - 1) + 24
    # In parts, because torch copies a half to sum it in float64.
    parts = found.view(-1).split(1 << 28)
    assert sum(float(part.sum(dtype=torch.float64)) for part in parts) == total


@pytest.mark.parametrize("wrong", [-1, 20, 1 << 62])
@pytest.mark.parametrize("place", [0, 7, 19])
def test_indices_out_of_range_are_errors_like_those_of_the_cpu(wrong: int, place: int) -> None:
    weights = [torch.randn(5, 3), torch.randn(20, 30), torch.randn(20, 4)]
    index = torch.randperm(20)
    index[place] = wrong
    options: dict[str, Any] = {
        "indices": [None, index, torch.randperm(20)],
        "names": ["a", "b", "c"],
    }
    message = outcome(lambda: ops.unit_products(weights, **options))
    assert message.startswith("ValueError: the index of b should be in [0, 20), got ")
    moved, with_them = on_gpu(weights), on_gpu(options)
    assert outcome(lambda: ops.unit_products(moved, **with_them)) == message
    coefficients = torch.ones(2, 45, dtype=torch.float64, device=DEVICE)
    assert outcome(lambda: ops.unit_combination(moved, coefficients, **with_them)) == message
    torch.cuda.synchronize()  # nothing was read out of range


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("at_home", [False, True])
def test_gradients_of_units(dim: int, at_home: bool) -> None:
    def double(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=grad)

    w, v, r = double(3, 4, 2), double(5), double(3, 4, 2, grad=False)
    options: dict[str, Any] = {
        "masks": [torch.rand(3, 4, 2, device=DEVICE) > 0.3, None],
        "references": [r.cpu() if at_home else r, double(5, grad=False)],
        "indices": [torch.randperm(w.size(dim), device=DEVICE), None],
        "dims": [dim, 0],
    }

    def products(w: Tensor, v: Tensor) -> Tensor:
        return ops.unit_products([w, v], **options)

    def combination(w: Tensor, v: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.unit_combination([w, v], coefficients, **options))

    coefficients = double(2, w.size(dim) + 1)
    for function, inputs in ((products, (w, v)), (combination, (w, v, coefficients))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_penalties_and_their_gradients_are_those_of_the_cpu() -> None:
    found: dict[str, list[Tensor]] = {}
    for device in ("cpu", DEVICE):
        model = network(1, torch.float32).to(device)
        layers = pairs(model)
        kept = tap.Reference.capture(layers, device="cpu")
        tap.global_unstructured(layers, tap.Magnitude, amount=0.5)
        leaves = [getattr(layer, f"{name}_orig") for layer, name in layers]
        with torch.no_grad():
            for number, leaf in enumerate(leaves):
                noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(number))
                leaf.add_(noise.to(device), alpha=0.01)
        found[device] = []
        for penalty in (
            tap.CosineAlignment(layers, kept),
            tap.CosineAlignment(layers, kept, units="both"),
            tap.FrobeniusAlignment(layers, kept),
        ):
            value = penalty()
            found[device] += [value.detach(), *torch.autograd.grad(value, leaves)]
    for own, cpu in zip(found[DEVICE], found["cpu"], strict=True):
        torch.testing.assert_close(own.cpu(), cpu, rtol=1e-5, atol=1e-9)


# zero_pruned_


@pytest.mark.parametrize("seed", range(60))
def test_zero_pruned_equals_the_cpu(seed: int) -> None:
    draw = Draw(seed)
    tensors: list[Tensor] = []
    while len(tensors) < 1 + draw.index(120):
        tensor = draw.tensor(draw.shape(), draw.one(DTYPES))
        if 0 not in tensor.stride():
            tensors.append(tensor)
    masks = [draw.mask(tuple(tensor.shape)) for tensor in tensors]
    moved = on_gpu(tensors)
    wholes = [t.untyped_storage().size() // t.element_size() for t in tensors]
    ops.zero_pruned_(tensors, masks)
    ops.zero_pruned_(moved, on_gpu(masks))
    for found, expected, whole in zip(moved, tensors, wholes, strict=True):
        assert_same(found, expected)
        assert torch.equal(found.signbit().cpu(), expected.signbit())
        around = [tensor.as_strided((whole,), (1,), 0) for tensor in (found, expected)]
        torch.testing.assert_close(around[0].cpu(), around[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("size", [1, 15, 16, 4095, 4096, 4097, 1_000_003, 50_000_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_pruned_at_any_place_in_memory(dtype: torch.dtype, size: int, offset: int) -> None:
    whole = torch.randn(size + offset + 9, device=DEVICE).to(dtype)
    mask = torch.rand(size + offset, device=DEVICE) < 0.5
    for own in (mask[offset:], mask[:size], torch.ones_like(mask)[:size]):
        expected = whole.clone()
        expected[offset : offset + size].masked_fill_(~own, 0)
        ops.zero_pruned_([whole[offset : offset + size]], [own])
        assert torch.equal(whole, expected)


@pytest.mark.slow
def test_zero_pruned_of_more_than_two_to_the_31_entries() -> None:
    needs_memory(12 * GIB)
    size = (1 << 31) + 12_345
    tensor = torch.ones(size, dtype=torch.bfloat16, device=DEVICE)
    mask = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_(4) != 0
    ops.zero_pruned_([tensor], [mask])
    for begin in range(0, size, 1 << 28):
        part = slice(begin, begin + (1 << 28))
        assert torch.equal(tensor[part] != 0, mask[part])


# apply_mask and masked_weight


@pytest.mark.parametrize("operator", [ops.apply_mask, ops.masked_weight])
@pytest.mark.parametrize("seed", range(60))
def test_apply_mask_equals_the_cpu(seed: int, operator: Callable[[Tensor, Tensor], Tensor]) -> None:
    draw = Draw(seed)
    weight = draw.tensor(draw.shape(), draw.one(DTYPES))
    mask = draw.mask(tuple(weight.shape))
    expected = ops.apply_mask(weight, mask)
    found = operator(on_gpu(weight), on_gpu(mask))
    assert_same(found, expected)
    assert torch.equal(found.signbit().cpu(), expected.signbit())


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("size", [1, 15, 16, 4095, 4096, 4097, 1_000_003, 50_000_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_mask_at_any_place_in_memory(dtype: torch.dtype, size: int, offset: int) -> None:
    weight = torch.randn(size + offset, device=DEVICE).to(dtype)[offset:]
    weight[size // 2] = NAN
    for mask in (
        torch.rand(size + 3, device=DEVICE) < 0.5,
        torch.ones(size + 3, device=DEVICE) < 0,
    ):
        for own in (mask[3:], mask[:size]):
            expected = torch.where(own, weight, 0)
            torch.testing.assert_close(
                ops.apply_mask(weight, own), expected, rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_gradient_is_masked_in_place(dtype: torch.dtype) -> None:
    weight = torch.randn(3000, 2000, device=DEVICE).to(dtype).requires_grad_()
    mask = torch.rand(3000, 2000, device=DEVICE) < 0.5
    x = torch.randn(64, 2000, device=DEVICE).to(dtype)
    (plain,) = torch.autograd.grad((x @ (weight * mask).t()).square().sum(), weight)
    value = (x @ ops.apply_mask(weight, mask).t()).square().sum()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (found,) = torch.autograd.grad(value, weight)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * weight.nbytes
    assert torch.equal(found, plain)


def test_a_model_trains_as_with_torchs_hooks() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100)).to(DEVICE)
    other = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100)).to(DEVICE)
    other.load_state_dict(ours.state_dict())
    tap.global_unstructured(pairs(ours), tap.Magnitude, amount=0.5)
    for own, twin in ((ours[0], other[0]), (ours[2], other[2])):
        prune.custom_from_mask(twin, "weight", own.weight_mask.float())
    steps = [torch.optim.AdamW(model.parameters(), 0.01) for model in (ours, other)]
    x = torch.randn(32, 300, device=DEVICE)
    for _ in range(5):
        losses = []
        for model, step in zip((ours, other), steps, strict=True):
            step.zero_grad()
            losses.append(model(x).square().mean())
            losses[-1].backward()
            step.step()
        assert torch.equal(*losses)
    for own, twin in zip(ours.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, twin)


@pytest.mark.slow
def test_apply_mask_of_more_than_two_to_the_31_entries() -> None:
    needs_memory(16 * GIB)
    size = (1 << 31) + 12_345
    weight = torch.ones(size, dtype=torch.bfloat16, device=DEVICE)
    mask = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_(4) != 0
    product = ops.apply_mask(weight, mask)
    for begin in range(0, size, 1 << 28):
        part = slice(begin, begin + (1 << 28))
        assert torch.equal(product[part] != 0, mask[part])


# What every operator has to take


@pytest.mark.parametrize("place", [0, 5000, 19_999])
def test_nan_and_infinity_are_errors_like_those_of_the_cpu(place: int) -> None:
    wrong = torch.randn(20_000)
    wrong[place] = NAN
    fine = torch.randn(30, 30)
    for count in (0, 5, 20_000):
        names = ["fine", "empty", "wrong"]
        weights = [fine, torch.empty(0), wrong]
        with pytest.raises(ValueError, match="scores of wrong should be numbers, got NaN"):
            ops.select_global(on_gpu(weights), count, names=names)
    mask = torch.arange(20_000) != place  # what is pruned may be anything
    expected = ops.select_global([wrong], 7, masks=[mask])
    assert_same(ops.select_global(on_gpu([wrong]), 7, masks=on_gpu([mask]))[0], expected[0])
    for columns in (4, 100, 1000, 20_000):
        rows = wrong.reshape(-1, columns)
        counts = torch.ones(rows.size(0), dtype=torch.long)
        calls = [lambda w, c=counts: ops.select_rows(w, c.to(w.device)), ops.cosine_gains]
        for call in calls:
            message = outcome(lambda call=call, rows=rows: call(rows))
            assert "got NaN" in message
            assert outcome(lambda call=call, rows=rows: call(rows.to(DEVICE))) == message
        infinite = rows.nan_to_num(INF)
        message = outcome(lambda rows=infinite: ops.cosine_gains(rows))
        assert outcome(lambda rows=infinite: ops.cosine_gains(rows.to(DEVICE))) == message


def test_nan_of_a_large_tensor_is_found() -> None:
    weight = torch.randn(SAMPLED, device=DEVICE)
    for place in (0, SAMPLED // 3, SAMPLED - 1):
        weight[place] = NAN
        for count in (0, 5, SAMPLED):
            with pytest.raises(ValueError, match=r"scores of weights\[0\] should be .*NaN"):
                ops.select_global([weight], count)
        weight[place] = 0


@pytest.mark.parametrize("columns", [4, 100, 1000, 9000, 1 << 20])
def test_counts_out_of_range_are_errors_like_those_of_the_cpu(columns: int) -> None:
    scores = torch.randn(3, columns)
    mask = torch.rand(3, columns) < 0.5
    for count in (columns + 1, -1, columns):
        counts = torch.tensor([1, count, 1])
        given = {"counts": counts, "mask": mask}
        message = outcome(lambda given=given: ops.select_rows(scores, **given))
        assert message.startswith("ValueError: row 1 of scores has ")
        found = outcome(lambda given=given: ops.select_rows(on_gpu(scores), **on_gpu(given)))
        assert found == message
    for count in (3 * columns, -1):
        message = outcome(lambda count=count: ops.select_global([scores], count, masks=[mask]))
        found = outcome(
            lambda count=count: ops.select_global(on_gpu([scores]), count, masks=on_gpu([mask]))
        )
        assert found == message


def test_what_is_given_does_not_change() -> None:
    w, r, mask = torch.randn(50, 90), torch.randn(50, 90), torch.rand(50, 90) < 0.7
    rows, columns = torch.rand(50), torch.rand(90)
    given = on_gpu([w, r, mask, rows, columns])
    before = [tensor.clone() for tensor in given]
    w, r, mask, rows, columns = given
    scales = {"row_scales": [rows], "column_scales": [columns]}
    ops.select_global([w], 100, score="worth", masks=[mask], references=[r], **scales)
    ops.select_rows(w, mask.sum(dim=1) // 2, mask=mask)
    ops.cosine_gains(w, mask=mask, reference=r, column_scale=columns)
    ops.square_sums(w, row_scale=rows, column_scale=columns)
    ops.apply_mask(w, mask)
    ops.masked_weight(w, mask)
    products = ops.unit_products([w], masks=[mask], references=[r])
    ops.unit_combination([w], products[:2], masks=[mask], references=[r])
    for tensor, copy in zip(given, before, strict=True):
        assert torch.equal(tensor, copy)


@contextmanager
def busy_stream() -> Iterator[None]:
    """A stream of its own, whose work comes late."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        yield
    torch.cuda.current_stream().wait_stream(stream)


def test_work_goes_to_the_current_stream() -> None:
    host = torch.randn(300, 900)
    expected_mask = ops.select_global([host], 100_000)[0]
    expected_rows = ops.select_rows(host, torch.full((300,), 450))
    expected_gains = ops.cosine_gains(host)
    expected_sums = ops.square_sums(host)
    source = host.to(DEVICE)
    counts = torch.full((300,), 450, device=DEVICE)
    host_mask = torch.rand(300, 900) < 0.5
    device_mask = host_mask.to(DEVICE)
    expected_products = ops.unit_products([host.sign()], references=[host.sign()])
    pinned = host.sign().pin_memory()
    for check in range(7):
        late = torch.full_like(source, NAN if check in (0, 1, 2) else 0)
        with busy_stream():
            late.copy_(source)
            if check == 0:
                found = [ops.select_global([late], 100_000)[0]]
                expected = [expected_mask]
            elif check == 1:
                found, expected = [ops.select_rows(late, counts)], [expected_rows]
            elif check == 2:
                found, expected = [ops.cosine_gains(late)], [expected_gains]
            elif check == 3:  # sums of whole numbers, which are the same in any order
                found = [ops.unit_products([late.sign_()], references=[pinned])]
                expected = [expected_products]
            elif check == 4:
                found, expected = list(ops.square_sums(late)), list(expected_sums)
            elif check == 5:
                found, expected = [ops.apply_mask(late, device_mask)], [host * host_mask]
            else:
                ops.zero_pruned_([late], [device_mask])
                found, expected = [late], [host * host_mask]
        torch.cuda.synchronize()
        for tensor, cpu in zip(found, expected, strict=True):
            assert_same(tensor, cpu)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_goes_to_the_device_of_the_tensors() -> None:
    host = torch.randn(300, 900)
    with torch.cuda.device(0):
        found = ops.select_global([host.to("cuda:1")], 100_000)[0]
        gains = ops.cosine_gains(host.to("cuda:1"))
    assert found.device == gains.device == torch.device("cuda:1")
    assert_same(found, ops.select_global([host], 100_000)[0])
    assert_same(gains, ops.cosine_gains(host))


def test_opcheck() -> None:
    operators = torch.ops.torchalignprune
    w = torch.randn(4, 300, device=DEVICE).t()
    mask, scale = w > -1, torch.rand(4, device=DEVICE)
    counts = torch.ones(300, dtype=torch.long, device=DEVICE)
    none = [None, None]
    lists = ([w, w.bfloat16()], [mask, None], none, none, [scale, None], ["a", "b"], 20)
    torch.library.opcheck(operators.select_global.default, (*lists, "magnitude"))
    torch.library.opcheck(operators.select_rows.default, (w, None, counts, "w"))
    shards = (*lists[:6], "magnitude", (0x3F800000 | 1 << 31))
    torch.library.opcheck(operators.shard_counts.default, (*shards, 3, 100))
    edges = [torch.tensor([0, 700, 1200]), torch.tensor([5])]
    torch.library.opcheck(operators.shard_ties.default, (*shards, edges))
    torch.library.opcheck(operators.shard_masks.default, (*shards, [7, 1200]))
    torch.library.opcheck(operators.cosine_gains.default, (w, mask, w * w, scale, "w"))
    torch.library.opcheck(operators.square_sums.default, (w, None, scale, "w"))
    leaf, vector = w.clone().requires_grad_(), torch.randn(5, device=DEVICE)
    units = ([leaf, vector], [mask, None], [w.cpu(), vector], [counts.cumsum(0) - 1, None])
    coefficients = torch.randn(2, 301, dtype=torch.float64, device=DEVICE, requires_grad=True)
    torch.library.opcheck(
        operators.zero_pruned_.default,
        ([w.clone(), vector.clone()], [mask, vector > 0], ["a", "b"]),
    )
    torch.library.opcheck(operators.apply_mask.default, (leaf, mask))
    rest = ([0, 0], ["a", "b"])
    torch.library.opcheck(operators.unit_products.default, (*units, *rest))
    torch.library.opcheck(operators.unit_combination.default, (*units, coefficients, *rest))


# The methods


def network(seed: int, dtype: torch.dtype) -> nn.ModuleList:
    """Every kind of layer, and some larger ones."""
    torch.manual_seed(seed)
    layers = [nn.Linear(300, 200), nn.Conv2d(30, 40, 3), nn.Linear(64, 1000, bias=False)]
    layers[1].to(memory_format=torch.channels_last)
    return nn.ModuleList([*mixed(), *layers]).to(dtype)


METHODS: dict[str, tuple[type[tap.PruningMethod], dict[str, Any]]] = {
    "magnitude": (tap.Magnitude, {"amount": 0.5}),
    "magnitude, each layer": (tap.Magnitude, {"amount": 0.5, "budget": "layer"}),
    "magnitude, each unit": (tap.Magnitude, {"amount": 0.5, "budget": "unit"}),
    "cosine": (tap.AlignedMagnitude, {"amount": 0.5}),
    "cosine, in": (tap.AlignedMagnitude, {"amount": 0.5, "units": "in"}),
    "cosine, both": (tap.AlignedMagnitude, {"amount": 0.5, "units": "both"}),
    "frobenius": (tap.AlignedMagnitude, {"amount": 0.5, "alignment": "frobenius"}),
    "random": (tap.Random, {"amount": 0.5}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", METHODS)
def test_methods_choose_what_they_choose_on_the_cpu(case: str, dtype: torch.dtype) -> None:
    method, options = METHODS[case]
    cpu, gpu = network(1, dtype), network(1, dtype).to(DEVICE)
    for _ in range(2):  # the second time there are masks
        for model in (cpu, gpu):
            torch.manual_seed(2)
            tap.global_unstructured(pairs(model), method, **options)
        assert_same_masks(pairs(cpu), [(layer.cpu(), name) for layer, name in pairs(gpu)])
        gpu.to(DEVICE)


@pytest.mark.parametrize(
    "options", [{}, {"units": "in"}, {"units": "both"}, {"alignment": "frobenius"}], ids=str
)
def test_references_and_input_norms_choose_what_they_choose_on_the_cpu(
    options: dict[str, Any],
) -> None:
    cpu, gpu = network(1, torch.float32), network(1, torch.float32).to(DEVICE)
    references = [layer.weight.detach() + 0.1 for layer in cpu]
    for model in (cpu, gpu):
        own = [r.to(next(model.parameters()).device) for r in references]
        tap.global_unstructured(
            pairs(model), tap.AlignedMagnitude, amount=0.6, reference=own, **options
        )
    assert_same_masks(pairs(cpu), [(layer.cpu(), name) for layer, name in pairs(gpu)])


def test_two_of_four_chooses_what_it_chooses_on_the_cpu() -> None:
    torch.manual_seed(3)
    cpu, gpu = nn.Linear(512, 300), nn.Linear(512, 300)
    gpu.load_state_dict(cpu.state_dict())
    gpu.to(DEVICE)
    for layer in (cpu, gpu):
        tap.AlignedNM.apply(layer, "weight", n=2, m=4)
    assert_same_masks([(cpu, "weight")], [(gpu.cpu(), "weight")])


def test_torchs_own_global_unstructured_chooses_what_it_chooses_on_the_cpu() -> None:
    cpu, gpu = network(1, torch.float32), network(1, torch.float32).to(DEVICE)
    for model in (cpu, gpu):
        params = [pair for pair in pairs(model) if pair[0].weight.is_contiguous()]  # torch's limit
        for _ in range(2):
            prune.global_unstructured(params, pruning_method=tap.AlignedMagnitude, amount=0.3)
        assert len(params) > 5
        model.cpu()
    params = [pair for pair in pairs(cpu) if hasattr(pair[0], "weight_mask")]
    assert_same_masks(params, [pair for pair in pairs(gpu) if hasattr(pair[0], "weight_mask")])


# greedy_match


def similarity_of(kind: str, *shape: int) -> Tensor:
    values = torch.randn(shape)
    rows, columns = shape[-2:]
    if kind == "ties":
        return values.round()
    if kind == "equal":
        return torch.zeros(shape)
    if kind == "rank-one":
        return torch.rand(*shape[:-1], 1) * torch.rand(columns)
    if kind == "permuted":
        return values + 20 * torch.eye(rows, columns)[torch.randperm(rows)]
    if kind == "forbidden-and-infinite":
        values = values.where(torch.rand(shape) < 0.99, INF)
        return values.where(torch.rand(shape) < 0.5, -INF)
    if kind == "forbidden-rows":
        return values.where(torch.rand(*shape[:-1], 1) < 0.6, -INF)
    if kind == "zero-rows":
        return values * (torch.rand(*shape[:-1], 1) < 0.7)
    return values


SIMILARITIES = [
    "normal",
    "ties",
    "equal",
    "rank-one",
    "permuted",
    "forbidden-and-infinite",
    "forbidden-rows",
    "zero-rows",
]
# On both sides of the columns that a warp takes by itself.
SHAPES = [(1, 1), (7, 3, 40), (2, 3, 33, 31), (300, 1024), (1025, 200), (2, 130, 1500), (3, 5000)]


@pytest.mark.parametrize("kind", SIMILARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_match_equals_the_cpu_and_the_plain_form(kind: str, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        draw = Draw(seed)
        torch.manual_seed(seed)
        similarity = laid_out(similarity_of(kind, *shape).to(dtype), draw.one(LAYOUTS))
        found = ops.greedy_match(on_gpu(similarity))
        assert_same(found, ops.greedy_match(similarity))
        if similarity.numel() < 20_000:
            assert torch.equal(found.cpu(), reference.greedy_match(similarity))


@pytest.mark.parametrize("kind", SIMILARITIES)
@pytest.mark.parametrize("shape", [(3072, 3072), (12, 768, 768), (2000, 12, 12), (200_000, 50)])
def test_greedy_match_of_many_units_equals_the_cpu_each_time(
    kind: str, shape: tuple[int, ...]
) -> None:
    similarity = similarity_of(kind, *shape)
    expected = ops.greedy_match(similarity)
    moved = similarity.to(DEVICE)
    for _ in range(5):  # the threads meet in another order each time
        assert_same(ops.greedy_match(moved), expected)


@pytest.mark.slow
def test_greedy_match_of_more_than_two_to_the_31_entries() -> None:
    needs_memory(12 * GIB)
    rows, columns = 46_400, 46_400
    assert rows * columns > 1 << 31
    similarity = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    order = torch.randperm(columns, device=DEVICE)
    similarity[torch.arange(rows, device=DEVICE), order] = 1
    assert torch.equal(ops.greedy_match(similarity), order)


@pytest.mark.parametrize("shape", [(3, 40, 50), (40, 3000)])
def test_greedy_match_refuses_nan(shape: tuple[int, ...]) -> None:
    for sign in (1, -1):
        similarity = torch.randn(shape, device=DEVICE)
        similarity.view(-1)[-1] = sign * NAN
        with pytest.raises(ValueError, match="layer 3 should be numbers, got NaN"):
            ops.greedy_match(similarity, name="layer 3")


def test_greedy_match_works_on_the_current_stream() -> None:
    host = torch.randn(700, 1500)
    source = host.to(DEVICE)
    late = torch.full_like(source, NAN)
    with busy_stream():
        late.copy_(source)
        found = ops.greedy_match(late)
    torch.cuda.synchronize()
    assert_same(found, ops.greedy_match(host))


def test_greedy_match_opcheck() -> None:
    similarity = torch.randn(2, 30, 40, device=DEVICE).mT
    torch.library.opcheck(
        torch.ops.torchalignprune.greedy_match.default, (similarity, "similarity")
    )


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_units_in_blocks_match_as_the_whole(metric: Any, dtype: torch.dtype) -> None:
    a = torch.randn(9000, 64, device=DEVICE).to(dtype)
    b = torch.randn(8500, 64, device=DEVICE).to(dtype)
    a[::7], b[::5] = a[3].clone(), b[2].clone()  # ties, and as many near ones
    whole = tap.match_units(a, b, metric=metric)
    blocks = tap.match_units(a, b, metric=metric, block=2048)
    assert torch.equal(whole.index, blocks.index)
    assert whole.total == blocks.total
    assert torch.equal(whole.unmatched, blocks.unmatched)


@pytest.mark.slow
def test_the_embeddings_of_a_vocabulary_match_in_blocks() -> None:
    needs_memory(8 * GIB)
    generator = torch.Generator(DEVICE).manual_seed(0)
    a = torch.randn(250_002, 768, device=DEVICE, generator=generator)
    order = torch.randperm(250_002, device=DEVICE, generator=generator)
    b = torch.empty_like(a)
    b[order] = a
    b.add_(torch.randn(b.shape, device=DEVICE, generator=generator), alpha=0.3)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = tap.match_units(a, b, block=4096)
    extra = torch.cuda.max_memory_allocated() - before
    assert torch.equal(found.index, order)
    assert len(found.unmatched) == 0
    assert extra < 3 * GIB


def test_parameters_on_several_devices_keep_their_order() -> None:
    layers = [torch.nn.Linear(6, 4), torch.nn.Linear(6, 4).to(DEVICE), torch.nn.Linear(6, 4)]
    params = [(layer, "weight") for layer in layers]
    references = [torch.randn(4, 6) for _ in layers]
    penalty = tap.CosineAlignment(params, references, weights=[1, 2, 3])
    host = [torch.nn.Linear(6, 4) for _ in layers]
    for copied, layer in zip(host, layers, strict=True):
        copied.load_state_dict(layer.state_dict())
    expected = tap.CosineAlignment(
        [(layer, "weight") for layer in host], references, weights=[1, 2, 3]
    )
    torch.testing.assert_close(penalty(), expected())
    assert penalty.per_parameter() == pytest.approx(expected.per_parameter())
