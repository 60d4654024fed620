"""Bytes that a rank has to send, counted call by call: of a run, or of one without other ranks (dry.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pypar.pipeline_parallel import Pipeline
from pypar.reference.collectives import group_of, rows_per_rank

Sent = dict[tuple[str, str], int]  # (axis, op) -> bytes
OTHER = "other"  # a group that isn't one of an axis


class Traffic(TorchDispatchMode):
    """Within the block, what this rank contributes to collectives, messages and pypar's ops, by the name of the group
    and the op. What travels counts, not how the transport carries it, so that the same call has the same bytes over
    shared memory, gloo or NCCL; R ranks:

    all_reduce of n bytes        2 n (R-1)/R, that of a ring: its reduce-scatter and its all-gather
    all_gather of a part of n    n (R-1): it goes to all others
    reduce_scatter of n          n less the part that stays here
    all_to_all of n              likewise
    broadcast of n               n (R-1) at the root, nothing elsewhere
    send, ring of n              n; of a ring the tensors, without heads and structure

    A matmul that is fused with one counts as that one; vocab_cross_entropy as 3 numbers per row to each other rank (4
    with label smoothing). Barriers carry nothing. Backward passes count where they run in the block.
    """

    def __init__(self, pipeline: Pipeline | None = None) -> None:
        """pipeline: whose rings count as well, which aren't ops. It has run such a batch before the block: with the
        first one its rings are made, and those of the block before count from then on."""
        super().__init__()
        self.sent: dict[tuple[str, str], Count] = {}
        self._pipeline = pipeline
        self._ring_bytes = 0

    def __enter__(self) -> Any:
        self._ring_bytes = self._in_rings()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if self._pipeline is not None:
            self.add(self._pipeline.group.group_name, "ring", self._in_rings() - self._ring_bytes)

    def _in_rings(self) -> int:
        engines = [] if self._pipeline is None else self._pipeline._engines.values()
        return sum(channel.sent_bytes for engine in engines for channel in engine.channels.values())

    def by_axis(self, axis_of: Mapping[str, str]) -> Sent:
        """axis_of: {name of a group: axis}."""
        found: dict[tuple[str, str], Count] = {}
        for (group, op), count in self.sent.items():
            key = axis_of.get(group, OTHER), op
            found[key] = found.get(key, 0) + count
        return {key: int(count) for key, count in found.items() if count}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("pypar", "c10d"):
            self.count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self._c10d(name, args)
            return
        rule = _PYPAR.get(name)
        if rule is None:
            return
        names = [argument.name for argument in func._schema.arguments]
        given: dict[str, Any] = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given |= dict(zip(names, args, strict=False)) | dict(kwargs)
        group = group_of(given["group_name"])
        self.add(given["group_name"], name.removesuffix("_out").rstrip("_"), rule(given, group.rank(), group.size()))

    def add(self, group: str, op: str, num_bytes: Count) -> None:
        self.sent[group, op] = self.sent.get((group, op), 0) + num_bytes

    def _c10d(self, name: str, args: Sequence[Any]) -> None:
        rule = _C10D.get(name)
        boxed = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
        if rule is None or boxed is None:
            return
        op, count = rule
        group: Any = dist.ProcessGroup.unbox(boxed)  # type: ignore[attr-defined]
        self.add(group.group_name, op, count(args, group.rank(), group.size()))


def all_reduced(num_bytes: int, size: int) -> Fraction:
    """Of num_bytes on each rank; a fraction, so that sums don't depend on how they are cut into calls."""
    return Fraction(2 * num_bytes * (size - 1), size)


Count = int | Fraction


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.dtype.itemsize for x in tensors)


def _others(x: torch.Tensor, splits: Sequence[int] | None, rank: int, size: int) -> int:
    """Of x, rows for each rank, what isn't for this one."""
    rows = x.shape[0] if x.dim() else 1
    mine = rows_per_rank(rows, size, list(splits) if splits is not None else None)[rank]
    return _bytes(x) - mine * (_bytes(x) // rows if rows else 0)


Rule = Callable[[dict[str, Any], int, int], Count]


def _product(given: dict[str, Any]) -> torch.Tensor:
    """Of the shape of xs[0] @ weights[0].T"""
    x, w = given["xs"][0], given["weights"][0]
    wide = given["determinism"] == "layout" and x.dtype.itemsize < 4
    return torch.empty(x.shape[0], w.shape[0], dtype=torch.float32 if wide else x.dtype, device="meta")


def _entropy(given: dict[str, Any], rank: int, size: int) -> Count:
    rows, wide = given["target"].numel(), 8 if _first(given).dtype == torch.float64 else 4
    return rows * wide * (4 if given["label_smoothing"] else 3) * (size - 1)


def _first(given: dict[str, Any]) -> torch.Tensor:
    return given["logits"] if "logits" in given else given["hidden"]


def _linear_entropy(given: dict[str, Any], rank: int, size: int) -> Count:
    summed = _bytes(given["hidden"]) if given["needs_dhidden"] else 0
    return _entropy(given, rank, size) + all_reduced(summed, size)


_PYPAR: dict[str, Rule] = {
    "all_reduce": lambda g, _, n: all_reduced(_bytes(g["x"]), n),
    "all_reduce_": lambda g, _, n: all_reduced(_bytes(g["x"]), n),
    "all_reduce_shares": lambda g, _, n: all_reduced(_bytes(g["x"][0]), n),
    "all_gather": lambda g, _, n: _bytes(g["x"]) * (n - 1),
    "all_gather_out": lambda g, _, n: _bytes(g["x"]) * (n - 1),
    "reduce_scatter": lambda g, r, n: _others(g["x"], g["splits"], r, n),
    "reduce_scatter_out": lambda g, r, n: _others(g["x"], g["splits"], r, n),
    "all_to_all": lambda g, r, n: _others(g["x"], g["in_splits"], r, n),
    "all_to_all_out": lambda g, r, n: _others(g["x"], g["in_splits"], r, n),
    "broadcast": lambda g, r, n: _bytes(g["x"]) * (n - 1) if r == g["root"] else 0,
    "broadcast_": lambda g, r, n: _bytes(g["x"]) * (n - 1) if r == g["root"] else 0,
    "matmul_all_reduce": lambda g, _, n: all_reduced(_bytes(_product(g)), n),
    "matmul_reduce_scatter": lambda g, r, n: _others(_product(g), g["splits"], r, n),
    "all_gather_matmul": lambda g, _, n: _bytes(g["x"]) * (n - 1),
    "all_gather_matmul_dw": lambda g, _, n: _bytes(g["x"]) * (n - 1),
    "all_gather_matmul_both": lambda g, _, n: _bytes(g["dy"]) * (n - 1),
    "vocab_cross_entropy": _entropy,
    "linear_vocab_cross_entropy": _linear_entropy,
    "zero_scatter": lambda g, r, n: _others(g["full"], g["sizes"], r, n),
    "zero_gather": lambda g, _, n: _bytes(g["shard"]) * (n - 1),
}


def _lists(value: Any) -> list[torch.Tensor]:
    return [x for each in value for x in (_lists(each) if isinstance(each, (list, tuple)) else [each])]


_C10D: dict[str, tuple[str, Callable[[Sequence[Any], int, int], Count]]] = {
    "allreduce_": ("all_reduce", lambda a, _, n: all_reduced(_bytes(*_lists(a[0])), n)),
    "allreduce_coalesced_": ("all_reduce", lambda a, _, n: all_reduced(_bytes(*_lists(a[0])), n)),
    "allgather_": ("all_gather", lambda a, _, n: _bytes(*_lists(a[1])) * (n - 1)),
    "_allgather_base_": ("all_gather", lambda a, _, n: _bytes(a[1]) * (n - 1)),
    "reduce_scatter_": ("reduce_scatter", lambda a, r, n: _bytes(*_lists(a[1])) - _bytes(*_lists(a[0]))),
    "_reduce_scatter_base_": ("reduce_scatter", lambda a, r, n: _bytes(a[1]) - _bytes(a[0])),
    "broadcast_": ("broadcast", lambda a, r, n: _bytes(*_lists(a[0])) * (n - 1) if r == a[2] else 0),
    "send": ("send", lambda a, _, n: _bytes(*_lists(a[0]))),
}
