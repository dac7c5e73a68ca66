"""What a forward does with weights and masks: while training, in evaluations, when compiled."""

from __future__ import annotations

import copy
import io
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import torchalignprune as tap
from models import assert_same_bits, mlp, pairs
from torchalignprune import hooks, ops


def pruned(amount: float = 0.5, *, zeroed: bool = False) -> nn.Sequential:
    """With ``zeroed``, what is stored is zero where it is pruned."""
    model = mlp()
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=amount)
    if zeroed:
        layers = [model[0], model[2]]
        ops.zero_pruned_([m.weight_orig for m in layers], [m.weight_mask for m in layers])
    return model


def by_torch(model: nn.Sequential) -> nn.Sequential:
    """The same parameters and masks under torch's own hooks."""
    twin = mlp()
    for own, other in ((model[0], twin[0]), (model[2], twin[2])):
        prune.custom_from_mask(other, "weight", own.weight_mask.float())
        with torch.no_grad():
            other.weight_orig.copy_(own.weight_orig)
            other.bias.copy_(own.bias)
    return twin


def inputs() -> Tensor:
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(3))


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("zeroed", [False, True])
def test_trains_as_torchs_own_hooks_do(zeroed: bool, optimizer: str) -> None:
    ours = pruned(zeroed=zeroed)
    models = [ours, by_torch(ours)]
    steps = [OPTIMIZERS[optimizer](model.parameters()) for model in models]
    for _ in range(5):
        losses = []
        for model, step in zip(models, steps, strict=True):
            step.zero_grad()
            loss = model(inputs()).square().mean()
            loss.backward()
            step.step()
            losses.append(loss)
        assert torch.equal(*losses)
        for own, other in zip(*(model.parameters() for model in models), strict=True):
            assert own.grad is not None
            assert other.grad is not None
            assert torch.equal(own.grad, other.grad)
            assert torch.equal(own, other)
    if zeroed:  # nothing has moved a pruned entry, so there never was a product
        ours(inputs())
        assert ours[0].weight.data_ptr() == ours[0].weight_orig.data_ptr()
        assert bool((ours[0].weight_orig[~ours[0].weight_mask] == 0).all())


def test_a_changed_entry_is_masked_again() -> None:
    layer = pruned(zeroed=True)[0]
    mask = layer.weight_mask
    changes: list[Callable[[], object]] = [
        lambda: layer.weight_orig.data.fill_(1.0),
        lambda: layer.weight_orig.detach().numpy().fill(2.0),
        lambda: layer.load_state_dict(
            {"weight_orig": torch.ones_like(mask, dtype=torch.float)}, False
        ),
        lambda: setattr(layer.weight_orig, "data", torch.full(mask.shape, 4.0)),
        lambda: layer.weight_mask.logical_not_(),
    ]
    for change in changes:
        change()
        for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
            with context:
                layer(inputs())
                assert torch.equal(
                    layer.weight, torch.where(layer.weight_mask, layer.weight_orig, 0)
                )
    assert bool((layer.weight[layer.weight_mask] == 4).all())


@pytest.mark.parametrize("zeroed", [False, True])
def test_one_layer_many_times_in_one_step(zeroed: bool) -> None:
    """As in ALBERT, and with the forward repeated in the backward."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 12)
    tap.magnitude(layer, "weight", 0.5)
    if zeroed:
        ops.zero_pruned_([layer.weight_orig], [layer.weight_mask])
    weight = layer.weight_orig.detach().clone().requires_grad_()
    x = inputs().requires_grad_()

    def run(call: Callable[[Tensor], Tensor]) -> Tensor:
        y = x
        for _ in range(4):
            y = call(y).tanh()
        return y.square().sum()

    plain = run(lambda y: nn.functional.linear(y, weight * layer.weight_mask, layer.bias))
    expected = torch.autograd.grad(plain, [weight, x])
    calls: list[Callable[[Tensor], Tensor]] = [
        layer,
        lambda y: checkpoint(layer, y, use_reentrant=False),
        lambda y: checkpoint(layer, y, use_reentrant=True),
    ]
    for call in calls:
        for cached in (False, True):
            layer.zero_grad()
            x.grad = None
            with tap.cached_weights() if cached else torch.enable_grad():
                run(call).backward()
            assert layer.weight_orig.grad is not None
            torch.testing.assert_close(layer.weight_orig.grad, expected[0])
            torch.testing.assert_close(x.grad, expected[1])


def test_copies_and_pickles_of_a_shared_weight() -> None:
    model = pruned(zeroed=True)
    model(inputs())
    expected = model(inputs())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(inputs()), expected)
        with torch.no_grad():
            twin[0].weight_orig.add_(1)
        assert torch.equal(model(inputs()), expected)
        assert not torch.equal(twin(inputs()), expected)


def test_remove_after_a_shared_weight() -> None:
    model = pruned(zeroed=True)
    expected = model(inputs())
    for layer, name in pairs(model):
        prune.remove(layer, name)
    assert torch.equal(model(inputs()), expected)
    model(inputs()).sum().backward()
    assert model[0].weight.is_leaf and model[0].weight.grad is not None


def test_masks_in_the_dtype_of_the_weight() -> None:
    """As a checkpoint of torch's own pruning leaves them when it is assigned."""
    model = pruned()
    expected = model(inputs())
    state = {k: v.float() if "mask" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model[0].weight_mask.dtype == torch.float32
    assert torch.equal(model(inputs()), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("zeroed", [False, True])
def test_compiled_training_is_the_same(zeroed: bool) -> None:
    torch.compiler.reset()
    model = pruned(zeroed=zeroed)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    for _ in range(2):
        for one in (model, compiled):
            one(inputs()).square().sum().backward()
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs()), model(inputs()))


# The memory of the former product


def place(layer: nn.Module) -> int:
    return layer.weight.data_ptr()


def test_the_next_product_takes_the_memory_of_the_former() -> None:
    model = pruned(0.2)
    layer = model[0]
    memory = place(layer)
    for amount in (0.25, 0.5):
        tap.global_unstructured(pairs(model), tap.Magnitude, amount=amount)
        assert place(layer) == memory
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with torch.no_grad():
            layer.weight_orig.mul_(2)
        with context():
            out = model(inputs())
        assert place(layer) == memory
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
        assert layer.weight.requires_grad == (context is torch.enable_grad)
        if out.requires_grad:
            out.square().mean().backward()
    twin = by_torch(model)
    for one in (model, twin):
        one.zero_grad()
        one(inputs()).square().mean().backward()
    assert place(layer) == memory
    assert torch.equal(layer.weight_orig.grad, twin[0].weight_orig.grad)


HOLDERS: dict[str, Callable[[nn.Module], object]] = {
    "the tensor": lambda layer: layer.weight,
    "a view": lambda layer: layer.weight[:],
    "a detached one": lambda layer: layer.weight.detach(),
    "its storage": lambda layer: layer.weight.untyped_storage(),
    "numpy": lambda layer: layer.weight.detach().numpy(),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("by", ["a forward", "pruning"])
def test_a_product_that_somebody_has_stays_as_it_is(holder: str, by: str) -> None:
    model = pruned(0.2)
    layer = model[0]
    memory, before = place(layer), layer.weight.detach().clone()
    held = HOLDERS[holder](layer)
    with torch.no_grad():
        layer.weight_orig.mul_(2)
    if by == "pruning":
        tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.5)
    else:
        model(inputs())
    assert place(layer) != memory
    if holder != "its storage":
        assert torch.equal(torch.as_tensor(held), before)


def test_a_product_that_a_graph_has_stays_as_it_is() -> None:
    model = pruned(0.2)
    x = inputs().requires_grad_()
    out = model[0](x)
    (expected,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    memory = place(model[0])
    with torch.no_grad():
        model[0].weight_orig.mul_(2)
    tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.5)
    model(inputs())
    assert place(model[0]) != memory
    (found,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(found, expected)


def test_a_product_that_does_not_fit_is_left_alone() -> None:
    changes: dict[str, Callable[[nn.Module], object]] = {
        "dtype": lambda layer: layer.double(),
        "strides": lambda layer: setattr(
            layer, "weight_orig", nn.Parameter(layer.weight_orig.detach().t().contiguous().t())
        ),
        "offset": lambda layer: setattr(
            layer,
            "weight",
            torch.zeros(layer.weight.numel() + 4)[4:].view_as(layer.weight),
        ),
        "shared memory": lambda layer: setattr(
            layer, "weight", layer.weight.detach().clone().share_memory_()
        ),
        "numpy's memory": lambda layer: setattr(
            layer, "weight", torch.from_numpy(layer.weight.detach().numpy().copy())
        ),
        "a buffer": lambda layer: delattr(layer, "weight"),
    }
    for what, change in changes.items():
        layer = pruned()[0]
        change(layer)
        memory = vars(layer)["weight"].data_ptr() if "weight" in vars(layer) else 0
        layer(inputs().to(layer.weight_orig.dtype))
        assert place(layer) != memory, what
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask), what


# cached_weights


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were multiplied by their masks."""
    made: list[Tensor] = []
    product = hooks._product

    def counted(original: Tensor, mask: Tensor) -> Tensor:
        made.append(original)
        return product(original, mask)

    monkeypatch.setattr(hooks, "_product", counted)
    monkeypatch.setattr(hooks, "_next_product", lambda module, name, *tensors: counted(*tensors))
    return made


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_one_product_for_many_forwards(
    context: type[torch.no_grad], products: list[Tensor]
) -> None:
    model = pruned()
    products.clear()
    with context():
        expected = model(inputs())
        assert len(products) == 2
        with tap.cached_weights():
            for _ in range(3):
                assert torch.equal(model(inputs()), expected)
            with tap.cached_weights():
                model(inputs())
            model(inputs())
            assert len(products) == 4
        model(inputs())
        assert len(products) == 6
    assert hooks._cache is None


def test_nothing_is_kept_where_a_gradient_is_needed(products: list[Tensor]) -> None:
    model = pruned()
    with tap.cached_weights():
        for _ in range(2):
            products.clear()
            model(inputs()).sum().backward()
            assert len(products) == 2
        products.clear()
        model.requires_grad_(False)
        for _ in range(2):
            model(inputs().requires_grad_()).sum().backward()
        assert len(products) == 2


def test_changes_that_torch_counts_are_noticed() -> None:
    model = pruned()
    layer = model[0]
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    mask = layer.weight_mask

    def train() -> None:
        model(inputs()).sum().backward()
        optimizer.step()

    def inference(run: Callable[[], object]) -> Callable[[], None]:
        def changed() -> None:
            with torch.no_grad():
                run()

        return changed

    changes: list[Callable[[], object]] = [
        train,
        lambda: model.load_state_dict(state),
        inference(lambda: layer.weight_orig.mul_(2)),
        lambda: setattr(layer.weight_orig, "data", torch.randn(mask.shape)),
        lambda: setattr(layer, "weight_orig", nn.Parameter(torch.randn(mask.shape))),
        lambda: mask.logical_not_(),
        lambda: setattr(layer, "weight_mask", torch.ones_like(mask)),
        lambda: tap.global_unstructured(pairs(model), tap.Magnitude, amount=0.3),
    ]
    with tap.cached_weights():
        for change in changes:
            with torch.no_grad():
                model(inputs())
            change()
            with torch.no_grad():
                model(inputs())
            expected = torch.where(layer.weight_mask, layer.weight_orig, 0)
            assert_same_bits(layer.weight.detach(), expected.detach())


def test_what_is_made_in_inference_mode_stays_there() -> None:
    model = pruned().requires_grad_(False)
    with tap.cached_weights():
        with torch.inference_mode():
            model(inputs())
        x = inputs().requires_grad_()
        model(x).sum().backward()
    assert x.grad is not None


def test_scopes_may_overlap() -> None:
    first, second = tap.cached_weights(), tap.cached_weights()
    model = pruned()
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        kept = model(inputs())
        first.__exit__(None, None, None)
        model[0].weight_orig.data.zero_()  # which torch does not count
        assert torch.equal(model(inputs()), kept)
        second.__exit__(None, None, None)
        assert hooks._cache is None
        assert not torch.equal(model(inputs()), kept)


def test_a_scope_that_ends_in_another_thread() -> None:
    model = pruned()
    over = threading.Event()

    def scopes() -> None:
        while not over.is_set():
            with tap.cached_weights():
                pass

    thread = threading.Thread(target=scopes)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        with torch.no_grad():
            expected = model(inputs())
            for _ in range(300):
                assert torch.equal(model(inputs()), expected)
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_transforms_within_a_scope() -> None:
    model = pruned().requires_grad_(False)
    weights = dict(model.named_parameters())
    stacked = {name: torch.stack([value, 2 * value]) for name, value in weights.items()}

    x = inputs()

    def run(values: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(model, values, (x,))
        return out

    expected = [run({name: value[i] for name, value in stacked.items()}) for i in range(2)]
    with tap.cached_weights(), torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(run)(stacked), torch.stack(expected))


def test_transforms_where_the_gradient_reaches_pruned_entries() -> None:
    model = pruned()
    for layer in (model[0], model[2]):
        (hook,) = layer._forward_pre_hooks.values()
        hook.straight_through = True
    x = inputs()
    model(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, values, (x,))
        return out.square().sum()

    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.grad(loss)(values, x)
    of_samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)
        torch.testing.assert_close(of_samples[name].sum(0), grad)


def test_an_error_ends_the_scope() -> None:
    with pytest.raises(KeyError), tap.cached_weights():
        raise KeyError
    assert hooks._cache is None
