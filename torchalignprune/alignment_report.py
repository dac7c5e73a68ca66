"""Reports on what pruning did to each layer."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchalignprune import figures
from torchalignprune.checkpoints import empty_model, find_checkpoint_weights
from torchalignprune.dtensors import add_up, is_dtensor, local, own_indices, own_part, shard_dims
from torchalignprune.parameters import (
    Parameters,
    PrunableParameters,
    pairs_of,
    parameter_names,
    prunable_parameters,
)
from torchalignprune.pruned_files import open_weights
from torchalignprune.targets import PerParameter, Target, targets_of, with_references

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from rich.table import Table
    from torch.distributed.tensor import DTensor

__all__ = ["AlignmentReport", "alignment_report", "checkpoint_report"]

# The best match is decided in float32 if it wins by more than _CLEAR (TF32 has 10 bits), otherwise
# in float64, where differences below _TIE are ties.
_CLEAR, _TIE = 4e-3, 1e-9


class AlignmentReport(list[dict[str, Any]]):
    """A ``dict`` of figures for each parameter, and the same figures for all of them together.

    ``print(report)`` and ``rich.print(report)`` show a table.

    Attributes:
        totals: the figures for all parameters together, without ``name``, ``module``, ``shape`` and
            ``tied_to``.
        alignments: for each parameter, the alignments of the output units that count; float64.
    """

    totals: dict[str, Any]
    alignments: list[Tensor]

    def __init__(
        self, layers: list[dict[str, Any]], totals: dict[str, Any], alignments: list[Tensor]
    ) -> None:
        super().__init__(layers)
        self.totals = totals
        self.alignments = alignments

    def to_pandas(self) -> pandas.DataFrame:
        """The figures as a ``DataFrame`` with one row for each parameter, indexed by name.

        The totals are in ``attrs["totals"]`` of the frame. Figures that are None become NaN.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                'to_pandas needs pandas: pip install "torchalignprune[pandas]"'
            ) from error
        frame = pandas.DataFrame(list(self)).set_index("name")
        numbers = [key for key in self.totals if key in frame]
        frame[numbers] = frame[numbers].apply(pandas.to_numeric)
        frame.attrs["totals"] = dict(self.totals)
        return frame

    def to_json(self) -> str:
        """``{"totals": {...}, "layers": [{...}, ...]}`` as JSON; undefined figures are null."""
        return json.dumps({"totals": self.totals, "layers": list(self)}, indent=2, allow_nan=False)

    def plot(self, path: str | Path | None = None, title: str | None = None) -> Figure:
        """Plots mean unit alignment and sparsity by layer, and the spread of unit alignments.

        Args:
            path: where to save the figure, if anywhere. The suffix gives the format, as ``.png`` or
                ``.pdf``.
            title: of the figure. Default: the sparsity and the mean alignment.

        Returns:
            The figure, which is not registered with pyplot.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure: Figure = figures.draw_report(self, self._distinct(), title or self._summary())
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __str__(self) -> str:
        header, *rows = self._cells()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            ).rstrip()
            for row in (header, *rows)
        ]
        return "\n".join([*lines[:-1], "", lines[-1]])

    def __rich__(self) -> Table:
        from rich.table import Table

        header, *rows = self._cells()
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        table.add_column(header[0], overflow="fold", min_width=16)
        for column, *cells in list(zip(header, *rows, strict=True))[1:]:
            # Numbers are never cut, however narrow the terminal is.
            width = max(map(len, (*column.split(), *cells)))
            table.add_column(column.replace(" ", "\n"), justify="right", min_width=width)
        for row in (*rows[:-1], [], rows[-1]):
            table.add_row(*row)
        return table

    def __repr__(self) -> str:
        return f"AlignmentReport({len(self)} parameters: {self._summary()})"

    def _summary(self) -> str:
        mean = _figure(self.totals["mean_alignment"])
        return f"{self.totals['sparsity']:.1%} sparse, mean unit alignment {mean}"

    def _distinct(self) -> list[Tensor]:
        """The alignments of each distinct parameter: tied parameters count once."""
        pairs = zip(self, self.alignments, strict=True)
        return [aligned for layer, aligned in pairs if layer["tied_to"] is None]

    def _cells(self) -> list[list[str]]:
        header = ["parameter", "sparsity", "mean", "median", "p5", "worst", "distortion"]
        cells = [[*header, "dead out", "dead in", "moved"]]
        for layer in (*self, {"name": "all", **self.totals}):
            tied = layer.get("tied_to")
            cells.append(
                [
                    layer["name"] + (f" (tied to {tied})" if tied else ""),
                    f"{layer['sparsity']:.1%}",
                    *[_figure(layer[f"{what}_alignment"]) for what in header[2:6]],
                    _figure(layer["distortion"]),
                    str(layer["dead_units_out"]),
                    str(layer["dead_units_in"]),
                    "-" if layer["moved_share"] is None else f"{layer['moved_share']:.2%}",
                ]
            )
        return cells


def alignment_report(
    params: Parameters, reference: PerParameter | None = None, *, matching: bool = True
) -> AlignmentReport:
    r"""Sparsity, alignment, distortion and dead units of each parameter.

    The alignment of a unit is the cosine :math:`A = \langle p, r\rangle / (|p||r|)` of its pruned
    weights ``p`` and its reference ``r``. It is 0 if ``p`` is all zero; units whose reference is
    zero do not count. The distortion of a tensor is :math:`|P - R|_F^2 / |R|_F^2`. All sums are in
    float64.

    An output unit has moved if its pruned weights are better aligned with the reference of another
    unit of the same parameter than with its own. Units that are all zero have no direction and
    cannot move. To find the others takes :math:`U^2 d` multiplications for a parameter of ``U``
    units of ``d`` weights; the ``U x U`` products are never in memory all at once.

    If parameters are sharded (``DTensor``), every rank should call this, and all get the same
    report. The ranks exchange three numbers per unit.

    Args:
        params: ``(module, name)`` pairs, pruned or not.
        reference: the weights of the unpruned network, on any device: a
            :class:`torchalignprune.Reference`, any other mapping by ``(module, name)``, or tensors
            in the order of the parameters. Default: the weights under the masks (``name_orig``), or
            the weights themselves if they are not pruned. A reference is needed after a
            :class:`torchalignprune.Pruner`, which zeroes the weights under the masks, after
            ``prune.remove`` and after ``realign(..., "weights")``: the model then no longer holds
            the unpruned weights.
        matching: count the units that have moved.

    Returns:
        A list of JSON-serializable dicts with the keys

        - ``name``, ``module`` (its type) and ``shape``;
        - ``entries``, ``zeros`` (of the pruned weights) and ``sparsity``, their ratio;
        - ``mean_alignment``, ``median_alignment``, ``p5_alignment`` (the 5th percentile, linearly
          interpolated) and ``worst_alignment`` of the output units, and the same with the suffix
          ``_in`` of the input units; None if no unit counts;
        - ``distortion``; None if the reference is zero;
        - ``dead_units_out`` and ``dead_units_in``: units that are all zero although their reference
          is not;
        - ``moved_share``: the share of the nonzero output units that have moved. None without
          ``matching``, if there are no such units, and for sharded parameters, whose units would
          have to be compared across ranks;
        - ``tied_to``: the name of the earlier parameter that this one is tied to, or None.

        The attribute ``totals`` has the same figures for all parameters, in which tied parameters
        count once. Its means and percentiles are over all units, and its distortion is that of all
        tensors taken as one.

    Raises:
        TypeError: ``params`` are not pairs of a module and a name, or a reference is not a tensor.
        ValueError: there are no parameters, a reference is missing or of the wrong shape, or values
            are NaN or infinite. The error names the parameter.

    Warns:
        UserWarning: there is no reference, and all weights under the masks are zero.

    Example:
        >>> import torch, torchalignprune as tap
        >>> from torch import nn
        >>> from torch.nn.utils import prune
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0], [6.0, 8.0]]))
        >>> _ = prune.l1_unstructured(layer, "weight", amount=1)
        >>> report = tap.alignment_report([(layer, "weight")])
        >>> report[0]["sparsity"], report[0]["mean_alignment"], report[0]["worst_alignment"]
        (0.25, 0.9, 0.8)
        >>> report
        AlignmentReport(1 parameters: 25.0% sparse, mean unit alignment 0.900)
    """
    if not isinstance(matching, bool):
        raise TypeError(
            f"matching should be True or False, whether to count units that moved, got {matching!r}"
        )
    pairs = pairs_of(params)
    targets = with_references(targets_of(pairs), reference)

    def load(i: int) -> tuple[Tensor, Tensor | None, Tensor]:
        weight, own = targets[i].weight, targets[i].reference
        return weight, targets[i].mask, weight if own is None else own

    report = _report(pairs, targets, load, range(len(targets)), matching)
    if reference is None and report.totals["distortion"] == 0 and any(map(_prunes, targets)):
        warnings.warn(
            f"{targets[0].name} and all other parameters are zero under their masks, as a Pruner "
            "leaves them, so this report compares them with themselves: pass a reference",
            stacklevel=2,
        )
    return report


def _prunes(target: Target) -> bool:
    return target.mask is not None and target.remaining() < target.weight.numel()


def checkpoint_report(
    dense: str | Path,
    pruned: str | Path,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    matching: bool = True,
    progress: bool = False,
) -> tuple[AlignmentReport, PrunableParameters]:
    """:func:`alignment_report` of a pruned Transformers checkpoint folder against a dense one.

    Neither model is loaded. The pruned checkpoint's config gives the parameters, as a model on the
    meta device. Their weights are read from memory-mapped files one at a time, so the models may be
    larger than the memory. Checkpoints may consist of several files and have any floating-point
    dtype. The dense checkpoint may be of the base model or of another task, as for
    :meth:`torchalignprune.Reference.from_checkpoint`.

    Args:
        dense: the folder of the unpruned model.
        pruned: the folder of the pruned one, with zeros in its weights or with masks
            (``name_orig`` and ``name_mask``).
        include: as in :func:`torchalignprune.prunable_parameters`.
        exclude: as in :func:`torchalignprune.prunable_parameters`.
        matching: as in :func:`alignment_report`.
        progress: show a progress bar.

    Returns:
        The report and its parameters, whose modules are on the meta device.

    Raises:
        ValueError: a folder is not such a checkpoint; parameters are missing in one of them or have
            another shape there (all are listed); or values are NaN or infinite.
        ImportError: transformers or safetensors is not installed, or tqdm for the progress bar.
    """
    params = prunable_parameters(empty_model(Path(pruned)), include, exclude)
    targets = targets_of(params)
    name_of = dict(zip(params, params.names, strict=True))
    names = [[name_of[place] for place in target.places] for target in targets]
    shapes = [tuple(target.weight.shape) for target in targets]
    files = [open_weights(pruned), open_weights(dense)]
    keys = [find_checkpoint_weights(file, names, shapes) for file in files]

    def load(i: int) -> tuple[Tensor, Tensor | None, Tensor]:
        weight, reference = (file[own[i]] for file, own in zip(files, keys, strict=True))
        plain = keys[0][i].removesuffix("_orig")
        masked = plain != keys[0][i] and f"{plain}_mask" in files[0]
        return weight, files[0][f"{plain}_mask"] if masked else None, reference

    order: Iterable[int] = range(len(targets))
    if progress:
        from tqdm import tqdm

        order = tqdm(order, desc="comparing", unit="matrix", leave=False)
    return _report(params, targets, load, order, matching), params


def _report(
    pairs: list[Any],
    targets: Sequence[Target],
    load: Callable[[int], tuple[Tensor, Tensor | None, Tensor]],
    order: Iterable[int],
    matching: bool,
) -> AlignmentReport:
    measured = {i: _measure(targets[i], *load(i), matching) for i in order}
    at = {place: i for i, target in enumerate(targets) for place in target.places}
    layers, alignments = [], []
    first: dict[int, str] = {}
    for pair, name in zip(pairs, parameter_names(pairs), strict=True):
        i = at[pair[0], pair[1]]
        tied_to = first.setdefault(i, name)
        layers.append(
            {
                "name": name,
                "module": type(pair[0]).__name__,
                "shape": list(targets[i].weight.shape),
                **_figures([measured[i]]),
                "tied_to": None if tied_to == name else tied_to,
            }
        )
        alignments.append(measured[i].alignments(measured[i].out))
    return AlignmentReport(layers, _figures(list(measured.values())), alignments)


class _Sums:
    """The inner products that the figures of one tensor are made of, per output and per input."""

    def __init__(self, weight: Tensor) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=weight.device)
        self.entries = weight.numel()
        self.nonzero = zero.long()
        self.distortion = zero.clone()
        # Rows of <p, p>, <p, r> and <r, r>.
        self.out = zero.new_zeros(3, weight.shape[0])
        self.into = zero.new_zeros(3, weight.shape[1])
        # How many output units have moved; None if they were not counted.
        self.moved: int | None = None

    def of_all_ranks(self, whole: DTensor, out_dim: int) -> _Sums:
        """The sums of the whole tensor, from the sums of each rank's part."""
        sums = _Sums(torch.empty(0, 0, device=local(whole).device))
        sums.entries = whole.numel()
        positions = [own_indices(whole, dim) for dim in range(min(2, whole.dim()))]
        lengths = list(whole.shape[:2])
        if whole.dim() < 2:  # one unit
            positions, lengths = [torch.zeros(1, dtype=torch.long), *positions], [1, *lengths]
        elif out_dim == 1:
            positions, lengths = positions[::-1], lengths[::-1]
        parts = [torch.stack([self.nonzero.double(), self.distortion])]
        for own, index, length in zip((self.out, self.into), positions, lengths, strict=True):
            part = own.new_zeros(3, length)
            part[:, index.to(part.device)] = own
            parts.append(part.flatten())
        dims = [i for i, _ in shard_dims(whole)]
        total = add_up(torch.cat(parts), whole.device_mesh, dims)
        counts, out, into = total.split([part.numel() for part in parts])
        sums.nonzero, sums.distortion = counts[0].round().long(), counts[1]
        sums.out, sums.into = out.reshape(3, -1), into.reshape(3, -1)
        return sums

    @property
    def live(self) -> Tensor:
        """Which outputs are nonzero both in the pruned network and in the reference."""
        return (self.out[[0, 2]] > 0).all(0)

    @staticmethod
    def alignments(products: Tensor) -> Tensor:
        """The alignment of each unit whose reference is not zero."""
        pp, pr, rr = products[:, products[2] > 0]
        return torch.where(pp > 0, pr / pp * (pp / rr).sqrt(), 0.0).clamp_(-1, 1)

    @staticmethod
    def dead(products: Tensor) -> int:
        return int(((products[0] == 0) & (products[2] > 0)).sum())


@torch.no_grad()
def _measure(
    target: Target, weight: Tensor, mask: Tensor | None, reference: Tensor, matching: bool
) -> _Sums:
    """The sums of one parameter, given in the module's layout, maybe on another device."""
    whole = weight
    if is_dtensor(weight):
        mask = None if mask is None else own_part(mask, weight, f"the mask of {target.name}")
        reference = own_part(reference, weight, f"the reference of {target.name}")
        weight, matching = local(weight), False
    if weight.dim() < 2:  # one unit
        weight, reference = weight.reshape(1, -1), reference.reshape(1, -1)
        mask = None if mask is None else mask.reshape(1, -1)
    elif target.out_dim == 1:
        weight, reference = weight.transpose(0, 1), reference.transpose(0, 1)
        mask = None if mask is None else mask.transpose(0, 1)
    outputs, inputs = weight.shape[:2]
    size = weight[:1].numel()
    sums = _Sums(weight)
    rows = max(1, _chunk(weight) // max(1, size))
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, outputs if size else 0, rows):
            part = slice(start, start + rows)
            p = _masked(weight, mask, part).double().reshape(-1, inputs, size // inputs)
            r = reference[part].to(p).reshape(p.shape)
            sums.nonzero += p.count_nonzero()
            sums.distortion += (p - r).square_().sum()
            for row, product in enumerate((p * p, p * r, r * r)):
                columns = product.squeeze(2) if product.shape[2] == 1 else product.sum(2)
                sums.out[row, part] = columns.sum(1)
                sums.into[row] += columns.sum(0)
        if is_dtensor(whole):
            sums = sums.of_all_ranks(whole, target.out_dim)
        if whole.dim() < 2:  # one unit on either side
            sums.into = sums.out.clone()
        for row, what in ((0, "weights"), (2, "reference")):
            if not bool(sums.out[row].isfinite().all()):
                raise ValueError(
                    f"the {what} of {target.name} should be finite numbers, got NaN or infinity"
                )
        if matching:
            sums.moved = _moved(weight, mask, reference, sums)
    sums.out, sums.into = sums.out.cpu(), sums.into.cpu()
    return sums


def _chunk(weight: Tensor) -> int:
    """How many entries to take at a time: what fits a core's cache, or what keeps a GPU busy.

    torch uses one thread for so few on a CPU, which is cheaper than synchronizing two.
    """
    return 1 << (15 if weight.device.type == "cpu" else 24)


def _masked(weight: Tensor, mask: Tensor | None, part: slice | Tensor) -> Tensor:
    return weight[part] if mask is None else weight[part].masked_fill(mask[part] == 0, 0.0)


def _moved(weight: Tensor, mask: Tensor | None, reference: Tensor, sums: _Sums) -> int:
    """How many output units are better aligned with another's reference than with their own."""
    own_scale, other_scale = (
        torch.where(squares > 0, squares.rsqrt(), 0) for squares in (sums.out[0], sums.out[2])
    )
    absent = sums.out[2] == 0
    any_absent = bool(absent.any())
    side = max(1, math.isqrt(16 * _chunk(weight)))

    def gaps(part: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """By how much the best other reference exceeds its own in each unit's alignment."""
        p = _masked(weight, mask, part).to(dtype).flatten(1) * own_scale[part].to(dtype)[:, None]
        units = torch.arange(len(weight), device=weight.device)[part]
        own, best = p.new_zeros(len(p)), p.new_full((len(p),), -2.0)
        for start in range(0, len(weight), side):
            others = slice(start, start + side)
            cosines = p @ reference[others].to(p).flatten(1).t()
            cosines *= other_scale[others].to(dtype)
            if any_absent:
                cosines[:, absent[others]] = -2.0
            here = ((units >= start) & (units < start + side)).nonzero().flatten()
            at = units[here] - start
            own[here] = cosines[here, at]
            cosines[here, at] = -2.0
            best = torch.maximum(best, cosines.amax(1))
        return (best - own)[sums.live[part]]

    moved = 0
    for start in range(0, len(weight), side):
        part = slice(start, start + side)
        gap = gaps(part, torch.float32)
        moved += int((gap > _CLEAR).sum())
        close = sums.live[part].nonzero().flatten()[~(gap.abs() > _CLEAR)] + start
        if len(close):
            moved += int((gaps(close, torch.float64) > _TIE).sum())
    return moved


def _figures(parts: list[_Sums]) -> dict[str, Any]:
    entries = sum(part.entries for part in parts)
    zeros = entries - sum(int(part.nonzero) for part in parts)
    distortion = sum(float(part.distortion) for part in parts)
    reference = sum(float(part.out[2].sum()) for part in parts)
    looked = [part for part in parts if part.moved is not None]
    live = sum(int(part.live.sum()) for part in looked)
    moved = [part.moved for part in looked if part.moved is not None]
    return {
        "entries": entries,
        "zeros": zeros,
        "sparsity": zeros / entries if entries else 0.0,
        **_spread([part.alignments(part.out) for part in parts], ""),
        **_spread([part.alignments(part.into) for part in parts], "_in"),
        "distortion": distortion / reference if reference else None,
        "dead_units_out": sum(part.dead(part.out) for part in parts),
        "dead_units_in": sum(part.dead(part.into) for part in parts),
        "moved_share": sum(moved) / live if moved and live else None,
    }


def _spread(aligned: list[Tensor], suffix: str) -> dict[str, float | None]:
    every = torch.cat(aligned).numpy()
    keys = [f"{what}_alignment{suffix}" for what in ("mean", "median", "p5", "worst")]
    if not every.size:
        return dict.fromkeys(keys)
    median, p5 = np.quantile(every, [0.5, 0.05])
    values = (every.mean(), median, p5, every.min())
    return {key: float(value) for key, value in zip(keys, values, strict=True)}


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
