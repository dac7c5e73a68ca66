"""What pruning did to each layer, in figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchalignprune.parameters import (
    Parameters,
    PrunableParameters,
    mask_of,
    parameter_names,
    stored,
    unit_dimension,
)

__all__ = ["LayerReport", "layer_report"]

_CHUNK = 1 << 22  # entries that are in float64 at a time


class LayerReport(list[dict[str, Any]]):
    """A list with a ``dict`` of figures for each layer, and the figures of all of them together.

    Attributes:
        totals: the figures of the whole, without ``name``, ``module`` and ``shape``.
    """

    totals: dict[str, Any]

    def __init__(self, layers: list[dict[str, Any]], totals: dict[str, Any]) -> None:
        super().__init__(layers)
        self.totals = totals


def layer_report(
    params: Parameters, reference: Mapping[tuple[nn.Module, str], Tensor] | None = None
) -> LayerReport:
    r"""Sparsity, alignment, distortion and dead units of each parameter.

    The alignment of a unit is :math:`A = \langle p, r\rangle / (|p||r|)` between its pruned weights
    ``p`` and its reference ``r``, 0 where ``p`` is all zero; units whose reference is zero do not
    count. The distortion of a tensor is :math:`|P - R|_F^2 / |R|_F^2`. All sums are in float64.

    Args:
        params: ``(module, name)`` pairs, pruned or not.
        reference: the dense weights, one tensor in the shape of the parameter for each pair.
            Default: the weights under the masks (``name_orig``), or the weights themselves for
            what is not pruned.

    Returns:
        A list of dicts that ``json`` can write, with the keys

        - ``name``, ``module`` (its type) and ``shape``;
        - ``entries``, ``zeros`` (of the pruned weights) and ``sparsity``, their ratio;
        - ``mean_alignment`` and ``worst_alignment`` of the output units, ``mean_alignment_in`` and
          ``worst_alignment_in`` of the input units; None where no unit counts;
        - ``distortion``; None where the reference is zero;
        - ``dead_units_out`` and ``dead_units_in``: units that are all zero and whose reference is
          not;
        - ``tied_to``: the name of an earlier parameter that is the same one, or None.

        and ``totals``, in which tied parameters count once. Its means are over all units, so that
        every unit counts the same, its distortion is that of all tensors as one.

    Raises:
        ValueError: no parameters, or a reference that is missing or of the wrong shape; the error
            names the parameter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.utils import prune
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0], [6.0, 8.0]]))
        >>> _ = prune.l1_unstructured(layer, "weight", amount=1)
        >>> (figures,) = layer_report([(layer, "weight")])
        >>> figures["sparsity"], figures["mean_alignment"], figures["worst_alignment"]
        (0.25, 0.9, 0.8)
    """
    pairs = list(params)
    names = parameter_names(params if isinstance(params, PrunableParameters) else pairs)
    if not pairs:
        raise ValueError("there are no parameters to report on")
    references = []
    for pair, name in zip(pairs, names, strict=True):
        weight = stored(*pair).detach()
        dense = weight if reference is None else reference.get(pair)
        if dense is None:
            raise ValueError(f"reference has no entry for {name}")
        if dense.shape != weight.shape:
            raise ValueError(
                f"the reference of {name} should have shape {tuple(weight.shape)}, got "
                f"{tuple(dense.shape)}"
            )
        references.append(dense.detach())

    layers: list[dict[str, Any]] = []
    sums: dict[int, tuple[str, _Sums]] = {}
    for pair, name, dense in zip(pairs, names, references, strict=True):
        first, own = sums.setdefault(id(stored(*pair)), (name, _sums(pair, dense)))
        layers.append(
            {
                "name": name,
                "module": type(pair[0]).__name__,
                "shape": list(dense.shape),
                **_figures([own]),
                "tied_to": None if first == name else first,
            }
        )
    return LayerReport(layers, _figures([own for _, own in sums.values()]))


class _Sums:
    """Of one tensor, per output and per input: the inner products that the figures are made of."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self.entries = 0
        self.zeros = 0
        self.distortion = 0.0
        self.reference = 0.0
        # Rows of <p, p>, <p, r> and <r, r>.
        self.out = torch.zeros(3, outputs, dtype=torch.float64)
        self.into = torch.zeros(3, inputs, dtype=torch.float64)

    def alignments(self, products: Tensor) -> tuple[Tensor, int]:
        """The alignment of each unit that counts, and how many of these are dead."""
        pp, pr, rr = products[:, products[2] > 0]
        aligned = torch.where(pp > 0, pr / (pp.sqrt() * rr.sqrt()), 0.0).clamp_(-1, 1)
        return aligned, int((pp == 0).sum())


def _sums(pair: tuple[nn.Module, str], reference: Tensor) -> _Sums:
    weight, mask = stored(*pair).detach(), mask_of(*pair)
    if weight.dim() < 2:  # one unit
        weight, reference = weight.reshape(1, -1), reference.reshape(1, -1)
        mask = None if mask is None else mask.reshape(1, -1)
    elif unit_dimension(*pair) == 1:
        weight, reference = weight.transpose(0, 1), reference.transpose(0, 1)
        mask = None if mask is None else mask.transpose(0, 1)
    outputs, inputs = weight.shape[:2]
    sums = _Sums(outputs, inputs)
    sums.entries = weight.numel()
    rows = max(1, _CHUNK // max(1, weight[:1].numel()))
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        p = weight[part].double().reshape(-1, inputs, weight[:1].numel() // max(1, inputs))
        r = reference[part].to(p).reshape(p.shape)
        if mask is not None:
            p = p.masked_fill(mask[part].reshape(p.shape) == 0, 0.0)
        sums.zeros += int((p == 0).sum())
        sums.distortion += float((p - r).square_().sum())
        sums.reference += float(r.square().sum())
        for row, product in enumerate((p * p, p * r, r * r)):
            columns = (product.squeeze(2) if product.shape[2] == 1 else product.sum(2)).cpu()
            sums.out[row, part] = columns.sum(1)
            sums.into[row] += columns.sum(0)
    return sums


def _figures(parts: list[_Sums]) -> dict[str, Any]:
    entries = sum(part.entries for part in parts)
    zeros = sum(part.zeros for part in parts)
    reference = sum(part.reference for part in parts)
    out = [part.alignments(part.out) for part in parts]
    into = [part.alignments(part.into) for part in parts]
    mean_out, worst_out = _mean_and_worst([aligned for aligned, _ in out])
    mean_in, worst_in = _mean_and_worst([aligned for aligned, _ in into])
    return {
        "entries": entries,
        "zeros": zeros,
        "sparsity": zeros / entries if entries else 0.0,
        "mean_alignment": mean_out,
        "worst_alignment": worst_out,
        "mean_alignment_in": mean_in,
        "worst_alignment_in": worst_in,
        "distortion": sum(part.distortion for part in parts) / reference if reference else None,
        "dead_units_out": sum(dead for _, dead in out),
        "dead_units_in": sum(dead for _, dead in into),
    }


def _mean_and_worst(aligned: list[Tensor]) -> tuple[float | None, float | None]:
    every = torch.cat(aligned)
    return (float(every.mean()), float(every.min())) if every.numel() else (None, None)
