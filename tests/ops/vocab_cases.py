"""What the tests of the loss over a sharded vocabulary share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ops.collective_cases import name, same_bits

IGNORED = -100


def own(x: torch.Tensor, rank: int, sizes: list[int], dim: int = -1) -> torch.Tensor:
    return x.split(sizes, dim)[rank]


def targets(T: int, V: int, ignore: str = "some") -> torch.Tensor:
    target = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(T + V))
    if ignore != "none":
        target[:: 1 if ignore == "all" else 3] = IGNORED
    return target


def torch_loss(logits: torch.Tensor, target: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """What torch says on the logits of the whole vocabulary, in float64."""
    return torch.nn.functional.cross_entropy(
        logits.double(), target, reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing
    )


def on_all_ranks(x: torch.Tensor, world: int) -> None:
    everyone = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(everyone, x)
    assert all(same_bits(x, other) for other in everyone), "ranks hold different bits"


class SameOnAllRanks(torch.autograd.Function):
    """A tensor of which every rank uses a part: its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return torch.ops.pypar.all_reduce(dx, "sum", name())
