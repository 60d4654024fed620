"""The ops, as functions with a backward; the raw operators are torch.ops.pypar.*"""

from pypar.ops.all_gather import all_gather
from pypar.ops.all_reduce import all_reduce
from pypar.ops.all_to_all import all_to_all
from pypar.ops.broadcast import broadcast
from pypar.ops.reduce_scatter import reduce_scatter

__all__ = ["all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter"]
