"""What the ranks tell each other before a step: the same batch where it has to be, and how large the whole is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pypar.hybrid.axes import Axes
from pypar.pipeline_parallel.batch import signature, size_of, tokens_of


@dataclass(frozen=True)
class Facts:
    """seed: of the first micro-batch of the first share. samples, tokens: of the global batch. least: samples of the
    smallest share."""

    seed: int
    samples: int
    tokens: int
    least: int


def agree(batch: Any, counts_tokens: bool, axes: Axes) -> Facts:
    """Collective of all ranks. Every rank draws one number from torch's default generator, of which rank 0's counts.

    Raises ValueError, on all ranks, where ranks of one data-parallel share have different batches, or one has none."""
    drawn = int(torch.randint(1 << 40, (1,), dtype=torch.int64))
    said = signature(batch)
    shapes = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=7).digest(), "little")
    tokens = int(tokens_of(batch)) if counts_tokens and isinstance(batch, Mapping) else 0
    mine = torch.tensor([drawn, shapes, size_of(batch), tokens, axes.dp_rank, _values(batch)], dtype=torch.int64)
    if axes.pp * axes.dp * axes.tp == 1:
        everyone = [mine.tolist()]
    else:
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        everyone = [each.tolist() for each in gathered]
    first: dict[int, int] = {}  # of every share, the first rank
    for rank, (_, shape, _, _, share, values) in enumerate(everyone):
        other = first.setdefault(share, rank)
        if (shape, values) != (everyone[other][1], everyone[other][5]):
            what = "shape" if shape != everyone[other][1] else "values"
            raise ValueError(
                f"pypar: ranks {other} and {rank} are one data-parallel share ({share} of {axes.dp}) and got batches "
                f"of different {what}; on this rank it is {said}. Give all ranks of a share the same, as "
                "model.local_batch(global_batch) cuts it"
            )
    shares = [everyone[rank] for rank in first.values()]
    empty = [share for share, rank in first.items() if everyone[rank][2] == 0]
    if empty:
        raise ValueError(
            f"pypar: data-parallel share {empty[0]} of {axes.dp} has no sample; a batch needs {axes.dp} at least"
        )
    return Facts(
        everyone[0][0],
        sum(share[2] for share in shares),
        sum(share[3] for share in shares),
        min(share[2] for share in shares),
    )


def _values(batch: Any) -> int:
    """A number that tells batches apart, cheaply: sums of the first and last elements of whole-number tensors."""
    total = 0
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.numel() and not leaf.is_floating_point() and not leaf.is_complex():
            flat = leaf.reshape(-1)
            total += int(flat[:64].sum()) + 3 * int(flat[-64:].sum())
    return total & 0x7FFFFFFF
