"""What the references share: every rank's tensor, in rank order, and the sum the ops promise."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_group_size_by_name
from torch.distributed.distributed_c10d import _resolve_process_group as resolve_process_group

_HALF = (torch.float16, torch.bfloat16)


# Of 0.0 and -0.0 the earlier one, so that the bits are the same everywhere; torch.minimum gives this or that one,
# depending on where in the tensor they are. A NaN stays, as in torch.minimum.
def _minimum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where((b < a) | (b != b), b, a)


def _maximum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where((b > a) | (b != b), b, a)


REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": _maximum,
    "min": _minimum,
    "product": torch.mul,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def group_of(group_name: str) -> dist.ProcessGroup:
    return resolve_process_group(dist.GroupName(group_name))


def size_of(group_name: str) -> int:
    """Ranks in the group; torch.compile takes it as a constant."""
    # Not through dist.GroupName, which torch.compile can't trace.
    return _get_group_size_by_name(group_name)  # type: ignore[arg-type]


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where a message has to lie that comes with no tensor: the CPU where the group serves it, else its GPU."""
    served = group._device_types
    return torch.device("cpu") if torch.device("cpu") in served or not served else served[0]


def from_all_ranks(x: torch.Tensor, group_name: str) -> list[torch.Tensor]:
    """x of every rank, in rank order. Shapes may differ in dim 0."""
    group = group_of(group_name)
    rows = torch.zeros(group.size(), dtype=torch.int64, device=x.device)
    rows[group.rank()] = x.shape[0] if x.dim() else 1
    dist.all_reduce(rows, group=group)
    most = int(rows.max())
    padded = x.new_zeros((most, *x.shape[1:])) if x.dim() else x.new_zeros(1)
    padded[: x.shape[0] if x.dim() else 1] = x
    gathered = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(gathered, padded, group=group)
    return [t[:n] if x.dim() else t[0] for t, n in zip(gathered, rows.tolist(), strict=True)]


VIRTUAL_SHARDS = 8


def is_layout(determinism: str) -> bool:
    if determinism not in ("run", "layout"):
        raise ValueError(f"determinism is '{determinism}', expected 'run' or 'layout'")
    return determinism == "layout"


def virtual_shards(sizes: list[int], rank: int, dim: str = "K") -> list[int]:
    """Sizes of rank's virtual shards of a dim of which the ranks hold `sizes`: the dim is cut into 8 as
    torch.tensor_split cuts, and each rank holds 8 / R of these, one behind the other."""
    full, world = sum(sizes), len(sizes)
    if VIRTUAL_SHARDS % world:
        raise ValueError(
            f"determinism 'layout' adds {VIRTUAL_SHARDS} virtual shards along a tree, of which {world} ranks can't "
            "have whole branches; use 1, 2, 4 or 8 ranks, or determinism 'run'"
        )
    base, more = divmod(full, VIRTUAL_SHARDS)
    shards = [base + (p < more) for p in range(VIRTUAL_SHARDS)]
    per = VIRTUAL_SHARDS // world
    fitting = [sum(shards[r * per : (r + 1) * per]) for r in range(world)]
    if list(sizes) != fitting:
        raise ValueError(
            f"{dim} = {full} is cut {list(sizes)} over the ranks, but determinism 'layout' cuts it into "
            f"{VIRTUAL_SHARDS} virtual shards, of which each rank has {per}: cut it {fitting}"
            + (", or make it a multiple of 8 and cut it evenly" if full % VIRTUAL_SHARDS else "")
            + ", or use determinism 'run'"
        )
    return shards[rank * per : (rank + 1) * per]


def tree_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """((parts[0] + parts[1]) + (parts[2] + parts[3])) + ...; a power of two of them."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in."""
    return torch.float32 if dtype in _HALF else dtype


def reduce_in_rank_order(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """parts[0] op parts[1] op ..., half types accumulated in float32 and rounded once."""
    if op not in REDUCTIONS:
        raise ValueError(f"unknown reduction '{op}'; use one of {', '.join(REDUCTIONS)}")
    dtype = parts[0].dtype
    if op == "avg" and not dtype.is_floating_point:
        raise ValueError(f"the reduction avg has no meaning for {dtype}; sum and divide, or cast to a floating type")
    total = parts[0].float() if dtype in _HALF else parts[0].clone()
    for part in parts[1:]:
        total = REDUCTIONS[op](total, part.to(total.dtype))
    if dtype == torch.bool:
        total = total.bool()
    if op == "avg":
        total = total * (1.0 / len(parts))
    return total.to(dtype)


def rows_per_rank(rows: int, world_size: int, splits: list[int] | None) -> list[int]:
    """Rows of dim 0 per rank: splits, or ceil(rows / world_size) each, the last ranks fewer or none."""
    if splits is not None:
        return list(splits)
    per = -(-rows // world_size)
    return [max(0, min(per, rows - r * per)) for r in range(world_size)]
