"""Hybrid sharding: which ranks share a model out, and which hold the same shards of it."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def groups_of(
    group: dist.ProcessGroup | DeviceMesh | None, replicate_group: dist.ProcessGroup | None
) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """(the ranks that share a model out, those that hold the same shards; None, only this one). Raises ValueError."""
    if isinstance(group, DeviceMesh):
        if replicate_group is not None:
            raise ValueError("pypar.Zero: replicate_group= beside a DeviceMesh, whose first dim replicates; give one")
        if group.ndim > 2:
            raise ValueError(
                f"pypar.Zero: a DeviceMesh of shape {tuple(group.shape)}; give one of two dims, (replicate, shard), or "
                "of one; of a larger one its part, as mesh['replicate', 'shard']"
            )
        replicate_group, group = (group.get_group(0) if group.ndim == 2 else None), group.get_group(group.ndim - 1)
    if group is None:
        if not dist.is_initialized():
            raise ValueError("pypar.Zero: no process group; call pypar.init() first, or pass group=")
        if replicate_group is not None:
            raise ValueError(
                "pypar.Zero: replicate_group= without group=; give the ranks that share a model out as well"
            )
        group = dist.group.WORLD
    assert group is not None
    if replicate_group is not None:
        common = set(dist.get_process_group_ranks(group)) & set(dist.get_process_group_ranks(replicate_group))
        if common != {dist.get_rank()}:
            raise ValueError(
                f"pypar.Zero, rank {dist.get_rank()}: group and replicate_group have ranks {sorted(common)} in common; "
                "only this one may be in both, as in the rows and columns of a mesh"
            )
        if dist.get_world_size(replicate_group) == 1:
            replicate_group = None
    return group, replicate_group
