"""The ranks as dp x tp, those of a tensor-parallel group consecutive, so that they share a host; or as a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from pypar.trainer.ranks import Ranks


@dataclass(frozen=True)
class Layout:
    """Rank = dp_rank * tp + tp_rank. A group is None where its axis has one rank.

    Ranks of one tp group read the same sequences and draw the same random numbers, and hold a part of the model each;
    ranks of one dp group hold the same part. pp: ranks of a pipeline, which read the same sequences; then both are 1.
    """

    dp: int
    tp: int
    dp_rank: int
    tp_rank: int
    dp_group: dist.ProcessGroup | None
    tp_group: dist.ProcessGroup | None
    pp: int = 1

    @classmethod
    def make(cls, ranks: Ranks, tp: int, pp: int = 1) -> Layout:
        """tp divides the number of ranks; pp is 1 or all of them. A collective call of all ranks."""
        if pp > 1:
            return cls(1, 1, 0, 0, None, None, pp)
        dp, world = ranks.world_size // tp, dist.group.WORLD
        dp_rank, tp_rank = divmod(ranks.rank, tp)
        if dp > 1 and tp > 1:
            mesh = init_device_mesh(ranks.device.type, (dp, tp), mesh_dim_names=("dp", "tp"))
            return cls(dp, tp, dp_rank, tp_rank, mesh.get_group("dp"), mesh.get_group("tp"))
        return cls(dp, tp, dp_rank, tp_rank, world if dp > 1 else None, world if tp > 1 else None)

    def counts(self) -> bool:
        """Whether this rank's share of a sum over the data counts: one rank of each tp group does."""
        return self.tp_rank == 0

    def __str__(self) -> str:
        return f"pp {self.pp}" if self.pp > 1 else f"dp {self.dp} x tp {self.tp}"
