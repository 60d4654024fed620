"""Pipeline parallel: schedules as data, rings, stages, and the engine that runs them."""

from pypar.pipeline_parallel.wrap import Pipeline

__all__ = ["Pipeline"]
