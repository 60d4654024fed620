"""Loads the compiled extension."""

from __future__ import annotations

from functools import cache


@cache
def available() -> bool:
    """True when the compiled extension is there and loaded."""
    try:
        import pypar._C  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
