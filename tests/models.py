"""Small models that the tests prune, and a record of one to compare it with afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

import torchalignprune as tap
from torchalignprune.shards import is_dtensor

Pair = tuple[nn.Module, str]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two linear layers whose units and whose layers differ in scale. Inputs: (batch, 12)."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        model[0].weight.mul_(torch.rand(16, 1, generator=generator) + 0.2)
        model[2].weight.mul_(2.0)
    return model.to(dtype)


def mixed() -> nn.ModuleList:
    """Every kind of layer whose outputs lie along one dimension or the other."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleList(
        [
            nn.Linear(6, 5),
            Conv1D(5, 6),
            nn.Conv1d(4, 3, 3),
            nn.Conv2d(4, 3, (2, 3)),
            nn.Conv3d(2, 3, 2),
            nn.ConvTranspose1d(4, 3, 3),
            nn.ConvTranspose2d(4, 3, (2, 3)),
        ]
    )
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            scales = torch.rand(layer.weight.shape[:2], generator=generator) + 0.5
            layer.weight.mul_(scales.reshape(*scales.shape, *[1] * (layer.weight.dim() - 2)))
    return model


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(12, 12)
        self.b = nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def holder(*weights: Tensor) -> nn.Module:
    """A module with the given tensors as its parameters weight0, weight1, ..."""
    module = nn.Module()
    for i, weight in enumerate(weights):
        module.register_parameter(f"weight{i}", nn.Parameter(weight))
    return module


def pairs(model: nn.Module) -> list[Pair]:
    """The weights of one of the models above, pruned or not."""
    if type(model) is nn.Module:
        names = [name.removesuffix("_orig") for name, _ in model.named_parameters()]
        return [(model, name) for name in sorted(names)]
    return [(layer, "weight") for layer in model.children() if hasattr(layer, "weight")]


def mask_list(params: Iterable[Pair]) -> list[Tensor]:
    """The masks as bool."""
    return [getattr(module, f"{name}_mask") != 0 for module, name in params]


def kept(params: Iterable[Pair]) -> int:
    return sum(int(mask.sum()) for mask in mask_list(params))


def weights_of(params: Iterable[Pair]) -> list[Tensor]:
    """The stored weights, without the masks."""
    return [
        getattr(module, f"{name}_orig" if hasattr(module, f"{name}_orig") else name).detach()
        for module, name in params
    ]


def assert_same_masks(left: Iterable[Pair], right: Iterable[Pair]) -> None:
    for a, b in zip(mask_list(left), mask_list(right), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def prune_with_torch(params: list[Pair]) -> None:
    prune.global_unstructured(params, pruning_method=prune.L1Unstructured, amount=0.25)


def prune_with_us(params: list[Pair]) -> None:
    tap.global_unstructured(params, tap.Magnitude, amount=0.25)


class Record:
    """All there is to a model: its modules' attributes, parameters, buffers and hooks, which
    objects they are, and every bit of the tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._read()

    def _read(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            for group, content in vars(module).items():
                items = content.items() if isinstance(content, dict) else [("", content)]
                seen[f"{path}.{group}"] = type(content)
                for order, (key, value) in enumerate(items):
                    where = f"{path}.{group}[{key}]"
                    seen[where] = (order, id(value))
                    if isinstance(value, Tensor):
                        seen[f"{where} content"] = _bits(value)
        return seen

    def assert_untouched(self) -> None:
        after = self._read()
        assert list(after) == list(self.before)
        changed = [where for where, what in self.before.items() if after[where] != what]
        assert not changed, changed


def _bits(tensor: Tensor) -> tuple[object, ...]:
    if is_dtensor(tensor):
        spread: Any = tensor
        return (spread.requires_grad, spread.placements, spread.shape, _bits(spread.to_local()))
    kind = (tensor.dtype, tensor.layout, tensor.device, tensor.requires_grad)
    grad = None if not tensor.is_leaf or tensor.grad is None else _bits(tensor.grad)
    if tensor.layout != torch.strided or torch.nn.parameter.is_lazy(tensor):
        return (*kind, grad)
    kind = (*kind, tuple(tensor.shape))
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return (*kind, tensor.stride(), tensor.grad_fn is None, bytes(content.numpy()), grad)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    assert torch.equal(found.contiguous().view(bits), expected.contiguous().view(bits))
