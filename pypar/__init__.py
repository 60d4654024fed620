"""pypar: train large language models on many ranks."""

from pypar import ops
from pypar.data_parallel import DataParallel
from pypar.errors import PeerError
from pypar.mesh import init

__version__ = "0.1.0"
__all__ = ["DataParallel", "PeerError", "init", "ops"]
