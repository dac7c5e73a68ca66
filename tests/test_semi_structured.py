"""2:4 sparse weights: what is refused, what becomes of a model, and on a GPU that it computes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass
from transformers.pytorch_utils import Conv1D

import torchalignprune as tap
from models import Pair
from torchalignprune import semi_structured

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
HALVES = [torch.float16, torch.bfloat16]


class Layers(nn.Module):
    """A linear layer with a bias, one without, a transposed one, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(64, 128)
        self.b = nn.Linear(128, 64, bias=False)
        self.c = Conv1D(192, 64)
        self.d = nn.Linear(192, 192)
        self.e = nn.Linear(192, 192)
        self.e.weight = self.d.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d, self.e):
            x = layer(x).relu()
        return x


def params_of(model: nn.Module) -> list[Pair]:
    return tap.prunable_parameters(model)


def two_of_four(dtype: torch.dtype = torch.float16, device: str = "cpu") -> Layers:
    model = Layers().to(device, dtype).eval()
    tap.global_unstructured(params_of(model), tap.AlignedNM, n=2, m=4)
    return model


def packed_on_cpu(units: Tensor, backend: str) -> Tensor:
    packed, meta = sparse_semi_structured_from_dense_cutlass(units)
    return SparseSemiStructuredTensorCUTLASS(
        units.shape,
        packed=packed,
        meta=meta,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUTLASS's format can be made and read on the CPU; there is no product by it."""
    monkeypatch.setattr(semi_structured, "_check_device", lambda name, device: None)
    monkeypatch.setattr(semi_structured, "_backend", lambda: "CUTLASS")
    monkeypatch.setattr(semi_structured, "_pack", packed_on_cpu)


@pytest.fixture
def with_products(as_if_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "_try", lambda name, module, weight: None)


class Before:
    """What a failed call must leave."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {k: v.clone() for k, v in model.state_dict().items()}
        self.ids = {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
        self.hooks = [len(m._forward_pre_hooks) for m in model.modules()]

    def assert_untouched(self) -> None:
        found = self.model.state_dict(keep_vars=True)
        assert {k: id(v) for k, v in found.items()} == self.ids
        assert all(torch.equal(v, self.state[k]) for k, v in found.items())
        assert [len(m._forward_pre_hooks) for m in self.model.modules()] == self.hooks


def test_on_the_cpu_it_says_what_zeros_are_good_for() -> None:
    model = two_of_four()
    before = Before(model)
    with pytest.raises(
        RuntimeError, match=r"a\.weight is on cpu: 2:4 .* save disk space, not time"
    ):
        tap.to_semi_structured(params_of(model))
    before.assert_untouched()


def test_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"fc is on cuda:1 of compute capability 7\.5: 2:4"):
        semi_structured._check_device("fc", torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    semi_structured._check_device("fc", torch.device("cuda:1"))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("by", ["us", "torch", "zeros"])
def test_weights_become_sparse_and_keep_their_values(
    with_products: None, dtype: torch.dtype, by: str
) -> None:
    model = two_of_four(dtype)
    model(torch.randn(3, 64).to(dtype))
    expected = [layer.weight.detach().clone() for layer, _ in params_of(model)]
    if by != "us":
        for layer, name in params_of(model):
            prune.remove(layer, name)
    if by == "torch":
        for layer, name in params_of(model):
            prune.custom_from_mask(layer, name, (getattr(layer, name) != 0).to(dtype))
    tap.to_semi_structured(params_of(model))
    for name, layer in model.named_children():
        weight = layer._parameters["weight"]
        assert isinstance(weight, nn.Parameter) and isinstance(weight, SparseSemiStructuredTensor)
        assert layer.weight is weight
        assert not weight.requires_grad
        assert not layer._forward_pre_hooks and not layer._buffers
        assert set(layer._parameters) == {"weight", "bias"}, name
    assert not prune.is_pruned(model)
    assert model.d.weight is model.e.weight
    for name, wanted in zip("abcde", expected, strict=True):
        weight = getattr(model, name).weight
        assert weight.shape == wanted.shape
        units = weight.t().to_dense().t() if name == "c" else weight.to_dense()
        assert torch.equal(units, wanted)
    stored_bytes = model.a.weight.packed.nbytes + model.a.weight.meta.nbytes
    assert stored_bytes == model.a.weight.numel() * 2 * 9 // 16


def test_saving_is_by_pickle_alone(with_products: None) -> None:
    model = two_of_four()
    tap.to_semi_structured(params_of(model))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=False)
    assert torch.equal(state["a.weight"].to_dense(), model.a.weight.to_dense())
    if torch.ops.aten.clone in type(model.a.weight).SPARSE_DISPATCH:  # not so in torch 2.11
        twin = copy.deepcopy(model)
        assert torch.equal(twin.a.weight.to_dense(), model.a.weight.to_dense())
    with pytest.raises(RuntimeError, match="only supports a specific set of operations"):
        Layers().load_state_dict(model.state_dict())


def set_weight(name: str, *place: int) -> Callable[[Layers], object]:
    def change(model: Layers) -> None:
        layer = getattr(model, name)
        layer.weight_orig.data[place] = 1.0
        layer.weight_mask[place] = True

    return change


def replace(name: str, layer: nn.Module) -> Callable[[Layers], object]:
    return lambda model: setattr(model, name, layer)


BAD: dict[str, tuple[Callable[[Layers], object], type[Exception], str]] = {
    "float32": (lambda m: m.b.float(), TypeError, r"b\.weight should be float16 or bfloat16, got"),
    "bias": (
        lambda m: m.a.bias.data.__class__ and setattr(m.a, "bias", nn.Parameter(torch.ones(128))),
        TypeError,
        r"the bias of a\.weight should be torch.float16, got torch.float32",
    ),
    "outputs": (
        replace("e", nn.Linear(64, 40).half()),
        ValueError,
        r"e\.weight should have a multiple of 32 outputs for CUTLASS, got 40",
    ),
    "inputs": (
        replace("e", nn.Linear(96, 64).half()),
        ValueError,
        r"e\.weight should have a multiple of 64 inputs for CUTLASS, got 96",
    ),
    "dense": (
        replace("e", nn.Linear(64, 64).half()),
        ValueError,
        r"e\.weight should have at most 2 .* got 4 in unit 0, inputs 0 to 3, .* of 1,024 such",
    ),
    "convolution": (
        replace("e", nn.Conv1d(64, 64, 1).half()),
        TypeError,
        r"e\.weight should be the weight of an nn\.Linear .* got weight of Conv1d",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_changes_nothing(with_products: None, case: str) -> None:
    model = two_of_four()
    change, error, message = BAD[case]
    change(model)
    before = Before(model)
    with pytest.raises(error, match=message):
        tap.to_semi_structured(params_of(model))
    before.assert_untouched()


@pytest.mark.parametrize(("name", "row", "unit"), [("b", 7, 7), ("c", 9, 5)])
def test_one_entry_too_many(with_products: None, name: str, row: int, unit: int) -> None:
    """Of a Conv1D, whose inputs are rows, too."""
    model = two_of_four()
    weight, mask = getattr(model, name).weight_orig, getattr(model, name).weight_mask
    group = (slice(8, 12), 5) if name == "c" else (7, slice(8, 12))
    kept = mask[group]
    place = 8 + int((~kept).nonzero()[0])
    with torch.no_grad():
        weight[(place, 5) if name == "c" else (7, place)] = 1.0
    tap.to_semi_structured([(model.a, "weight")])  # what is masked may be anything
    mask[(place, 5) if name == "c" else (7, place)] = True
    before = Before(getattr(model, name))
    with pytest.raises(ValueError, match=f"got 3 in unit {unit}, inputs 8 to 11, the first of 1 "):
        tap.to_semi_structured([(model.d, "weight"), (getattr(model, name), "weight")])
    before.assert_untouched()


def test_a_product_that_the_library_refuses_changes_nothing(as_if_on_a_gpu: None) -> None:
    model = two_of_four()
    before = Before(model)
    with pytest.raises(RuntimeError, match=r"a\.weight: no 2:4 sparse product on cpu: "):
        tap.to_semi_structured(params_of(model))
    before.assert_untouched()


@pytest.mark.parametrize("layer", [nn.Linear(16, 16), Conv1D(16, 16)], ids=["Linear", "Conv1D"])
def test_the_trial_takes_a_pruned_bias(layer: nn.Module) -> None:
    tap.magnitude(layer, "bias", 0.5)
    with pytest.raises(RuntimeError, match=r"x: no 2:4 sparse product on cpu: .*\[3\]"):
        layer.bias = torch.ones(3)  # of the wrong size, so that it shows
        semi_structured._try("x", layer, layer.weight.detach())


def test_no_parameters_and_no_weights() -> None:
    with pytest.raises(ValueError, match="params should have at least one"):
        tap.to_semi_structured([])
    with pytest.raises(TypeError, match=r"parameters\[0\] .* got bias of Linear"):
        tap.to_semi_structured([(nn.Linear(4, 4), "bias")])


def has_sparse_tensor_cores() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@pytest.mark.cuda
@pytest.mark.skipif(not has_sparse_tensor_cores(), reason="needs a GPU of capability 8.0")
@pytest.mark.parametrize("dtype", HALVES)
def test_computes_on_a_gpu_what_the_dense_model_does(dtype: torch.dtype) -> None:
    model = two_of_four(dtype, "cuda")
    params = params_of(model)
    for rows in (1, 7, 16, 300):
        x = torch.randn(rows, 64, device="cuda").to(dtype)
        with torch.inference_mode():
            layers = copy.deepcopy(model)
            dense = layers(x)
            tap.to_semi_structured(params_of(layers))
            sparse = layers(x)
            batched = layers(x[None].repeat(2, 1, 1))
        tolerance = 8 * torch.finfo(dtype).eps * float(dense.abs().max())
        torch.testing.assert_close(sparse, dense, rtol=0, atol=tolerance)
        torch.testing.assert_close(batched[1], dense, rtol=0, atol=tolerance)
    tap.to_semi_structured(params)
    assert all(isinstance(layer.weight, SparseSemiStructuredTensor) for layer, _ in params)


@pytest.mark.cuda
@pytest.mark.skipif(not has_sparse_tensor_cores(), reason="needs a GPU of capability 8.0")
def test_errors_on_a_gpu_change_nothing() -> None:
    model = two_of_four(torch.float16, "cuda")
    with torch.no_grad():
        model.d.weight_mask[0, :4] = True
    before = Before(model)
    with pytest.raises(ValueError, match=r"d\.weight should have at most 2"):
        tap.to_semi_structured(params_of(model))
    before.assert_untouched()
