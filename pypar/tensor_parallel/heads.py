"""Attention heads: which rank gets which, and the cuts of the projections that follow from it.

Ranks get whole query heads, and whole groups of query heads with their key and value head where there are enough of
these; with fewer key and value heads than ranks, several ranks hold a copy of one and share its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pypar.tensor_parallel.cut import Cut, Range, packed_cut, split_evenly
from pypar.tensor_parallel.linear import linear_shape

QUERY = ("q_proj", "query", "wq", "q", "q_lin", "query_proj")
KEY = ("k_proj", "key", "wk", "k", "k_lin", "key_proj")
VALUE = ("v_proj", "value", "wv", "v", "v_lin", "value_proj")
# Fused: query | key | value one behind the other, or by group: its query heads, its key head, its value head.
FUSED_BLOCKS = ("qkv_proj", "c_attn")
FUSED_GROUPS = ("query_key_value",)

_HEAD_DIM = ("head_dim", "head_size", "attention_head_size")
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "n_local_heads")
_NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_local_kv_heads")
_NUM_GROUPS = ("num_key_value_groups", "n_rep")


class _LocalCounts:
    """A config with head counts of its own; everything else is read from, and written to, the model's."""

    def __init__(self, config: Any, counts: dict[str, int]):
        self.__dict__.update(counts, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # asked for while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


@dataclass(frozen=True)
class Heads:
    """of one attention module. q[r], kv[r]: the query heads, and the key and value heads, of rank r."""

    head_dim: int
    num: int
    num_kv: int
    q: tuple[Range, ...]
    kv: tuple[Range, ...]

    @property
    def group(self) -> int:
        return self.num // self.num_kv

    def _cut(self, full: int, ranges: tuple[Range, ...]) -> Cut:
        d = self.head_dim
        return Cut(full * d, tuple(((a * d, b * d),) for a, b in ranges))

    def query_cut(self) -> Cut:
        return self._cut(self.num, self.q)

    def kv_cut(self) -> Cut:
        return self._cut(self.num_kv, self.kv)

    def blocks_cut(self) -> Cut:
        return packed_cut([self.query_cut(), self.kv_cut(), self.kv_cut()])

    def groups_cut(self) -> Cut:
        width, d = (self.group + 2) * self.head_dim, self.head_dim
        ranges: list[tuple[Range, ...]] = []
        for (a, b), (c, e) in zip(self.q, self.kv, strict=True):
            if b - a == (e - c) * self.group:
                ranges.append(((c * width, e * width),))
            else:  # some query heads of one group
                at, first = c * width, a - c * self.group
                queries = (at + first * d, at + (first + b - a) * d)
                ranges.append((queries, (at + self.group * d, at + width)))
        return Cut(self.num_kv * width, tuple(ranges))

    def fix_counts(self, attention: nn.Module, rank: int) -> None:
        """Where the module keeps head counts of its own, they become this rank's."""
        (a, b), (c, d) = self.q[rank], self.kv[rank]
        new = {name: (self.num, b - a) for name in _NUM_HEADS}
        new |= {name: (self.num_kv, d - c) for name in _NUM_KV_HEADS}
        new |= {name: (self.group, (b - a) // (d - c)) for name in _NUM_GROUPS}
        new["split_size"] = (self.num * self.head_dim, (b - a) * self.head_dim)  # GPT-2's width of q, k and v
        for name, (full, local) in new.items():
            if attention.__dict__.get(name) == full:
                setattr(attention, name, local)
        config = getattr(attention, "config", None)
        if any(hasattr(attention, n) for n in FUSED_BLOCKS) and not isinstance(config, _LocalCounts):
            # It splits the fused output by counts, which may be those of the config (Phi-3).
            known = (*_NUM_HEADS, *_NUM_KV_HEADS)
            counts = {n: new[n][1] for n in known if n in new and getattr(config, n, None) == new[n][0]}
            if counts:
                attention.config = _LocalCounts(config, counts)  # type: ignore[assignment]


def share_heads(num: int, num_kv: int, head_dim: int, world_size: int, where: str) -> Heads:
    if num_kv < 1 or num % num_kv:
        raise ValueError(f"{where}: {num} query heads aren't a multiple of {num_kv} key and value heads")
    if world_size > num:
        raise ValueError(
            f"{where} has {num} heads, too few for {world_size} ranks of tensor parallel: use tp = 1 to {num}"
        )
    group = num // num_kv
    if num_kv >= world_size:
        kv = split_evenly(num_kv, world_size)
        return Heads(head_dim, num, num_kv, tuple((a * group, b * group) for a, b in kv), tuple(kv))
    q, copies = [], []
    for head, (first, last) in enumerate(split_evenly(world_size, num_kv)):
        q += [(head * group + a, head * group + b) for a, b in split_evenly(group, last - first)]
        copies += [(head, head + 1)] * (last - first)
    return Heads(head_dim, num, num_kv, tuple(q), tuple(copies))


def _first_int(names: tuple[str, ...], *owners: Any) -> int | None:
    return next((v for o in owners for n in names if isinstance(v := getattr(o, n, None), int) and v > 0), None)


def heads_of(attention: nn.Module, children: dict[str, nn.Module], world_size: int, where: str) -> Heads | None:
    """The heads of an attention module whose linear children are `children`; None if it is none."""
    config = getattr(attention, "config", None)
    shapes = {name: shape for name, child in children.items() if (shape := linear_shape(child)) is not None}
    query, key, fused = (
        next((shapes[n] for n in names if n in shapes), None) for names in (QUERY, KEY, FUSED_BLOCKS + FUSED_GROUPS)
    )
    num = _first_int(_NUM_HEADS, attention, config)
    head_dim = _first_int(_HEAD_DIM, attention)
    if query is not None and key is not None:
        if head_dim is None and num is not None and query[0] % num == 0:
            head_dim = query[0] // num
        if head_dim is None:
            return None
        if query[0] % head_dim or key[0] % head_dim:
            raise ValueError(f"{where}: {query[0]} and {key[0]} features aren't whole heads of {head_dim}")
        num, num_kv = query[0] // head_dim, key[0] // head_dim
    elif fused is not None and num is not None:
        head_dim = head_dim or fused[1] // num
        num_kv, rest = divmod(fused[0] - num * head_dim, 2 * head_dim)
        if rest or num_kv < 1:
            raise ValueError(f"{where}: {fused[0]} features aren't {num} query heads of {head_dim} and as many k as v")
    else:
        return None
    return share_heads(num, num_kv, head_dim, world_size, where)
