"""The ranks of a plan: a DeviceMesh, and this rank's groups and coordinates on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pypar.hybrid.plan import Plan

REPLICATE, SHARD = "replicate", "shard"


@dataclass(frozen=True)
class Axes:
    """A group is None where its axis has one rank. dp is replicate x shard; what isn't replicated is shard.

    mesh: dims in the plan's order, "dp" as "replicate" and "shard" where the plan replicates.
    """

    mesh: DeviceMesh
    pp: int
    dp: int
    tp: int
    pp_rank: int
    dp_rank: int
    tp_rank: int
    pp_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    tp_group: dist.ProcessGroup | None
    shard_group: dist.ProcessGroup | None
    replicate_group: dist.ProcessGroup | None

    @classmethod
    def of(cls, plan: Plan, device_type: str) -> Axes:
        """A collective call of all ranks of the job, whose number is the plan's."""
        sizes: dict[str, int] = {}
        for axis in plan.order:
            if axis == "dp" and plan.replicate > 1:
                sizes |= {REPLICATE: plan.replicate, SHARD: plan.dp // plan.replicate}
            else:
                sizes[axis] = getattr(plan, axis)
        mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

        def group(axis: str) -> dist.ProcessGroup | None:
            return mesh.get_group(axis) if sizes.get(axis, 1) > 1 else None

        rank_on = {axis: mesh.get_local_rank(axis) for axis in sizes}
        if plan.replicate > 1:
            shard = sizes[SHARD]
            dp_rank = rank_on[REPLICATE] * shard + rank_on[SHARD]
            dp_group: dist.ProcessGroup | None = mesh[REPLICATE, SHARD]._flatten("dp").get_group()
            shard_group, replicate_group = mesh.get_group(SHARD), mesh.get_group(REPLICATE)
        else:
            dp_rank, shard_group, replicate_group = rank_on["dp"], mesh.get_group("dp"), None
            dp_group = group("dp")
        return cls(
            mesh, plan.pp, plan.dp, plan.tp, rank_on["pp"], dp_rank, rank_on["tp"],
            group("pp"), dp_group, group("tp"), shard_group, replicate_group,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"pp {self.pp_rank}/{self.pp} dp {self.dp_rank}/{self.dp} tp {self.tp_rank}/{self.tp}"
