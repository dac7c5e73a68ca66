"""The operators of the C++/CUDA extension, as Python functions.

They are registered as ``torch.ops.torchalignprune.*`` with fake kernels, so they work under
``torch.compile``. Operators that choose masks have no gradient. :func:`apply_mask` can be
differentiated any number of times, and so can :func:`unit_products` and :func:`unit_combination`,
which the regularizers are made of, but only in reverse mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchalignprune import _C  # noqa: F401  (loading it registers the operators)

Score = Literal["value", "magnitude", "worth"]

__all__ = [
    "apply_mask",
    "cosine_gains",
    "count_bits",
    "greedy_match",
    "masked_weight",
    "match_in_order",
    "pack_entries",
    "select_global",
    "select_rows",
    "shard_counts",
    "shard_masks",
    "shard_ties",
    "square_sums",
    "unit_combination",
    "unit_products",
    "unpack_entries",
    "zero_pruned_",
]


def select_global(
    weights: Sequence[Tensor],
    count: int,
    *,
    score: Score = "magnitude",
    masks: Sequence[Tensor | None] | None = None,
    references: Sequence[Tensor | None] | None = None,
    row_scales: Sequence[Tensor | None] | None = None,
    column_scales: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Masks that prune exactly ``count`` entries of all the tensors together: the lowest scores.

    Among equal scores the lower position is pruned first: earlier tensors before later ones, then
    by flat index. The tensors are streamed, never concatenated, copied or sorted, and the result
    does not depend on the number of threads. A tensor is read as rows (dim 0) and columns (dim 1);
    trailing dimensions share their column's scale, and a tensor of at most one dimension is a
    single row.

    Equivalent to::

        scores = torch.cat([score(w).flatten() for w in weights])
        mask = torch.ones_like(scores, dtype=torch.bool)
        mask[torch.sort(scores, stable=True).indices[:count]] = False

    Args:
        weights: tensors of any shape and strides, float32, float64, float16 or bfloat16, all on
            one device. Scores are computed in float32, or in float64 if any tensor is float64.
        count: how many entries to prune, of those that ``masks`` leave.
        score: ``"value"``: the entries themselves, with their sign; ``"magnitude"``: ``|v|``;
            ``"worth"``: ``v * (2 * u - v)``; where ``v = w * row_scale * column_scale`` and
            ``u = reference * row_scale * column_scale``.
        masks: bool, shaped like the weights; entries that are False are no candidates and stay
            False. Default: none.
        references: shaped like the weights, for ``"worth"``. Default: the weights.
        row_scales: shape ``(rows,)`` or ``(1,)`` each, in the dtype of the scores. Default: 1.
        column_scales: shape ``(columns,)`` or ``(1,)`` each, likewise. Default: 1.
        names: what to call the tensors in an error. Default: ``weights[i]``.

    Returns:
        bool masks with the shapes and strides of the weights, True where an entry is kept.

    Raises:
        ValueError: NaN among the scores; ``count`` negative or larger than the number of
            candidates; a shape or device that does not fit.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> select_global([torch.tensor([3.0, -1.0]), torch.tensor([[2.0], [1.0]])], 2)
        [tensor([ True, False]), tensor([[ True],
                [False]])]
    """
    if not weights:
        if count != 0:
            raise ValueError(f"count={count} should be 0 when there are no weights")
        return []
    *lists, named = _score_arguments(weights, masks, references, row_scales, column_scales, names)
    return list(torch.ops.torchalignprune.select_global(*lists, named, count, score))


def _score_arguments(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    references: Sequence[Tensor | None] | None,
    row_scales: Sequence[Tensor | None] | None,
    column_scales: Sequence[Tensor | None] | None,
    names: Sequence[str] | None,
) -> tuple[Any, ...]:
    """The arguments, with the defaults filled in."""
    none = [None] * len(weights)
    return (
        [w.detach() for w in weights],
        list(masks) if masks is not None else none,
        none if references is None else [None if r is None else r.detach() for r in references],
        list(row_scales) if row_scales is not None else none,
        list(column_scales) if column_scales is not None else none,
        list(names) if names is not None else [f"weights[{i}]" for i in range(len(weights))],
    )


def shard_counts(
    weights: Sequence[Tensor],
    low: int,
    shift: int,
    bins: int,
    *,
    score: Score = "magnitude",
    masks: Sequence[Tensor | None] | None = None,
    references: Sequence[Tensor | None] | None = None,
    row_scales: Sequence[Tensor | None] | None = None,
    column_scales: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """How many candidates have keys in each of ``bins`` bins of ``2**shift`` keys from ``low`` on.

    A key is an unsigned integer of 32 bits (64 if a tensor is float64) that orders as its score
    does: the bits of the score with the sign bit flipped, all bits flipped if it is negative; -0
    has the key of +0. Processes that hold shards of the same tensors add up their counts, and so
    find in a few rounds the key of the last entry to prune, for :func:`shard_masks`.

    Args:
        weights: at least one tensor, as in :func:`select_global`; tensors may be empty.
        low: the first key that is counted in a bin.
        shift: bins are ``2**shift`` keys wide.
        bins: the number of bins, at most 2048; those beyond the last key stay empty.
        score: as in :func:`select_global`.
        masks: as in :func:`select_global`.
        references: as in :func:`select_global`.
        row_scales: as in :func:`select_global`.
        column_scales: as in :func:`select_global`.
        names: as in :func:`select_global`.

    Returns:
        int64, shape ``(bins + 2,)``, on the device of the weights: the bins, then how many
        candidates have keys below ``low``, then 0, or if candidates' scores are NaN, 1 + the index
        of the first tensor that has one.

    Raises:
        ValueError: a shape or device that does not fit; ``low``, ``shift`` or ``bins`` out of
            range; no weights.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> one = 0x3F800000 | 1 << 31  # the key of 1
        >>> shard_counts([torch.tensor([0.5, -1.0, 1.0, 1.9, 2.0])], one, 23, 2)
        tensor([3, 1, 1, 0])
    """
    if not weights:
        raise ValueError("weights should have at least one tensor, got none")
    lists = _score_arguments(weights, masks, references, row_scales, column_scales, names)
    counts: Tensor = torch.ops.torchalignprune.shard_counts(
        *lists, score, _signed(low), shift, bins
    )
    return counts


def shard_ties(
    weights: Sequence[Tensor],
    key: int,
    edges: Sequence[Tensor],
    *,
    score: Score = "magnitude",
    masks: Sequence[Tensor | None] | None = None,
    references: Sequence[Tensor | None] | None = None,
    row_scales: Sequence[Tensor | None] | None = None,
    column_scales: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """How many candidates have exactly the given key, in each of the given stretches.

    Args:
        weights: at least one tensor, as in :func:`shard_counts`.
        key: as in :func:`shard_counts`.
        edges: for each tensor ascending flat indices, int64, shape ``(stretches + 1,)``, on the
            CPU: a stretch reaches from one edge to just before the next. Entries before the first
            edge and from the last edge on are not counted.
        score: as in :func:`select_global`.
        masks: as in :func:`select_global`.
        references: as in :func:`select_global`.
        row_scales: as in :func:`select_global`.
        column_scales: as in :func:`select_global`.
        names: as in :func:`select_global`.

    Returns:
        int64, shape ``(stretches,)``, in the order of the tensors, on the device of the weights.

    Raises:
        ValueError: a shape or device that does not fit; a key of too many bits; no weights.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> one = 0x3F800000 | 1 << 31
        >>> shard_ties([torch.tensor([1.0, -1.0, 2.0, 1.0])], one, [torch.tensor([0, 2, 4])])
        tensor([2, 1])
    """
    if not weights:
        raise ValueError("weights should have at least one tensor, got none")
    lists = _score_arguments(weights, masks, references, row_scales, column_scales, names)
    counts: Tensor = torch.ops.torchalignprune.shard_ties(*lists, score, _signed(key), list(edges))
    return counts


def shard_masks(
    weights: Sequence[Tensor],
    key: int,
    splits: Sequence[int],
    *,
    score: Score = "magnitude",
    masks: Sequence[Tensor | None] | None = None,
    references: Sequence[Tensor | None] | None = None,
    row_scales: Sequence[Tensor | None] | None = None,
    column_scales: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Masks that prune the candidates with keys below ``key``, and the first ones with that key.

    Args:
        weights: at least one tensor, as in :func:`shard_counts`, without NaN among the scores of
            the candidates.
        key: as in :func:`shard_counts`.
        splits: for each tensor a flat index: candidates before it that have the key are pruned.
        score: as in :func:`select_global`.
        masks: as in :func:`select_global`.
        references: as in :func:`select_global`.
        row_scales: as in :func:`select_global`.
        column_scales: as in :func:`select_global`.
        names: as in :func:`select_global`.

    Returns:
        bool masks with the shapes and strides of the weights, True where an entry is kept.

    Raises:
        ValueError: a shape or device that does not fit; a key of too many bits; no weights.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> one = 0x3F800000 | 1 << 31
        >>> shard_masks([torch.tensor([1.0, -0.5, -1.0, 2.0])], one, [2])
        [tensor([False, False,  True,  True])]
    """
    if not weights:
        raise ValueError("weights should have at least one tensor, got none")
    lists = _score_arguments(weights, masks, references, row_scales, column_scales, names)
    return list(torch.ops.torchalignprune.shard_masks(*lists, score, _signed(key), list(splits)))


def _signed(key: int) -> int:
    """A key of 64 bits as the int64 with the same bits."""
    if not -(1 << 63) <= key < 1 << 64:
        raise ValueError(f"key should have at most 64 bits, got {key}")
    return key - (1 << 64) if key >= 1 << 63 else key


def select_rows(
    scores: Tensor, counts: Tensor, *, mask: Tensor | None = None, name: str = "scores"
) -> Tensor:
    """A mask that prunes exactly ``counts[i]`` entries of row ``i``: the lowest scores of the row.

    Among equal scores the lower column is pruned first.

    Args:
        scores: shape ``(rows, columns)``, any strides, float32, float64, float16 or bfloat16.
        counts: shape ``(rows,)``, int64.
        mask: bool, shaped like the scores; False entries are no candidates and stay False.
        name: what to call the tensor in an error.

    Returns:
        bool, shape ``(rows, columns)``, contiguous, True where an entry is kept.

    Raises:
        ValueError: NaN among the scores; a count larger than its row's number of candidates; a
            shape or device that does not fit.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> select_rows(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), torch.tensor([1, 2]))
        tensor([[ True, False,  True],
                [False, False,  True]])
    """
    kept: Tensor = torch.ops.torchalignprune.select_rows(scores.detach(), mask, counts, name)
    return kept


def cosine_gains(
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    reference: Tensor | None = None,
    column_scale: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    r"""What each entry adds to its unit's alignment, taken in descending order of importance.

    A unit is a row (dim 0, the rest flattened; a tensor of at most one dimension is one unit). Its
    alignment with the reference ``r`` under a mask ``m`` is :math:`A(m) = \langle p, r\rangle /
    (|p||r|)` with :math:`p = m w`. For ``reference=None`` (``r = w``) the entry of the k-th largest
    magnitude is worth

    .. math:: g_k = \frac{w_k^2}{(\sqrt{C_k} + \sqrt{C_{k-1}})\,|w|},
              \qquad C_k = \sum_{i \le k} w_i^2.

    Gains fall within a unit, so keeping the K largest of a whole network maximises its summed
    alignment (marginal analysis, Fox 1966). For another reference each next entry is the one that
    aligns best together with those before it: the largest :math:`(d + w r) / \sqrt{q + w^2}`, with
    :math:`d = \langle w, r\rangle` and :math:`q = \langle w, w\rangle` over those before it (a
    quarter as many entries at once as there are before). The gains are then the differences not of
    ``A`` but of its least concave majorant. Sums are in float64.

    Args:
        weight: any shape and strides, float32, float64, float16 or bfloat16.
        mask: bool, shaped like the weight; False entries are no candidates (their gain is 0), but
            :math:`|r|` is still that of the whole unit.
        reference: shaped like the weight, any of the dtypes. Default: the weight.
        column_scale: shape ``(columns,)`` or ``(1,)``, in the dtype of the gains; multiplies the
            weight and the reference, column by column (dim 1).
        name: what to call the tensor in an error.

    Returns:
        The gains, float32 (float64 for a float64 weight), with the shape and strides of the weight.
        0 throughout a unit whose reference is zero.

    Raises:
        ValueError: NaN or infinity; a shape or device that does not fit.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> cosine_gains(torch.tensor([[3.0, -4.0], [0.0, 2.0]]))
        tensor([[0.2000, 0.8000],
                [0.0000, 1.0000]])
    """
    gains: Tensor = torch.ops.torchalignprune.cosine_gains(
        weight.detach(),
        mask,
        None if reference is None else reference.detach(),
        column_scale,
        name,
    )
    return gains


def greedy_match(similarity: Tensor, *, name: str = "similarity") -> Tensor:
    """Match rows with columns: the largest entry first, then the largest of what is left.

    The row and the column of a matched entry are struck. Among equal entries the lowest row comes
    first, then the lowest column; -0 and 0 are equal. The result is that of the sequential
    definition, on every device and with any number of threads. For non-negative entries the sum of
    the matched ones is at least half of the largest possible sum.

    Equivalent to::

        index = torch.full((U,), -1)
        while similarity.numel() and similarity.max() > -inf:
            i, j = divmod(int(similarity.argmax()), V)
            index[i] = j
            similarity[i, :] = similarity[:, j] = -inf

    Args:
        similarity: shape ``(..., U, V)``, float32, float64, float16 or bfloat16; copied if it is
            not contiguous. -inf forbids a pair, inf is larger than every number.
        name: what to call the tensor in an error.

    Returns:
        int64, shape ``(..., U)``: the column that each row is matched with, -1 for none.

    Raises:
        ValueError: NaN; fewer than two dimensions.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> greedy_match(torch.tensor([[0.9, 0.8, 0.1], [1.0, 0.2, 0.3]]))
        tensor([1, 0])
    """
    index: Tensor = torch.ops.torchalignprune.greedy_match(similarity.detach(), name)
    return index


@torch.library.register_fake("torchalignprune::greedy_match")
def _(similarity: Tensor, name: str) -> Tensor:
    return similarity.new_empty(similarity.shape[:-1], dtype=torch.int64)


def match_in_order(rows: Tensor, columns: Tensor, row_count: int, column_count: int) -> Tensor:
    """Go through pairs and keep each whose row and column are in no pair kept before.

    If the pairs are in descending order of similarity, these are the ones that :func:`greedy_match`
    matches. It takes one pass on the CPU; pairs on another device are copied there.

    Args:
        rows: shape ``(n,)``, int64, in ``[0, row_count)``.
        columns: shape ``(n,)``, int64, in ``[0, column_count)``.
        row_count: how many rows there are.
        column_count: how many columns there are.

    Returns:
        bool, shape ``(n,)``, on the device of the pairs.

    Raises:
        ValueError: a shape that does not fit, or a row or column out of range.
        TypeError: not int64.

    Example:
        >>> import torch
        >>> match_in_order(torch.tensor([0, 1, 1]), torch.tensor([2, 2, 0]), 2, 3)
        tensor([ True, False,  True])
    """
    kept: Tensor = torch.ops.torchalignprune.match_in_order(
        rows.cpu(), columns.cpu(), row_count, column_count
    )
    return kept.to(rows.device)


@torch.library.register_fake("torchalignprune::match_in_order")
def _(rows: Tensor, columns: Tensor, row_count: int, column_count: int) -> Tensor:
    return torch.empty_like(rows, dtype=torch.bool, memory_format=torch.contiguous_format)


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight where a mask is True, and +0 elsewhere.

    A pruned entry is +0 whatever its weight, while ``weight * mask`` gives -0 for a negative number
    and NaN for NaN and infinity. The gradient is the same operator on the gradient of the product
    (in place if nothing else uses that), and so are all higher ones. Forward-mode derivatives and
    the transforms of ``torch.func`` work.

    Equivalent to::

        torch.where(mask, weight, 0)

    Args:
        weight: any shape and strides, float32, float64, float16 or bfloat16.
        mask: bool, shaped like the weight, any strides.

    Returns:
        The product, with the dtype, shape and strides of the weight (those of
        ``torch.empty_like``).

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> apply_mask(torch.tensor([1.0, -2.0]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    product: Tensor = torch.ops.torchalignprune.apply_mask(weight, mask)
    return product


@torch.library.register_fake("torchalignprune::apply_mask")
def _(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(weight)


def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """:func:`apply_mask` for the forward of a layer: no product if the weight is masked already.

    On the CPU the weight is checked first. If it is +0 wherever the mask is False, as after
    :func:`zero_pruned_`, the result shares its memory: nothing is written, and no memory is taken
    until the backward. Gradients are those of :func:`apply_mask`. On a GPU, where checking would
    mean waiting, it is always a product. Under ``torch.compile`` and ``torch.export`` and for
    subclasses of ``Tensor`` the product is ``torch.where``, which compilers can fuse.

    Args:
        weight: as in :func:`apply_mask`.
        mask: as in :func:`apply_mask`.

    Returns:
        The product, or another tensor with the memory of the weight: never a parameter, and always
        equal to ``apply_mask(weight, mask)``.

    Raises:
        ValueError: as :func:`apply_mask`.
        TypeError: as :func:`apply_mask`.

    Example:
        >>> import torch
        >>> mask = torch.tensor([True, False])
        >>> masked_weight(torch.tensor([1.0, 2.0]), mask)
        tensor([1., 0.])
        >>> weight = torch.tensor([1.0, 0.0])
        >>> masked_weight(weight, mask).data_ptr() == weight.data_ptr()
        True
    """
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    plain = type(weight) in (Tensor, torch.nn.Parameter) and type(mask) is Tensor
    if traced or not plain:
        return torch.where(mask, weight, 0)
    product: Tensor = torch.ops.torchalignprune.masked_weight(weight, mask)
    return product


def zero_pruned_(
    tensors: Sequence[Tensor], masks: Sequence[Tensor], *, names: Sequence[str] | None = None
) -> None:
    """Set the entries of tensors to +0 where their mask is False, in place.

    For stored weights and optimizer states. Whatever was there, NaN, infinity and -0 too, becomes
    +0. In stretches without pruned entries only the mask is read, and nothing is written where
    there is +0 already. Runs under ``torch.no_grad()``, like an optimizer's step, and increments
    the tensors' version counters. A GPU takes a few launches for all tensors.

    Equivalent to::

        for tensor, mask in zip(tensors, masks):
            tensor.masked_fill_(~mask, 0)

    Args:
        tensors: any shapes and strides (without entries that share memory), float32, float64,
            float16 or bfloat16, all on one device. Changed.
        masks: bool, shaped like the tensors, any strides.
        names: what to call the tensors in an error. Default: ``tensors[i]``.

    Raises:
        ValueError: a shape, device or length that does not fit; an expanded tensor. Raised before
            anything has changed.
        TypeError: a dtype that does not fit; likewise.

    Example:
        >>> import torch
        >>> momentum = torch.tensor([1.0, -2.0, float("nan")])
        >>> zero_pruned_([momentum], [torch.tensor([True, False, False])])
        >>> momentum
        tensor([1., 0., 0.])
    """
    names = [f"tensors[{i}]" for i in range(len(tensors))] if names is None else list(names)
    if not tensors and not masks:
        return
    with torch.no_grad():
        torch.ops.torchalignprune.zero_pruned_(list(tensors), list(masks), names)


@torch.library.register_fake("torchalignprune::zero_pruned_")
def _(tensors: list[Tensor], masks: list[Tensor], names: list[str]) -> None:
    return None


def pack_entries(
    weight: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One bit for each entry, and the values of those whose bit is set.

    Entries are numbered in row-major order; entry ``i`` has bit ``i % 8``, counted from the lowest,
    of byte ``i // 8``, and the bits past the last are 0. Values are copied bit for bit: NaN keep
    their payloads, and zeros their sign. On the CPU only.

    Args:
        weight: any shape and strides, float32, float64, float16 or bfloat16.
        mask: bool, shaped like the weight: the entries whose bit is set. Default: those that are
            not zero.

    Returns:
        ``bits``, uint8, shape ``(ceil(n / 8),)``; ``values``, shape ``(count,)``, in the dtype of
        the weight; ``signs``, uint8, shape ``(ceil((n - count) / 8),)``: a bit for each other
        entry, in order, set if that is -0.0, or of shape ``(0,)`` if none is; ``lost``, int64,
        shape ``()``: how many of the other entries are not zero. If any is, values and signs are
        empty.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> bits, values, signs, lost = pack_entries(torch.tensor([0.0, 3.0, -0.0, 1.0]))
        >>> f"{int(bits):04b}", values, f"{int(signs):02b}", int(lost)
        ('1010', tensor([3., 1.]), '10', 0)
    """
    bits, values, signs, lost = torch.ops.torchalignprune.pack_entries(weight.detach(), mask)
    return bits, values, signs, lost


@torch.library.register_fake("torchalignprune::pack_entries")
def _(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    return (
        weight.new_empty((weight.numel() + 7) // 8, dtype=torch.uint8),
        weight.new_empty(context.new_dynamic_size()),
        weight.new_empty(context.new_dynamic_size(), dtype=torch.uint8),
        weight.new_empty((), dtype=torch.int64),
    )


def unpack_entries(bits: Tensor, values: Tensor, signs: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor that :func:`pack_entries` has packed, contiguous.

    Args:
        bits: uint8, shape ``(ceil(n / 8),)``.
        values: shape ``(count,)``, float32, float64, float16 or bfloat16.
        signs: uint8, shape ``(ceil((n - count) / 8),)`` or ``(0,)``.
        shape: the shape of the result, of n entries.

    Raises:
        ValueError: a shape that does not fit, another number of values than of set bits, or bits
            set past the last.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> bits = torch.tensor([0b1010], dtype=torch.uint8)
        >>> unpack_entries(bits, torch.tensor([3.0, 1.0]), bits.new_empty(0), (2, 2))
        tensor([[0., 3.],
                [0., 1.]])
    """
    made: Tensor = torch.ops.torchalignprune.unpack_entries(bits, values, signs, shape)
    return made


@torch.library.register_fake("torchalignprune::unpack_entries")
def _(bits: Tensor, values: Tensor, signs: Tensor, shape: Sequence[int]) -> Tensor:
    return values.new_empty(shape)


def count_bits(bits: Tensor, count: int) -> int:
    """How many of the first ``count`` bits are set.

    Args:
        bits: uint8, shape ``(ceil(count / 8),)``.
        count: how many bits there are.

    Raises:
        ValueError: another shape, or bits set past the last.
        TypeError: another dtype.

    Example:
        >>> import torch
        >>> count_bits(torch.tensor([0b101], dtype=torch.uint8), 3)
        2
    """
    return int(torch.ops.torchalignprune.count_bits(bits, count))


@torch.library.register_fake("torchalignprune::count_bits")
def _(bits: Tensor, count: int) -> Tensor:
    return bits.new_empty((), dtype=torch.int64)


def square_sums(
    weight: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    all_columns: int | None = None,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """The sums of squares of a tensor's rows and of its columns, in one pass.

    Sums are in float64 and in an order that does not depend on the number of threads.

    Equivalent to::

        squares = (weight.double() * row_scale[:, None] * column_scale) ** 2
        squares.sum(dim=1), squares.sum(dim=0)

    Args:
        weight: any shape and strides, float32, float64, float16 or bfloat16; read as rows and
            columns as in :func:`select_global`.
        row_scale: shape ``(rows,)`` or ``(1,)``, float32 (float64 for a float64 weight).
        column_scale: shape ``(columns,)`` or ``(1,)``, likewise.
        all_columns: if these are only some columns of a tensor, how many that has: the sums of the
            columns are then bit for bit those of the whole tensor. (The sum of a row never depends
            on other rows.) Default: as many as the weight.
        name: what to call the tensor in an error.

    Returns:
        float64, shapes ``(rows,)`` and ``(columns,)``; ``(1,)`` and ``(0,)`` for a tensor of at
        most one dimension.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype that does not fit.

    Example:
        >>> import torch
        >>> square_sums(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        (tensor([5., 9.], dtype=torch.float64), tensor([10.,  4.], dtype=torch.float64))
    """
    sums: tuple[Tensor, Tensor] = torch.ops.torchalignprune.square_sums(
        weight.detach(), row_scale, column_scale, name, all_columns
    )
    return sums


@torch.library.register_fake("torchalignprune::square_sums")
def _(
    weight: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    name: str,
    all_columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    rows = 1 if weight.dim() < 2 else weight.size(0)
    columns = 0 if weight.dim() < 2 else weight.size(1)
    sums = weight.new_empty(rows + columns, dtype=torch.float64)
    return sums[:rows].clone(), sums[rows:].clone()


def unit_products(
    weights: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None] | None = None,
    references: Sequence[Tensor | None] | None = None,
    indices: Sequence[Tensor | None] | None = None,
    dims: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    r"""The inner products of the units of all tensors, from which alignment and distortion follow.

    For each unit :math:`\langle p, p\rangle`, :math:`\langle p, r\rangle` and
    :math:`\langle r, r\rangle`, where :math:`p = m w` are its pruned and ``r`` its reference
    weights.

    It takes one pass over the tensors, with sums in float64 and in an order that does not depend on
    the number of threads. :func:`unit_combination` computes the gradient of the weights, for which
    only the inputs are saved.

    Equivalent to, for each tensor::

        p = torch.where(mask, weight, 0).double().movedim(dim, 0).flatten(1)
        r = reference.double().movedim(dim, 0).flatten(1)[index]
        torch.stack([(p * p).sum(1), (p * r).sum(1), (r * r).sum(1)])

    Args:
        weights: tensors of any shape and strides, float32, float64, float16 or bfloat16, all on
            one device.
        masks: bool, shaped like the weights. Default: nothing is pruned.
        references: shaped like the weights, any of the dtypes (read as float32 unless the weight is
            float64), on the device of the weights or on the CPU, from where a GPU fetches them one
            at a time (pinned ones without waiting). They get no gradient. Default: the weights
            without the masks.
        indices: int64, shape ``(units,)`` each: unit ``i`` of a weight goes with unit ``index[i]``
            of its reference. Default: with unit ``i``. To check their range, a call waits for the
            GPU once.
        dims: the dimension of each tensor's units, 0 or 1; 0 for a tensor of at most one dimension,
            which is one unit. Default: 0.
        names: what to call the tensors in an error. Default: ``weights[i]``.

    Returns:
        float64, shape ``(3, units)``, the units in the order of the tensors.

    Raises:
        ValueError: a shape, device or dim that does not fit; an index out of range; no weights.
        TypeError: a dtype that does not fit.
        NotImplementedError: forward-mode derivatives.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
        >>> unit_products([weight], masks=[weight > 1.5])
        tensor([[25.,  4.],
                [25.,  4.],
                [25.,  5.]], dtype=torch.float64)
    """
    _refuse_tangents(weights)
    *lists, dims, names = _unit_arguments(weights, masks, references, indices, dims, names)
    products: Tensor = torch.ops.torchalignprune.unit_products(*lists, dims, names)
    return products


def unit_combination(
    weights: Sequence[Tensor],
    coefficients: Tensor,
    *,
    masks: Sequence[Tensor | None] | None = None,
    references: Sequence[Tensor | None] | None = None,
    indices: Sequence[Tensor | None] | None = None,
    dims: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """``mask * (a * reference + b * weight)`` with a pair ``(a, b)`` for each unit, in one pass.

    The gradient of any function of :func:`unit_products` has this form.

    Args:
        weights: as in :func:`unit_products`.
        coefficients: float64, shape ``(2, units)``: ``a`` and ``b``.
        masks: as in :func:`unit_products`.
        references: as in :func:`unit_products`.
        indices: as in :func:`unit_products`.
        dims: as in :func:`unit_products`.
        names: as in :func:`unit_products`.

    Returns:
        The combinations, with the shapes, strides and dtypes of the weights; 0 where a mask is
        False.

    Raises:
        ValueError: a shape, device or dim that does not fit; an index out of range; no weights.
        TypeError: a dtype that does not fit.
        NotImplementedError: forward-mode derivatives.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
        >>> coefficients = torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
        >>> unit_combination([weight], coefficients, masks=[weight > 1.5])
        [tensor([[6., 8.],
                [0., 4.]])]
    """
    _refuse_tangents([*weights, coefficients])
    *lists, dims, names = _unit_arguments(weights, masks, references, indices, dims, names)
    return list(torch.ops.torchalignprune.unit_combination(*lists, coefficients, dims, names))


def _refuse_tangents(tensors: Sequence[Tensor]) -> None:
    # torch.library supports only reverse mode: it would silently take tangents for zero.
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "unit_products and unit_combination have no forward-mode derivatives: use "
            "torch.autograd.grad or backward()"
        )


def _unit_arguments(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    references: Sequence[Tensor | None] | None,
    indices: Sequence[Tensor | None] | None,
    dims: Sequence[int] | None,
    names: Sequence[str] | None,
) -> tuple[Any, ...]:
    """The arguments, with the defaults filled in."""
    count = len(weights)
    if count == 0:
        raise ValueError("weights should have at least one tensor, got none")
    none = [None] * count
    return (
        list(weights),
        none if masks is None else list(masks),
        none if references is None else [r if r is None else r.detach() for r in references],
        none if indices is None else list(indices),
        [0] * count if dims is None else list(dims),
        [f"weights[{i}]" for i in range(count)] if names is None else list(names),
    )


def _units(weight: Tensor, dim: int) -> int:
    return 1 if weight.dim() < 2 else weight.size(dim)


@torch.library.register_fake("torchalignprune::unit_products")
def _(
    weights: list[Tensor],
    masks: list[Tensor | None],
    references: list[Tensor | None],
    indices: list[Tensor | None],
    dims: list[int],
    names: list[str],
) -> Tensor:
    units = sum(_units(weight, dim) for weight, dim in zip(weights, dims, strict=True))
    return weights[0].new_empty((3, units), dtype=torch.float64)


@torch.library.register_fake("torchalignprune::unit_combination")
def _(
    weights: list[Tensor],
    masks: list[Tensor | None],
    references: list[Tensor | None],
    indices: list[Tensor | None],
    coefficients: Tensor,
    dims: list[int],
    names: list[str],
) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *lists, ctx.dims, ctx.names = inputs
    ctx.lengths = [len(entry) if isinstance(entry, list | tuple) else None for entry in lists]
    flat = [
        tensor
        for entry in lists
        for tensor in (entry if isinstance(entry, list | tuple) else [entry])
    ]
    ctx.save_for_backward(*flat)


def _kept(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [
        next(tensors) if length is None else [next(tensors) for _ in range(length)]
        for length in ctx.lengths
    ]


def _no_gradient(entries: list[Tensor | None]) -> list[None] | None:
    # torch takes a list as one of tensors only if it has no None in it.
    return None if any(entry is None for entry in entries) else [None] * len(entries)


def _products_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    lists = _kept(ctx)
    to_pp, to_pr, _ = grad
    units = [_units(weight, dim) for weight, dim in zip(lists[0], ctx.dims, strict=True)]
    columns = torch.stack([to_pr, 2 * to_pp]).split(units, dim=1)
    # Frozen weights take neither time nor memory.
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[0]) if needed]
    found = torch.ops.torchalignprune.unit_combination(
        *([entries[i] for i in wanted] for entries in lists),
        torch.cat([columns[i] for i in wanted], dim=1),
        [ctx.dims[i] for i in wanted],
        [ctx.names[i] for i in wanted],
    )
    grads: list[Tensor | None] = [None] * len(units)
    for i, own in zip(wanted, found, strict=True):
        grads[i] = own
    return grads, *map(_no_gradient, lists[1:]), None, None


def _combination_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    weights, masks, references, indices, coefficients = _kept(ctx)
    # With the gradient in the place of the weight, the same two operators serve again.
    partners = [
        weight.detach() if reference is None else reference
        for weight, reference in zip(weights, references, strict=True)
    ]
    products = torch.ops.torchalignprune.unit_products(
        grads, masks, partners, indices, ctx.dims, ctx.names
    )
    with_weights = []
    for grad, mask, weight, dim in zip(grads, masks, weights, ctx.dims, strict=True):
        passed = grad if mask is None else torch.where(mask, grad, 0)
        product = passed.double() * weight.double()
        product = product.reshape(1, -1) if weight.dim() < 2 else product
        with_weights.append(product.movedim(dim, 0).flatten(1).sum(dim=1))
    none = [None] * len(weights)
    weight_grads = torch.ops.torchalignprune.unit_combination(
        grads,
        masks,
        none,
        none,
        torch.stack([torch.zeros_like(coefficients[1]), coefficients[1]]),
        ctx.dims,
        ctx.names,
    )
    coefficients_grad = torch.stack([products[1], torch.cat(with_weights)])
    constant = map(_no_gradient, (masks, references, indices))
    return weight_grads, *constant, coefficients_grad, None, None


torch.library.register_autograd(
    "torchalignprune::unit_products", _products_backward, setup_context=_keep
)
torch.library.register_autograd(
    "torchalignprune::unit_combination", _combination_backward, setup_context=_keep
)


@torch.library.register_fake("torchalignprune::select_global")
def _(
    weights: list[Tensor],
    masks: list[Tensor | None],
    references: list[Tensor | None],
    row_scales: list[Tensor | None],
    column_scales: list[Tensor | None],
    names: list[str],
    count: int,
    score: str,
) -> list[Tensor]:
    return [torch.empty_like(weight, dtype=torch.bool) for weight in weights]


@torch.library.register_fake("torchalignprune::shard_counts")
def _(
    weights: list[Tensor],
    masks: list[Tensor | None],
    references: list[Tensor | None],
    row_scales: list[Tensor | None],
    column_scales: list[Tensor | None],
    names: list[str],
    score: str,
    low: int,
    shift: int,
    bins: int,
) -> Tensor:
    return weights[0].new_empty(bins + 2, dtype=torch.int64)


@torch.library.register_fake("torchalignprune::shard_ties")
def _(
    weights: list[Tensor],
    masks: list[Tensor | None],
    references: list[Tensor | None],
    row_scales: list[Tensor | None],
    column_scales: list[Tensor | None],
    names: list[str],
    score: str,
    key: int,
    edges: list[Tensor],
) -> Tensor:
    return weights[0].new_empty(sum(own.numel() - 1 for own in edges), dtype=torch.int64)


@torch.library.register_fake("torchalignprune::shard_masks")
def _(
    weights: list[Tensor],
    masks: list[Tensor | None],
    references: list[Tensor | None],
    row_scales: list[Tensor | None],
    column_scales: list[Tensor | None],
    names: list[str],
    score: str,
    key: int,
    splits: list[int],
) -> list[Tensor]:
    return [torch.empty_like(weight, dtype=torch.bool) for weight in weights]


@torch.library.register_fake("torchalignprune::select_rows")
def _(weight: Tensor, mask: Tensor | None, counts: Tensor, name: str) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


@torch.library.register_fake("torchalignprune::cosine_gains")
def _(
    weight: Tensor,
    mask: Tensor | None,
    reference: Tensor | None,
    column_scale: Tensor | None,
    name: str,
) -> Tensor:
    wide = weight.dtype == torch.float64
    return torch.empty_like(weight, dtype=torch.float64 if wide else torch.float32)
