"""Whatever a pruned model goes through, it stays the same pruned model."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import torchalignprune as tap
from models import Pair, Record, Tied, assert_same_masks, kept, mask_list, mlp, pairs
from torchalignprune.hooks import MaskHook

Model = nn.Module


def inputs(model: Model) -> Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(9)
    return torch.randn(3, 12, generator=generator).to(dtype)


def ours(model: Model, amount: float = 0.4) -> Model:
    tap.global_unstructured(pairs(model), tap.AlignedMagnitude, amount=amount)
    return model


# The states


def fresh() -> Model:
    return ours(mlp())


def after_forward() -> Model:
    model = fresh()
    model(inputs(model))
    return model


def under_no_grad() -> Model:
    model = fresh()
    with torch.no_grad():
        model(inputs(model))
    return model


def under_inference_mode() -> Model:
    model = fresh()
    with torch.inference_mode():
        model(inputs(model))
    return model


def trained() -> Model:
    model = fresh()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(inputs(model)).square().sum().backward()
    optimizer.step()
    return model


def pruned_twice() -> Model:
    model = trained()
    return ours(model)


def pruned_under_no_grad() -> Model:
    with torch.no_grad():
        return fresh()


def frozen() -> Model:
    return ours(mlp().requires_grad_(False))


def tied() -> Model:
    model = ours(Tied())
    model(inputs(model)).sum().backward()
    return model


def torch_then_ours() -> Model:
    model = mlp()
    prune.global_unstructured(pairs(model), pruning_method=prune.L1Unstructured, amount=0.2)
    prune.random_unstructured(model[0], "weight", amount=0.1)
    model(inputs(model)).sum().backward()
    return ours(model)


def ours_then_torch() -> Model:
    model = fresh()
    prune.global_unstructured(pairs(model), pruning_method=prune.L1Unstructured, amount=0.2)
    return model


def ours_then_torch_after_forward() -> Model:
    model = ours_then_torch()
    model(inputs(model)).sum().backward()
    return model


def torch_only() -> Model:
    """Our method, but torch's hooks."""
    model = mlp()
    prune.global_unstructured(pairs(model), pruning_method=tap.AlignedMagnitude, amount=0.4)
    return model


def bfloat16() -> Model:
    return ours(mlp(torch.bfloat16))


def in_eval_mode() -> Model:
    return after_forward().eval()


STATES = [
    fresh,
    after_forward,
    under_no_grad,
    under_inference_mode,
    trained,
    pruned_twice,
    pruned_under_no_grad,
    frozen,
    tied,
    torch_then_ours,
    ours_then_torch,
    ours_then_torch_after_forward,
    bfloat16,
    in_eval_mode,
]
OURS = [state for state in STATES if "then_torch" not in state.__name__]


@pytest.fixture(params=STATES, ids=lambda state: state.__name__)
def model(request: pytest.FixtureRequest) -> Model:
    made = request.param()
    assert isinstance(made, nn.Module)
    return made


@pytest.fixture(params=OURS, ids=lambda state: state.__name__)
def our_model(request: pytest.FixtureRequest) -> Model:
    """One whose hooks are ours."""
    made = request.param()
    assert isinstance(made, nn.Module)
    return made


def assert_same_model(left: Model, right: Model) -> None:
    assert left.state_dict().keys() == right.state_dict().keys()
    for key, value in left.state_dict().items():
        assert torch.equal(value, right.state_dict()[key]), key
        assert value.dtype == right.state_dict()[key].dtype, key
    assert torch.equal(left(inputs(left)), right(inputs(right)))


def assert_apart(model: Model, other: Model) -> None:
    """What happens to one does not happen to the other."""
    assert not {id(t) for t in tensors(model)} & {id(t) for t in tensors(other)}
    before = model(inputs(model)).detach().clone()
    for parameter in other.parameters():
        parameter.data.zero_()
    for mask in other.buffers():
        mask.zero_()
    other(inputs(other))
    assert torch.equal(model(inputs(model)), before)
    for module, name in pairs(other):
        prune.remove(module, name)
    assert prune.is_pruned(model)
    assert torch.equal(model(inputs(model)), before)


def tensors(model: Model) -> list[Tensor]:
    shown = [getattr(module, name) for module, name in pairs(model)]
    return [*model.parameters(), *model.buffers(), *shown]


def assert_ties_are_kept(model: Model) -> None:
    if isinstance(model, Tied):
        assert model.a.weight_orig is model.b.weight_orig
        assert model.a.weight_mask is model.b.weight_mask


def assert_works_on(model: Model) -> None:
    """It trains, only where it is not pruned, prunes further and comes off."""
    before = mask_list(pairs(model))
    if next(model.parameters()).requires_grad:
        model.zero_grad()
        model(inputs(model)).square().sum().backward()
        for (module, _), mask in zip(pairs(model), before, strict=True):
            assert bool((module.weight_orig.grad[~mask] == 0).all())
            assert bool((module.weight_orig.grad[mask] != 0).any())
    left = kept(pairs(model)[:1])
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.5)
    assert kept(pairs(model)[:1]) < left
    for module, name in pairs(model):
        assert len(module._forward_pre_hooks) == 1
        prune.remove(module, name)
    model(inputs(model))
    assert not prune.is_pruned(model)


# Copies


def by_deepcopy(model: Model) -> Model:
    return copy.deepcopy(model)


def by_pickle(model: Model) -> Model:
    copied = pickle.loads(pickle.dumps(model))
    assert isinstance(copied, nn.Module)
    return copied


def by_torch_save(model: Model) -> Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


COPIES = [by_deepcopy, by_pickle, by_torch_save]


def test_what_torch_has_masked_can_be_deep_copied_once_ours_has_taken_over() -> None:
    model = torch_only()
    with pytest.raises(RuntimeError, match="deepcopy"):  # torch's own limit
        copy.deepcopy(model)
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=0)
    assert_same_model(model, copy.deepcopy(model))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_the_same_model(model: Model, copied: Callable[[Model], Model]) -> None:
    other = copied(model)
    for (module, _), (twin, _) in zip(pairs(model), pairs(other), strict=True):
        # What a module shows is as old as its last forward; a copy may bring it up to date.
        up_to_date = module.weight_orig * module.weight_mask
        assert torch.equal(twin.weight, module.weight) or torch.equal(twin.weight, up_to_date)
        assert twin.weight.dtype == module.weight.dtype
    assert_same_model(model, other)
    assert_ties_are_kept(other)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_apart_from_its_model(model: Model, copied: Callable[[Model], Model]) -> None:
    assert_apart(model, copied(model))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_works_on(model: Model, copied: Callable[[Model], Model]) -> None:
    assert_works_on(copied(model))


@pytest.mark.parametrize("copied", COPIES)
def test_copying_leaves_the_model_alone(model: Model, copied: Callable[[Model], Model]) -> None:
    record = Record(model)
    copied(model)
    record.assert_untouched()


def test_a_copy_of_a_copy(our_model: Model) -> None:
    other = copy.deepcopy(by_pickle(copy.deepcopy(our_model)))
    assert_same_model(our_model, other)
    assert_works_on(other)


def test_a_hook_belongs_to_its_own_model_and_keeps_no_other_alive(our_model: Model) -> None:
    for copied in COPIES:
        other = copied(our_model)
        for module, _ in pairs(other):
            (hook,) = module._forward_pre_hooks.values()
            assert type(hook) is MaskHook
            assert hook._module() is module


def test_one_layer_of_a_model_can_be_copied(our_model: Model) -> None:
    layer = pairs(our_model)[0][0]
    other = copy.deepcopy(layer)
    x = inputs(our_model)
    assert torch.equal(layer(x), other(x))
    other.weight_orig.data.zero_()
    other(x)
    assert not torch.equal(layer(x), other(x))


def by_grad(run: Callable[..., Tensor], values: Mapping[str, Tensor]) -> None:
    torch.func.grad(lambda v: run(v).sum())(values)


def by_jvp(run: Callable[..., Tensor], values: Mapping[str, Tensor]) -> None:
    torch.func.jvp(run, (values,), (values,))


def by_jacfwd(run: Callable[..., Tensor], values: Mapping[str, Tensor]) -> None:
    torch.func.jacfwd(run)({"2.bias": values["2.bias"]})


def by_hessian(run: Callable[..., Tensor], values: Mapping[str, Tensor]) -> None:
    torch.func.hessian(lambda v: run(v).sum())({"2.bias": values["2.bias"]})


def by_vmap(run: Callable[..., Tensor], values: Mapping[str, Tensor]) -> None:
    torch.func.vmap(run)({name: torch.stack([value, value]) for name, value in values.items()})


# torch makes use of its own deprecated function for forward-mode derivatives.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("transform", [by_grad, by_jvp, by_jacfwd, by_hessian, by_vmap])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_deep_copy_after_a_transform(
    gradient: bool, transform: Callable[[Callable[..., Tensor], Mapping[str, Tensor]], None]
) -> None:
    """The weight that is shown is what the transform has left."""
    model = fresh()
    x = inputs(model)

    def run(values: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(model, dict(values), (x,))
        return out

    with torch.set_grad_enabled(gradient):
        transform(run, {name: p.detach() for name, p in model.named_parameters()})
    copy.deepcopy(model[0]._forward_pre_hooks)
    other = copy.deepcopy(model)
    for module, _ in pairs(other):
        assert torch.equal(module.weight, module.weight_orig * module.weight_mask)
    assert_same_model(model, other)
    assert_apart(model, other)


def test_a_deep_copy_can_be_pruned_through_torch_at_once() -> None:
    """Its weight has a history of its own, that leads to its own parameter."""
    for state in (fresh, after_forward, trained):
        model = state()
        other = copy.deepcopy(model)
        ours(model)
        prune.global_unstructured(pairs(other), pruning_method=tap.AlignedMagnitude, amount=0.4)
        assert_same_masks(pairs(model), pairs(other))


# Working on


def test_it_works_on(model: Model) -> None:
    assert_works_on(model)


def test_remove_keeps_the_parameters_and_bakes_the_masks_in(model: Model) -> None:
    before = model(inputs(model)).detach().clone()
    originals = [module.weight_orig for module, _ in pairs(model)]
    masks = mask_list(pairs(model))
    for module, name in pairs(model):
        prune.remove(module, name)
    for (module, _), original, mask in zip(pairs(model), originals, masks, strict=True):
        assert module.weight is original
        assert bool((module.weight[~mask] == 0).all())
        assert len(module._forward_pre_hooks) == 0
    assert torch.equal(model(inputs(model)), before)
    if isinstance(model, Tied):
        assert model.a.weight is model.b.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_to_another_dtype_and_back(our_model: Model, dtype: torch.dtype) -> None:
    masks = mask_list(pairs(our_model))
    for target in (dtype, torch.float32):
        our_model.to(target)
        assert our_model(inputs(our_model)).dtype == target
        for (module, _), mask in zip(pairs(our_model), masks, strict=True):
            assert module.weight.dtype == target
            assert module.weight_mask.dtype == torch.bool
            assert torch.equal(module.weight_mask, mask)
    assert_works_on(our_model)


def test_to_another_device_and_back(our_model: Model, device: str) -> None:
    before = our_model(inputs(our_model)).detach().clone()
    our_model.to(device)
    assert {t.device.type for t in (*our_model.parameters(), *our_model.buffers())} == {device}
    our_model(inputs(our_model).to(device))
    our_model.cpu()
    assert torch.equal(our_model(inputs(our_model)), before)
    assert_works_on(our_model)


def test_a_module_that_moves_to_meta_and_gets_memory_back() -> None:
    model = fresh()
    state = model.state_dict()
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert_same_model(model, fresh())


def test_it_can_be_put_into_shared_memory() -> None:
    """As Hogwild training does."""
    model = fresh().share_memory()
    assert all(t.is_shared() for t in (*model.parameters(), *model.buffers()))
    assert_same_model(model, fresh())


# torch.compile and torch.export


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(our_model: Model, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(our_model, fullgraph=True, backend=backend)
    x = inputs(our_model)
    assert torch.equal(compiled(x), our_model(x))
    # It sees what changes afterwards: weights in place, and further masks.
    for module, _ in pairs(our_model):
        module.weight_orig.data.mul_(2)
    assert torch.equal(compiled(x), our_model(x))
    ours(our_model)
    assert torch.equal(compiled(x), our_model(x))
    if next(our_model.parameters()).requires_grad:
        our_model.zero_grad()
        compiled(x).square().sum().backward()
        grads = [p.grad.clone() for p in our_model.parameters()]
        our_model.zero_grad()
        our_model(x).square().sum().backward()
        for grad, parameter in zip(grads, our_model.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad)
    for module, name in pairs(our_model):
        prune.remove(module, name)
    assert torch.equal(compiled(x), our_model(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    model = fresh()
    compiled = torch.compile(model, fullgraph=True)
    x = inputs(model)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()


# That the hook puts the weight in its place is the side effect that torch warns of.
@pytest.mark.filterwarnings("ignore:.*were assigned during export.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*certain side effects happened.*:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exports(our_model: Model, strict: bool) -> None:
    x = inputs(our_model)
    expected = our_model(x)
    exported = torch.export.export(our_model, (x,), strict=strict)
    assert torch.equal(exported.module()(x), expected)
    assert {key for key in exported.state_dict if key.endswith("_mask")}
    assert torch.equal(our_model(x), expected)
    assert_works_on(our_model)


# torch.func


def test_functional_call(our_model: Model) -> None:
    x = inputs(our_model)
    doubled = {name: 2 * parameter for name, parameter in our_model.named_parameters()}
    found = torch.func.functional_call(our_model, doubled, (x,))
    for parameter in our_model.parameters():
        parameter.data.mul_(2)
    torch.testing.assert_close(found, our_model(x))


# state_dict


def state_of(model: Model) -> OrderedDict[str, Tensor]:
    return OrderedDict((key, value.clone()) for key, value in model.state_dict().items())


def like(model: Model) -> Model:
    """Another of the same architecture and dtype, dense and with other weights."""
    other = Tied() if isinstance(model, Tied) else mlp()
    other.to(next(model.parameters()).dtype)
    for parameter in other.parameters():
        parameter.data.mul_(-3)
        parameter.requires_grad_(next(model.parameters()).requires_grad)
    return other


@pytest.mark.parametrize("assign", [False, True])
def test_loads_into_a_dense_model(model: Model, assign: bool) -> None:
    other = like(model)
    kept_out = [module.weight for module, _ in pairs(other)]
    result = tap.load_state_dict(other, state_of(model), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for (module, name), weight in zip(pairs(other), kept_out, strict=True):
        assert prune.is_pruned(module)
        assert torch.equal(module.weight, module.weight_orig * module.weight_mask)
        assert module.weight_mask.dtype == torch.bool
        assert assign or getattr(module, f"{name}_orig") is weight
    assert_same_masks(pairs(model), pairs(other))
    assert torch.equal(model(inputs(model)), other(inputs(other)))
    if not assign:  # torch's assign=True gives every place a tensor of its own
        assert_ties_are_kept(other)
    assert_works_on(other)


def test_loads_into_a_model_that_is_pruned_otherwise(model: Model) -> None:
    other = like(model)
    tap.global_unstructured(pairs(other)[:1], tap.Random, amount=0.9)
    if isinstance(other, Tied):
        tap.global_unstructured(pairs(other)[1:], tap.Random, amount=0.9)
    tap.load_state_dict(other, state_of(model))
    assert_same_masks(pairs(model), pairs(other))
    assert torch.equal(model(inputs(model)), other(inputs(other)))
    assert_works_on(other)


def tied_with_masks_that_differ() -> Tied:
    model = Tied()
    tap.magnitude(model.a, "weight", 0.3)
    tap.random(model.b, "weight", 0.5)
    assert not torch.equal(model.a.weight_mask, model.b.weight_mask)
    return model


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "other", [Tied, tied, tied_with_masks_that_differ], ids=["dense", "one mask", "two masks"]
)
def test_tied_places_keep_masks_that_differ(other: Callable[[], Model], assign: bool) -> None:
    model, loaded = tied_with_masks_that_differ(), other()
    tap.load_state_dict(loaded, state_of(model), assign=assign)
    assert_same_masks(pairs(model), pairs(loaded))
    assert torch.equal(model(inputs(model)), loaded(inputs(loaded)))
    assert assign or loaded.a.weight_orig is loaded.b.weight_orig
    copied = copy.deepcopy(model)
    tap.load_state_dict(copied, state_of(model), assign=assign)
    assert_same_masks(pairs(model), pairs(copied))


def test_tied_masks_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, other = ours(Tied()), Tied()
    tap.load_state_dict(other, model.state_dict())
    assert other.a.weight_mask is other.b.weight_mask


def test_torchs_own_load_state_dict_between_pruned_models(our_model: Model) -> None:
    other = ours(like(our_model))
    other.load_state_dict(state_of(our_model))
    assert_same_model(our_model, other)


def test_a_dense_state_makes_a_pruned_model_dense(our_model: Model) -> None:
    dense = like(our_model)
    tap.load_state_dict(our_model, state_of(dense))
    assert not prune.is_pruned(our_model)
    assert torch.equal(our_model(inputs(our_model)), dense(inputs(dense)))
    if isinstance(our_model, Tied):
        assert our_model.a.weight is our_model.b.weight


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])  # torch's own masks are float
def test_loading_leaves_the_state_alone(our_model: Model, dtype: torch.dtype) -> None:
    state = state_of(our_model)
    state |= {key: mask.to(dtype) for key, mask in state.items() if key.endswith("_mask")}
    copied = {key: value.clone() for key, value in state.items()}
    other = like(our_model)
    tap.load_state_dict(other, state)
    for module, _ in pairs(other):
        module.weight_mask.zero_()
        module.weight_orig.data.zero_()
    assert list(state) == list(copied)
    assert [value.dtype for value in state.values()] == [copied[key].dtype for key in state]
    assert all(torch.equal(state[key], copied[key]) for key in state)


def test_what_is_loaded_is_trained_by_the_optimizer_there_was(our_model: Model) -> None:
    other = like(our_model)
    before = {id(parameter) for parameter in other.parameters()}
    tap.load_state_dict(other, state_of(our_model))
    assert {id(parameter) for parameter in other.parameters()} == before


def test_not_strict_takes_what_fits() -> None:
    state = state_of(fresh())
    del state["0.bias"]
    state["another"] = torch.ones(1)
    other = like(fresh())
    result = tap.load_state_dict(other, state, strict=False)
    assert result.missing_keys == ["0.bias"]
    assert result.unexpected_keys == ["another"]
    assert_same_masks(pairs(other), pairs(fresh()))


def test_a_state_from_a_file() -> None:
    file = io.BytesIO()
    torch.save(after_forward().state_dict(), file)
    file.seek(0)
    other = like(fresh())
    tap.load_state_dict(other, torch.load(file, weights_only=True))
    assert_same_masks(pairs(other), pairs(fresh()))


def test_loads_onto_the_meta_device_with_assign() -> None:
    model = fresh()
    other = like(model).to("meta")
    tap.load_state_dict(other, model.state_dict(), assign=True)
    assert torch.equal(model(inputs(model)), other(inputs(model)))


def test_a_module_in_two_places_becomes_dense_again() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    dense = state_of(model)
    tap.magnitude(layer, "weight", 0.5)
    pruned = state_of(model)
    tap.load_state_dict(model, dense)
    assert not prune.is_pruned(model)
    tap.load_state_dict(model, pruned)
    assert prune.is_pruned(model)
    assert len(layer._forward_pre_hooks) == 1
    assert kept([(layer, "weight")]) == 8


def test_versions_of_modules_reach_them() -> None:
    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state, prefix, metadata, *rest) -> None:  # type: ignore[no-untyped-def]
            self.seen = metadata.get("version")
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    pruned, other = Versioned(4, 4), Versioned(4, 4)
    tap.magnitude(pruned, "weight", 0.5)
    tap.load_state_dict(other, pruned.state_dict())
    assert other.seen == 7


def bad_states(model: Model) -> dict[str, tuple[dict[str, Tensor], type[Exception], str]]:
    state = dict(state_of(model))
    return {
        "a mask without its parameter": (
            {**state, "9.weight_orig": torch.ones(2), "9.weight_mask": torch.ones(2)},
            ValueError,
            "masks of the model's parameters only, got one of 9.weight",
        ),
        "another shape": (
            {**state, "2.weight_orig": torch.ones(3, 3), "2.weight_mask": torch.ones(3, 3) > 0},
            RuntimeError,
            r"2.weight_orig: expected \(8, 16\), got \(3, 3\)",
        ),
        "a mask of another shape": (
            {**state, "2.weight_mask": torch.ones(3, 3) > 0},
            RuntimeError,
            r"2.weight_mask: expected \(8, 16\), got \(3, 3\)",
        ),
        "a mask that scales": (
            {**state, "2.weight_mask": torch.full((8, 16), 0.5)},
            ValueError,
            "the mask of 2.weight should have no numbers but 0 and 1, got 0.5",
        ),
        "a mask that is no tensor": (
            {**state, "2.weight_mask": "words"},  # type: ignore[dict-item]
            RuntimeError,
            "2.weight_mask: expected a tensor, got str",
        ),
        "a sparse weight": (
            {**state, "2.weight_orig": state["2.weight_orig"].to_sparse()},
            RuntimeError,
            "2.weight_orig: expected torch.strided, got torch.sparse_coo",
        ),
        "a weight without values": (
            {**state, "2.weight_orig": state["2.weight_orig"].to("meta")},
            RuntimeError,
            "2.weight_orig: expected values, got a tensor on the meta device",
        ),
        "a key missing": (
            {key: value for key, value in state.items() if key != "2.bias"},
            RuntimeError,
            "missing keys: 2.bias",
        ),
        "a mask missing": (
            {key: value for key, value in state.items() if key != "2.weight_mask"},
            RuntimeError,
            "2.weight",
        ),
        "a key too many": ({**state, "more": torch.ones(1)}, RuntimeError, "unexpected keys: more"),
        "no tensor": ({**state, "2.bias": "words"}, Exception, "2.bias"),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("case", bad_states(fresh()))
@pytest.mark.parametrize("target", [mlp, fresh, trained, ours_then_torch])
def test_a_state_that_does_not_fit_changes_nothing(case: str, target: Callable[[], Model]) -> None:
    state, error, message = bad_states(fresh())[case]
    model = target()
    record = Record(model)
    with pytest.raises(error, match=message):
        tap.load_state_dict(model, state)
    record.assert_untouched()


def test_a_dense_state_that_does_not_fit_changes_nothing() -> None:
    model = trained()
    record = Record(model)
    state = dict(state_of(mlp()))
    state["2.weight"] = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match=r"2.weight: expected \(8, 16\), got \(3, 3\)"):
        tap.load_state_dict(model, state)
    record.assert_untouched()


def two_parameters_of_one_module() -> list[Pair]:
    layer = nn.Linear(12, 16)
    params: list[Pair] = [(layer, "weight"), (layer, "bias")]
    tap.global_unstructured(params, tap.AlignedMagnitude, amount=0.5)
    layer(torch.randn(2, 12)).sum().backward()
    return params


@pytest.mark.parametrize("copied", COPIES)
def test_two_pruned_parameters_of_one_module(copied: Callable[[Model], Model]) -> None:
    params = two_parameters_of_one_module()
    layer = params[0][0]
    other = copied(layer)
    x = torch.randn(2, 12)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(other.bias, other.bias_orig * other.bias_mask)
    fresh_layer = nn.Linear(12, 16)
    tap.load_state_dict(fresh_layer, layer.state_dict())
    assert torch.equal(layer(x), fresh_layer(x))
    prune.remove(other, "weight")
    assert torch.equal(layer(x), other(x))
    prune.remove(other, "bias")
    assert torch.equal(layer(x), other(x))
