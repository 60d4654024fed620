"""All methods together: a Plan, and a plain module that is shared out as it says."""

from pypar.hybrid.checkpoint import load, save
from pypar.hybrid.estimate import Estimate, RankEstimate, estimate
from pypar.hybrid.model import HybridModel
from pypar.hybrid.optimizer import HybridOptimizer
from pypar.hybrid.parallelize import parallelize
from pypar.hybrid.plan import Plan, PlanError
from pypar.hybrid.state import gather_grads, gather_optimizer_state, gather_state, load_optimizer_state
from pypar.hybrid.together import CheckpointError
from pypar.hybrid.traffic import Traffic

__all__ = [
    "CheckpointError",
    "Estimate",
    "HybridModel",
    "HybridOptimizer",
    "Plan",
    "PlanError",
    "RankEstimate",
    "Traffic",
    "estimate",
    "gather_grads",
    "gather_optimizer_state",
    "gather_state",
    "load",
    "load_optimizer_state",
    "parallelize",
    "save",
]
