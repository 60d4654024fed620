"""ZeRO: data parallel whose ranks share out optimizer states, gradients and parameters."""

from pypar.zero.optimizer import ShardedOptimizer
from pypar.zero.shard_tensor import ShardTensor
from pypar.zero.wrap import Zero

__all__ = ["ShardTensor", "ShardedOptimizer", "Zero"]
