"""pypar: train large language models on many ranks."""

from pypar import ops
from pypar.data_parallel import DataParallel
from pypar.errors import PeerError
from pypar.hybrid import (
    Plan,
    PlanError,
    estimate,
    gather_grads,
    gather_optimizer_state,
    gather_state,
    load,
    parallelize,
    save,
)
from pypar.mesh import init
from pypar.model_parallel import ModelParallel
from pypar.ops import Calibration, calibrate, explain
from pypar.pipeline_parallel import Pipeline
from pypar.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    tensor_parallel,
)
from pypar.zero import Zero

from pypar import verify  # isort: skip  (uses what stands above; can be called: pypar.verify(model_fn, plan, batch))

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "ColumnParallelLinear",
    "DataParallel",
    "ModelParallel",
    "PeerError",
    "Pipeline",
    "Plan",
    "PlanError",
    "RowParallelLinear",
    "VocabParallelCrossEntropy",
    "VocabParallelEmbedding",
    "Zero",
    "calibrate",
    "estimate",
    "explain",
    "gather_grads",
    "gather_optimizer_state",
    "gather_state",
    "init",
    "load",
    "ops",
    "parallelize",
    "save",
    "tensor_parallel",
    "verify",
]
