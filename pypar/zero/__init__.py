"""ZeRO: data parallel whose ranks share out optimizer states, gradients and parameters."""

from pypar.zero.optimizer import ShardedOptimizer
from pypar.zero.wrap import Zero

__all__ = ["ShardedOptimizer", "Zero"]
