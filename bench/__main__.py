"""python -m bench [op ...] [--full]: the benches of the collectives; tables here, CSV and charts in bench/results."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.collectives import OPS, parser, run_ops


def main(argv: Sequence[str] | None = None) -> int:
    p = parser("Bench the collectives; quick unless --full")
    p.add_argument("op", nargs="*", default=[], help=f"of {', '.join(OPS)}; default all")
    p.add_argument("--full", action="store_true", help="all sizes and rounds")
    args = p.parse_args(argv)
    unknown = sorted(set(args.op) - set(OPS))
    if unknown:
        p.error(f"unknown op {', '.join(unknown)}; there are {', '.join(OPS)}")
    args.quick = not args.full
    return run_ops(args.op or OPS, args)


if __name__ == "__main__":
    sys.exit(main())
