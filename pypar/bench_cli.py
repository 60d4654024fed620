"""`pypar bench`: the benches of a checkout."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m bench` with argv. 2 when this is an installed pypar without its bench/ folder."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").exists():
        print("pypar bench needs a checkout: the benches are not installed with the package", file=sys.stderr)
        return 2
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if importlib.util.find_spec("matplotlib") is None:
        print('pypar bench draws charts: pip install "pypar[bench]"', file=sys.stderr)
        return 2
    from bench.__main__ import main as run_benches

    return run_benches(argv)
