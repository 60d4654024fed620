"""The vocabulary is cut over the ranks: rank r holds columns [sum of sizes before r, + sizes[r]) of logits [T, V]."""

from __future__ import annotations

import functools

import torch

from pypar.reference.collectives import from_all_ranks, group_of, is_layout, reduce_in_rank_order, virtual_shards
from pypar.reference.fixed_matmul import fixed_matmul, part_sums
from pypar.reference.matmul_all_reduce import matmul_all_reduce

Scalars = tuple[torch.Tensor, torch.Tensor]


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """What the loss is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _all_sizes(columns: int, sizes: list[int] | None, name: str) -> list[int]:
    return sizes if sizes is not None else [columns] * group_of(name).size()


def own_columns(columns: int, target: torch.Tensor, sizes: list[int] | None, ignore: int, name: str) -> range:
    """Of this rank; and no target may lie outside the vocabulary."""
    group = group_of(name)
    all_sizes = _all_sizes(columns, sizes, name)
    if len(all_sizes) != group.size() or all_sizes[group.rank()] != columns:
        raise ValueError(f"rank {group.rank()} of {group.size()} holds {columns} columns, but sizes is {all_sizes}")
    wrong = ((target != ignore) & ((target < 0) | (target >= sum(all_sizes)))).nonzero()
    if wrong.numel():
        t = int(wrong[0])
        raise ValueError(f"target[{t}] is {int(target[t])}, outside the vocabulary of {sum(all_sizes)}")
    begin = sum(all_sizes[: group.rank()])
    return range(begin, begin + columns)


def _max_and_sum(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the max, and the sum of e^(x - max)."""
    x_max = torch.cat([x, x.new_full((len(x), 1), -torch.inf)], 1).amax(1)  # of no columns: -inf
    return x_max, torch.exp(x - torch.where(x_max.isneginf(), 0, x_max)[:, None]).sum(1)


def _merge(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
    """[max, sum, total] of columns next to each other, from those of either part."""
    most = torch.maximum(a[0], b[0])

    def scaled(part: list[torch.Tensor]) -> torch.Tensor:
        return torch.where(part[1] == 0, 0, part[1] * torch.where(part[0] == most, 1, torch.exp(part[0] - most)))

    return [most, scaled(a) + scaled(b), a[2] + b[2]]


def _merge_tree(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    while len(parts) > 1:
        parts = [_merge(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def vocab_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    sizes: list[int] | None,
    ignore_index: int,
    label_smoothing: float,
    group_name: str,
    determinism: str = "run",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the losses, how many there are, and of each row [max, sum of e^(x - max)], as [2, T]."""
    own = own_columns(logits.shape[1], target, sizes, ignore_index, group_name)
    x = logits.to(wide_type(logits.dtype))
    rows = torch.arange(len(target), device=x.device)
    x_max, exp_sum = _max_and_sum(x)
    mine = (target >= own.start) & (target < own.stop)
    x_target = torch.zeros_like(x_max)
    x_target[mine] = x[rows[mine], target[mine] - own.start]
    num_columns = torch.full_like(x_max, len(own))
    parts = from_all_ranks(torch.stack([x_max, exp_sum, x_target, x.sum(1), num_columns])[None], group_name)
    if is_layout(determinism):
        shards = virtual_shards(_all_sizes(len(own), sizes, group_name), group_of(group_name).rank(), "the vocabulary")
        of_shards = [[*map(torch.Tensor.double, _max_and_sum(s)), s.double().sum(1)] for s in x.split(shards, 1)]
        of_ranks = from_all_ranks(torch.stack(_merge_tree(of_shards))[None], group_name)
    full_max = torch.stack([p[0, 0] for p in parts]).amax(0)
    full_sum, full_target, total, vocabulary = torch.zeros(4, len(target), dtype=x.dtype, device=x.device)
    for p in parts:  # in rank order
        p_max, p_sum, p_target, p_total, p_columns = p[0]
        full_sum += torch.where(p_sum == 0, 0, p_sum * torch.where(p_max == full_max, 1, torch.exp(p_max - full_max)))
        full_target += p_target
        total, vocabulary = total + p_total, vocabulary + p_columns
    if is_layout(determinism):
        full_max, full_sum, total = (t.to(x.dtype) for t in _merge_tree([list(p[0]) for p in of_ranks]))
    kept = target != ignore_index
    loss = full_sum.log() + (1 - label_smoothing) * (full_max - full_target)
    if label_smoothing > 0:
        loss = loss + label_smoothing * (full_max - total / vocabulary)
    stats = torch.stack([torch.where(kept, full_max, 0), torch.where(kept, full_sum, 1)])
    return loss[kept].double().sum().to(x.dtype), kept.sum().to(x.dtype), stats


def vocab_cross_entropy_dlogits(
    logits: torch.Tensor,
    target: torch.Tensor,
    stats: torch.Tensor,
    dloss: torch.Tensor,
    sizes: list[int] | None,
    ignore_index: int,
    label_smoothing: float,
    group_name: str,
) -> torch.Tensor:
    """(softmax - what the target wants) * dloss, of this rank's columns; 0 in rows that are ignored."""
    own = own_columns(logits.shape[1], target, sizes, ignore_index, group_name)
    vocabulary = sum(sizes) if sizes is not None else len(own) * group_of(group_name).size()
    grads = torch.exp(logits.to(stats.dtype) - stats[0][:, None]) / stats[1][:, None]
    wanted = (target[:, None] == torch.arange(own.start, own.stop, device=target.device)).to(stats.dtype)
    grads = (grads - (1 - label_smoothing) * wanted - label_smoothing / max(1, vocabulary)) * dloss
    return torch.where((target != ignore_index)[:, None], grads, 0).to(logits.dtype).contiguous()


def _chunks(dlogits: torch.Tensor, hidden: torch.Tensor, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(dlogits.split(rows), hidden.split(rows), strict=True))


def linear_vocab_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    sizes: list[int] | None,
    ignore_index: int,
    label_smoothing: float,
    chunk_rows: int,
    needs_dhidden: bool,
    needs_dweight: bool,
    group_name: str,
    determinism: str = "run",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits = hidden @ weight.T: loss and count, and the gradients of the loss; that of weight is not rounded."""
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected at least 1")
    layout = is_layout(determinism)
    logits = fixed_matmul(hidden, weight) if layout else hidden @ weight.t()
    shared = (sizes, ignore_index, label_smoothing, group_name)
    loss, count, stats = vocab_cross_entropy(logits, target, *shared, determinism)
    dlogits = vocab_cross_entropy_dlogits(logits, target, stats, torch.ones_like(loss), *shared)
    dhidden, dweight = hidden.new_empty(0, hidden.shape[1]), loss.new_empty(0, hidden.shape[1])
    if needs_dhidden and layout:
        dhidden = matmul_all_reduce([dlogits], [weight.t()], None, None, group_name, determinism, sizes)
    elif needs_dhidden:
        dhidden = reduce_in_rank_order(from_all_ranks(dlogits @ weight, group_name), "sum")
    if needs_dweight and layout:
        chunks = [part_sums([d.t()], [h.t()], [len(d)])[0] for d, h in _chunks(dlogits, hidden, chunk_rows)]
        dweight = functools.reduce(torch.add, chunks)
    elif needs_dweight:
        dweight = dlogits.to(loss.dtype).t() @ hidden.to(loss.dtype)
    return loss, count, dhidden, dweight
