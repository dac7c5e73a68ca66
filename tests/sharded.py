"""What test_sharding.py runs on several processes: cases by name, and what each process does."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import torchalignprune as tap
from models import Pair, Record, holder, pairs
from torchalignprune.parameters import PrunableParameters
from torchalignprune.placements import local_runs
from torchalignprune.targets import targets_of

Case = Callable[[], None]
CASES: dict[int, dict[str, Case]] = {2: {}, 4: {}}
Layout = tuple[DeviceMesh, Sequence[Any]] | None  # None: a plain tensor on every rank

METHODS: dict[str, tuple[type[tap.PruningMethod], dict[str, Any]]] = {
    "magnitude": (tap.Magnitude, {}),
    "cosine": (tap.AlignedMagnitude, {}),
    "cosine, in": (tap.AlignedMagnitude, {"units": "in"}),
    "cosine, both": (tap.AlignedMagnitude, {"units": "both"}),
    "frobenius": (tap.AlignedMagnitude, {"alignment": "frobenius"}),
}


def run(rank: int, world: int, folder: str) -> None:
    """One of the processes: runs all cases and writes the outcome of each."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    outcomes = {}
    for name, case in CASES[world].items():
        torch.manual_seed(0)
        try:
            case()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
        if outcomes[name]:
            break  # the others may wait for this process, until they time out
    torch.save(outcomes, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def case(*worlds: int) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        for world in worlds:
            CASES[world][function.__name__] = function
        return function

    return add


_meshes: dict[str, DeviceMesh] = {}
_group: Any = None


def mesh(kind: str) -> DeviceMesh:
    global _group
    if _group is not dist.group.WORLD:
        _meshes.clear()
        _group = dist.group.WORLD
    if kind not in _meshes:
        world = dist.get_world_size()
        if kind == "line":
            _meshes[kind] = init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
        else:
            shape = (2, world // 2)
            _meshes[kind] = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    return _meshes[kind]


def layouts() -> dict[str, Layout]:
    found: dict[str, Layout] = {
        "rows": (mesh("line"), [Shard(0)]),
        "columns": (mesh("line"), [Shard(1)]),
        "replicated": (mesh("line"), [Replicate()]),
    }
    if dist.get_world_size() == 4:
        square = mesh("square")
        found |= {
            "hybrid": (square, [Replicate(), Shard(0)]),
            "hybrid columns": (square, [Shard(1), Replicate()]),
            "both dimensions": (square, [Shard(0), Shard(1)]),
            "twice": (square, [Shard(0), Shard(0)]),
            "strided": (square, [_StridedShard(0, split_factor=2), Shard(0)]),
            "strided columns": (square, [_StridedShard(1, split_factor=2), Shard(1)]),
            "copies of a part of the mesh": (square["tp"], [Shard(0)]),
        }
    return found


def weights(values: str = "normal", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weights with uneven and empty shards, of one dimension, two and more."""
    shapes = [(7, 12), (16, 5), (9,), (4, 6, 3), (3, 10), (1, 8), (12, 1)]
    generator = torch.Generator().manual_seed(1)
    found = []
    for i, shape in enumerate(shapes):
        weight = torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + i % 3)
        found.append(((2 * weight).round() / 2 if values == "tied" else weight).to(dtype))
    return found


def fit(layout: Layout, tensor: Tensor) -> Layout:
    """The layout, with shards along dimension 0 where the tensor lacks the dimension."""
    if layout is None:
        return None

    def placed(placement: Any) -> Any:
        if placement.is_replicate() or placement.dim < tensor.dim():
            return placement
        return Shard(0)

    return layout[0], [placed(placement) for placement in layout[1]]


def spread(tensor: Tensor, layout: Layout) -> Tensor:
    fitted = fit(layout, tensor)
    if fitted is None:
        return tensor.clone()
    made: Tensor = distribute_tensor(tensor.clone(), *fitted, src_data_rank=None)
    return made


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Twins:
    """A model on one process, and the same model sharded."""

    def __init__(self, tensors: Sequence[Tensor], layout: Layout | Sequence[Layout]) -> None:
        each = layout if isinstance(layout, list) else [layout] * len(tensors)
        self.layouts = each
        self.whole = holder(*[tensor.clone() for tensor in tensors])
        own = [spread(tensor, one) for tensor, one in zip(tensors, each, strict=True)]
        self.sharded = holder(*own)

    def prune(self, method: type[tap.PruningMethod], **options: Any) -> None:
        for model in (self.whole, self.sharded):
            tap.global_unstructured(pairs(model), method, **options)

    def assert_same(self) -> None:
        for (whole, name), (module, _), layout in zip(
            pairs(self.whole), pairs(self.sharded), self.layouts, strict=True
        ):
            expected, found = (getattr(model, f"{name}_mask") for model in (whole, module))
            assert found.dtype == torch.bool
            weight = getattr(module, f"{name}_orig")
            if layout is None:
                assert not isinstance(found, DTensor)
            else:
                assert found.shape == weight.shape
                assert found.placements == weight.placements
                assert found.device_mesh == weight.device_mesh
            # torch says which entries a rank has.
            here = local(spread(expected, layout))
            assert torch.equal(local(found), here), f"{name}: {(local(found) != here).sum()} differ"
            shown = local(getattr(module, name))
            assert torch.equal(shown, local(spread(getattr(whole, name).detach(), layout)))


def named(model: nn.Module, tensors: Sequence[Tensor]) -> dict[Pair, Tensor]:
    return dict(zip(pairs(model), tensors, strict=True))


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that this process hands to torch.distributed."""
    sent = [0]
    known = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single")}

    def wrap(name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            sent[0] += args[0 if name == "all_reduce" else 1].nbytes
            return known[name](*args, **kwargs)

        return wrapped

    for name in known:
        setattr(dist, name, wrap(name))
    try:
        yield sent
    finally:
        for name, function in known.items():
            setattr(dist, name, function)


def error_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def assert_error(model: nn.Module, run: Callable[[], Any], *parts: str) -> None:
    """The same error on all ranks, and nothing changed on any."""
    record = Record(model)
    own = error_of(run)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    assert found == [own] * len(found), found
    for part in parts:
        assert part in own, own
    record.assert_untouched()


# The same masks


def add_layout_cases() -> None:
    def make(name: str) -> Case:
        def function() -> None:
            for method, options in METHODS.values():
                for values, amounts in (("tied", (0.3, 11)), ("normal", (0.4,))):
                    twins = Twins(weights(values), layouts()[name])
                    for amount in amounts:
                        twins.prune(method, amount=amount, **options)
                        twins.assert_same()

        return function

    few = ["rows", "columns", "replicated"]
    for world, names in ((2, few), (4, [*few[:2], *FOUR])):
        CASES[world] |= {name: make(name) for name in names}


FOUR = (
    "hybrid",
    "hybrid columns",
    "both dimensions",
    "twice",
    "strided",
    "strided columns",
    "copies of a part of the mesh",
)
add_layout_cases()


@case(2)
def dtypes() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for values in ("normal", "tied"):
            for method, options in METHODS.values():
                twins = Twins(weights(values, dtype), layouts()["rows"])
                twins.prune(method, amount=0.6, **options)
                twins.assert_same()
    each = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    mixed = [weight.to(each[i % 4]) for i, weight in enumerate(weights())]
    for method, options in METHODS.values():
        twins = Twins(mixed, layouts()["columns"])
        twins.prune(method, amount=0.6, **options)
        twins.assert_same()


@case(2)
def all_equal_and_all_zero() -> None:
    for value in (0.0, -0.0, 1.5):
        tensors = [torch.full_like(weight, value) for weight in weights()]
        for method, options in METHODS.values():
            for amount in (0.0, 1, 0.37, 1.0):
                twins = Twins(tensors, layouts()["rows"])
                twins.prune(method, amount=amount, **options)
                twins.assert_same()


@case(2, 4)
def several_layouts_and_plain_tensors() -> None:
    known = list(layouts().values())
    for start in (0, 3, 6)[: len(known) // 3]:
        for method, options in METHODS.values():
            tensors = weights("tied")
            own = [[*known, None][(start + i) % (len(known) + 1)] for i in range(len(tensors))]
            twins = Twins(tensors, own)
            twins.prune(method, amount=0.45, **options)
            twins.assert_same()


@case(2, 4)
def budgets() -> None:
    for name in ("rows", "columns") if world() == 2 else ("both dimensions",):
        for budget in ("layer", "unit"):
            for method, options in METHODS.values():
                twins = Twins(weights("tied")[2:], layouts()[name])
                for amount in (0.4, 0.3) if world() == 2 else (0.4,):
                    twins.prune(method, amount=amount, budget=budget, **options)
                    twins.assert_same()


def world() -> int:
    return dist.get_world_size()


@case(2, 4)
def references_and_input_norms() -> None:
    tensors = weights()
    others = [weight + 0.3 * torch.randn_like(weight) for weight in tensors]
    norms = [torch.rand(w.size(1)) if w.dim() > 1 else torch.rand(1) for w in tensors]
    for name in ("rows", "columns", *(("both dimensions", "hybrid") if world() == 4 else ())):
        for options in ({}, {"units": "in"}, {"units": "both"}, {"alignment": "frobenius"}):
            for plain in (True, False):
                layout = layouts()[name]
                twins = Twins(tensors, layout)
                own = others if plain else [spread(r, layout) for r in others]
                for model, reference in ((twins.whole, others), (twins.sharded, own)):
                    tap.global_unstructured(
                        pairs(model),
                        tap.AlignedMagnitude,
                        amount=0.5,
                        reference=named(model, reference),
                        input_norms=named(model, norms) if plain else None,
                        **options,
                    )
                twins.assert_same()


@case(2)
def importance_scores() -> None:
    tensors = weights()
    scores = [torch.randn_like(weight).round() for weight in tensors]
    scores[3] = scores[3].double()
    for name in ("rows", "columns"):
        layout = layouts()[name]
        for budget in ("global", "unit"):
            for plain in (True, False):
                twins = Twins(tensors, layout)
                own = scores if plain else [spread(score, layout) for score in scores]
                for model, given in ((twins.whole, scores), (twins.sharded, own)):
                    some = dict(list(named(model, given).items())[:4])
                    tap.global_unstructured(
                        pairs(model), tap.Magnitude, some, amount=0.5, budget=budget
                    )
                twins.assert_same()


@case(2)
def magnitude_criterion() -> None:
    twins = Twins(weights("tied"), layouts()["columns"])
    for model in (twins.whole, twins.sharded):
        for _ in range(2):
            scores = tap.criteria.magnitude(pairs(model))
            tap.global_unstructured(pairs(model), tap.Magnitude, scores, amount=0.4)
    twins.assert_same()


@case(2)
def pruned_before_it_was_sharded() -> None:
    twins = Twins(weights(), layouts()["rows"])
    plain = holder(*[weight.clone() for weight in weights()])
    for model in (twins.whole, plain):
        tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.4)
    for module, name in pairs(plain):
        whole = module._parameters[f"{name}_orig"]
        assert whole is not None
        module._parameters[f"{name}_orig"] = nn.Parameter(spread(whole.detach(), twins.layouts[0]))
    twins.sharded = plain
    twins.prune(tap.AlignedMagnitude, amount=0.5)
    twins.assert_same()


@case(2, 4)
def two_of_four() -> None:
    tensors = [torch.randn(6, 16), torch.randn(5, 8), torch.randn(4, 12, 3)]
    others = [weight + torch.randn_like(weight) for weight in tensors]
    norms = [torch.rand(weight.size(1)) for weight in tensors]
    for name in ("rows", "columns", *(("both dimensions",) if world() == 4 else ())):
        for reference in (None, others):
            twins = Twins(tensors, layouts()[name])
            twins.prune(tap.AlignedNM, n=2, m=4, reference=reference, input_norms=norms)
            twins.assert_same()
            twins.prune(tap.AlignedNM, n=1, m=4, reference=reference)
            twins.assert_same()


@case(4)
def outputs_along_the_second_dimension() -> None:
    from transformers.pytorch_utils import Conv1D

    for name in ("rows", "columns", "both dimensions"):
        layout = layouts()[name]
        for options in ({}, {"units": "in"}, {"units": "both"}, {"budget": "unit"}):
            models = []
            for sharded in (False, True):
                torch.manual_seed(3)
                model = nn.ModuleList([Conv1D(10, 6), nn.ConvTranspose2d(4, 6, 3)])
                for layer in model if sharded else ():
                    layer.weight = nn.Parameter(spread(layer.weight.detach(), layout))
                given = pairs(model)
                norms = [torch.arange(1.0, 7.0), torch.arange(1.0, 5.0)]
                tap.global_unstructured(
                    given, tap.AlignedMagnitude, amount=0.5, input_norms=norms, **options
                )
                models.append(given)
            for (whole, _), (module, _) in zip(*models, strict=True):
                expected = local(spread(whole.weight_mask, layout))
                assert torch.equal(local(module.weight_mask), expected)


@case(4)
def a_kernel_that_is_cut() -> None:
    tensors = [torch.randn(3, 4, 5).round(), torch.randn(2, 2, 7, 3).round()]
    square = mesh("square")
    for layout in ((mesh("line"), [Shard(2)]), (square, [Shard(2), Shard(1)])):
        for method, options in METHODS.values():
            twins = Twins(tensors, layout)
            twins.prune(method, amount=0.5, **options)
            twins.assert_same()


@case(4)
def as_fully_shard_and_tensor_parallelism_place_them() -> None:
    line, square = mesh("line"), mesh("square")
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    for kind in ("fsdp", "hybrid", "with tensor parallelism"):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            layers = [nn.Linear(10, 14), nn.Linear(14, 7), nn.Linear(7, 9)]
            models.append(nn.Sequential(*layers))
        whole, model = models
        if kind == "with tensor parallelism":
            parallelize_module(model, square["tp"], plan)
        fully_shard(model, mesh={"fsdp": line, "hybrid": square}.get(kind, square["dp"]))
        for method, options in METHODS.values():
            expected, found = (
                method(0.5, **options).masks(targets_of([(layer, "weight") for layer in layers]))
                for layers in (whole, model)
            )
            for mask, own, layer in zip(expected, found, model, strict=True):
                weight = layer.weight
                assert own.placements == weight.placements
                there = distribute_tensor(
                    mask, weight.device_mesh, weight.placements, src_data_rank=None
                )
                assert torch.equal(local(own), local(there)), (kind, weight.placements)


@case(4)
def not_all_processes_have_a_shard() -> None:
    first, second = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [3, 2])
    overlapping = DeviceMesh("cpu", [1, 2])
    tensors = weights("tied")
    for method, options in METHODS.values():
        twins = Twins(
            tensors,
            [
                (first, [Shard(0)]),
                (second, [Shard(0)]),
                None,
                None,
                (second, [Shard(1)]),
                (first, [Replicate()]),
                None,
            ],
        )
        twins.prune(method, amount=0.5, **options)
        twins.assert_same()
    # A part of the processes prunes its parameters by itself, each part at its own time.
    names = ("stage", "copies", "shards")
    stage = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=names)["copies", "shards"]
    twins = Twins(tensors[dist.get_rank() // 2 :], (stage, [Replicate(), Shard(1)]))
    twins.prune(tap.AlignedMagnitude, amount=0.5)
    twins.assert_same()
    if dist.get_rank() < 2:
        alone = Twins(tensors[:1], (first, [Shard(0)]))
        alone.prune(tap.AlignedMagnitude, amount=0.5)
        alone.assert_same()
    apart = Twins(tensors[:2], [(first, [Shard(0)]), (overlapping, [Shard(1)])])
    assert_error(
        apart.sharded,
        lambda: tap.global_unstructured(pairs(apart.sharded), tap.Magnitude, amount=0.5),
        "ValueError: the ranks [0, 1, 2] of the parameters should be all ranks of one mesh",
    )


@case(2)
def what_remains_is_counted_on_all_ranks() -> None:
    for layout in (layouts()["rows"], layouts()["columns"], layouts()["replicated"]):
        twins = Twins(weights(), layout)
        for _ in range(2):
            whole, found = (
                [target.remaining() for target in targets_of(pairs(model))]
                for model in (twins.whole, twins.sharded)
            )
            assert found == whole
            twins.prune(tap.Magnitude, amount=0.5)


@case(2)
def tied_weights() -> None:
    twins = Twins(weights("tied"), layouts()["columns"])
    for model in (twins.whole, twins.sharded):
        model.again = nn.Module()
        model.again.weight0 = model.weight0
        params = [*pairs(model)[:7], (model.again, "weight0")]
        tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
        assert model.again.weight0_orig is model.weight0_orig
        assert model.again.weight0_mask is model.weight0_mask
    twins.assert_same()


@case(2, 4)
def chance() -> None:
    """Random weights, layouts, methods and amounts; every rank draws the same."""
    generator = torch.Generator().manual_seed(world())

    def index(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    methods, known = list(METHODS.values()), [*layouts().values(), None]
    for _ in range(12):
        tensors = []
        for _ in range(1 + index(4)):
            shape = [1 + index(13) for _ in range(1 + index(3))]
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            if index(2):
                weight = weight.round()
            tensors.append(weight.to([torch.float32, torch.bfloat16, torch.float64][index(3)]))
        own = [known[index(len(known))] for _ in tensors]
        if all(layout is None for layout in own):
            continue
        method, options = methods[index(len(methods))]
        twins = Twins(tensors, own)
        for _ in range(2):
            amount = float(torch.rand((), generator=generator))
            twins.prune(method, amount=amount, budget=["global", "layer"][index(2)], **options)
            twins.assert_same()


@case(2, 4)
def where_entries_lie() -> None:
    line = mesh("line")
    meshes = [(line, 1), *([(mesh("square"), 2)] if world() == 4 else [])]
    choices = [Replicate(), Shard(0), Shard(1)]
    for shape in ((8, 8), (7, 5), (1, 3), (13, 2), (0, 4)):
        positions = torch.arange(shape[0] * shape[1]).reshape(shape)
        for own, dims in meshes:
            placed: list[tuple[Any, ...]] = [(choice,) for choice in choices]
            if dims == 2:
                placed = [(a, b) for a in choices for b in choices]
                placed += [(_StridedShard(dim, split_factor=2), Shard(dim)) for dim in (0, 1)]
            for placements in placed:
                there = spread(positions, (own, placements))
                coordinate = own.get_coordinate()
                assert coordinate is not None
                runs = local_runs(shape, own.shape, coordinate, placements)
                index = [
                    torch.tensor([i for first, n in dim for i in range(first, first + n)]).long()
                    for dim in runs
                ]
                found = positions[index[0]][:, index[1]]
                assert torch.equal(found, local(there)), (shape, placements)


# Traffic


@case(2)
def few_bytes_are_sent() -> None:
    sizes = [(300, 40)], [(900, 300), (500, 200)]
    for method in (tap.Magnitude, tap.AlignedMagnitude):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for values in ("normal", "tied"):
                for shapes in sizes:
                    tensors = [torch.randn(shape) for shape in shapes]
                    if values == "tied":
                        tensors = [weight.round() for weight in tensors]
                    twins = Twins([t.to(dtype) for t in tensors], layouts()["rows"])
                    with counted() as sent:
                        twins.prune(method, amount=0.5)
                    twins.assert_same()
                    assert 0 < sent[0] < 8 * 1024, sent


@case(2)
def bytes_where_units_are_cut() -> None:
    tensors = [torch.randn(200, 300)]
    twins = Twins(tensors, layouts()["columns"])
    with counted() as sent:
        twins.prune(tap.AlignedMagnitude, amount=0.5)
    # The weights of a shard once, the gains once, and the histograms.
    assert sent[0] < 2 * tensors[0].nbytes / 2 + 8 * 1024, sent
    twins.assert_same()


# Errors


@case(2, 4)
def nan_on_one_rank() -> None:
    for method, what in ((tap.Magnitude, "numbers"), (tap.AlignedMagnitude, "finite numbers")):
        for name in ("rows", "columns"):
            twins = Twins(weights(), layouts()[name])
            if dist.get_rank() == world() - 2:
                local(twins.sharded.weight1.data)[0, 0] = float("nan")
            assert_error(
                twins.sharded,
                lambda m=method, t=twins: tap.global_unstructured(pairs(t.sharded), m, amount=0.5),
                f"ValueError: the scores of parameters[1] (Module.weight1) should be {what}, got",
            )
            # The next call works as if nothing had happened.
            fresh = Twins(weights(), layouts()[name])
            fresh.prune(method, amount=0.5)
            fresh.assert_same()


@case(2, 4)
def nan_in_one_copy() -> None:
    for layout in (layouts()["replicated"], None):
        twins = Twins(weights(), [layouts()["rows"], layout, *[layouts()["rows"]] * 5])
        if dist.get_rank() == 1:
            local(twins.sharded.weight1.data)[0, 0] = float("nan")
        assert_error(
            twins.sharded,
            lambda t=twins: tap.global_unstructured(pairs(t.sharded), tap.Magnitude, amount=0.5),
            "ValueError: the scores of parameters[1] (Module.weight1) should be numbers, got NaN",
        )


@case(2, 4)
def copies_that_differ() -> None:
    known = [None, layouts()["replicated"]]
    if world() == 4:
        known += [layouts()["hybrid"], layouts()["copies of a part of the mesh"]]
    for layout in known:
        twins = Twins(weights(), [layouts()["rows"], layout, *[layouts()["rows"]] * 5])
        if dist.get_rank() == world() - 1:
            local(twins.sharded.weight1.data)[0, 0] += 1
        assert_error(
            twins.sharded,
            lambda t=twins: tap.global_unstructured(pairs(t.sharded), tap.Magnitude, amount=0.5),
            "ValueError: parameters[1] (Module.weight1) should be the same on all ranks",
            "should be a DTensor",
        )


@case(2)
def amounts_that_are_too_large() -> None:
    for budget, where in (("global", "the 7 parameters"), ("layer", "(Module.weight2)")):
        twins = Twins(weights(), layouts()["rows"])
        amount = sum(weight.numel() for weight in weights()) + 1 if budget == "global" else 10
        params = pairs(twins.sharded)[2 if budget == "layer" else 0 :]
        run = partial(
            tap.global_unstructured,
            PrunableParameters(params, [f"(Module.{name})" for _, name in params], {}),
            tap.Magnitude,
            amount=amount,
            budget=budget,
        )
        message = f"ValueError: amount={amount} should not be larger than the number of entries of "
        assert_error(twins.sharded, run, message + where)


@case(2, 4)
def what_is_wrong_on_one_rank_alone() -> None:
    twins = Twins(weights(), layouts()["rows"])
    reference = [weight + 1 for weight in weights()]
    if dist.get_rank() == 1:
        reference[2] = reference[2][:3]
    assert_error(
        twins.sharded,
        lambda: tap.global_unstructured(
            pairs(twins.sharded), tap.AlignedMagnitude, amount=0.5, reference=reference
        ),
        "ValueError: the reference of parameters[2] (Module.weight2) should have shape (9,), got",
    )


@case(2)
def what_is_not_supported() -> None:
    twins = Twins(weights(), layouts()["rows"])
    params = pairs(twins.sharded)
    assert_error(
        twins.sharded,
        lambda: tap.global_unstructured(params, tap.Random, amount=0.5),
        "ValueError: Random should prune before the model is sharded, got a sharded parameter",
    )
    assert_error(
        twins.sharded,
        lambda: tap.global_unstructured(
            params, tap.AlignedMagnitude, amount=0.5, reference=weights(), matching="greedy"
        ),
        "ValueError: matching should be None for sharded parameters, got 'greedy'",
    )
    columns = [spread(weight, layouts()["columns"]) for weight in weights()]
    assert_error(
        twins.sharded,
        lambda: tap.global_unstructured(
            params, tap.AlignedMagnitude, amount=0.5, reference=columns
        ),
        "the reference of parameters[0] (Module.weight0) should be placed like the parameter",
    )
    line = mesh("line")
    partial = holder(DTensor.from_local(torch.ones(3, 3), line, [Partial()], run_check=False))
    assert_error(
        partial,
        lambda: tap.global_unstructured(pairs(partial), tap.Magnitude, amount=0.5),
        "weight0) should have Shard and Replicate placements only, got",
        "Partial",
    )
    weight = twins.sharded.weight0
    method = tap.AlignedMagnitude(0.5)
    assert "torchalignprune.global_unstructured" in error_of(
        lambda: method.compute_mask(weight, torch.ones_like(weight))
    )
