"""Holds a model under a plan against one process: loss, every gradient, every updated weight.

`pypar.verify(...)` is `pypar.verify.verify(...)`: the package can be called.
"""

import sys
from types import ModuleType
from typing import Any

from pypar.verify.report import Report
from pypar.verify.run import verify

__all__ = ["Report", "verify"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return verify(*args, **kwargs)


_Callable.__doc__ = verify.__doc__
sys.modules[__name__].__class__ = _Callable
