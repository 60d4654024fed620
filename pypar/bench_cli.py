"""`pypar bench`: the benches of a checkout."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m bench` with argv. 2 when this is an installed pypar without its bench/ folder."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").exists():
        print("pypar bench needs a checkout: the benches are not installed with the package", file=sys.stderr)
        return 2
    if importlib.util.find_spec("matplotlib") is None:
        print('pypar bench draws charts: pip install "pypar[bench]"', file=sys.stderr)
        return 2
    return subprocess.call([sys.executable, "-m", "bench", *(sys.argv[2:] if argv is None else argv)], cwd=root)
