"""The ops, as functions with a backward; the raw operators are torch.ops.pypar.*"""

from pypar.ops.all_gather import all_gather
from pypar.ops.all_gather_matmul import all_gather_matmul
from pypar.ops.all_reduce import all_reduce
from pypar.ops.all_to_all import all_to_all
from pypar.ops.broadcast import broadcast
from pypar.ops.decide import Calibration, Explanation, calibrate, explain
from pypar.ops.fixed_matmul import fixed_matmul
from pypar.ops.keyed_dropout import keyed_dropout
from pypar.ops.matmul_all_reduce import matmul_all_reduce
from pypar.ops.matmul_reduce_scatter import matmul_reduce_scatter
from pypar.ops.reduce_scatter import reduce_scatter
from pypar.ops.ring_recv import ring_recv
from pypar.ops.ring_send import ring_send
from pypar.ops.vocab_cross_entropy import linear_vocab_cross_entropy, vocab_cross_entropy
from pypar.ops.zero_gather import zero_gather
from pypar.ops.zero_scatter import zero_scatter
from pypar.ops.zero_step import zero_step

__all__ = [
    "Calibration",
    "Explanation",
    "all_gather",
    "all_gather_matmul",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "calibrate",
    "explain",
    "fixed_matmul",
    "keyed_dropout",
    "linear_vocab_cross_entropy",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "reduce_scatter",
    "ring_recv",
    "ring_send",
    "vocab_cross_entropy",
    "zero_gather",
    "zero_scatter",
    "zero_step",
]
