"""Data parallel: every rank holds the whole model and its share of the batch; gradients are averaged over the ranks."""

from pypar.data_parallel.wrap import DataParallel

__all__ = ["DataParallel"]
