"""All methods together: a Plan, and a plain module that is shared out as it says."""

from pypar.hybrid.plan import Plan, PlanError

__all__ = ["Plan", "PlanError"]
