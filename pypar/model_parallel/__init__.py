"""Model parallel: parts of a model on several devices, and activations that move between them."""

from pypar.model_parallel.measure import measure
from pypar.model_parallel.plan import Placement, place
from pypar.model_parallel.wrap import ModelParallel

__all__ = ["ModelParallel", "Placement", "measure", "place"]
