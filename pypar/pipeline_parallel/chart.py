"""`pypar chart`: what a pipeline schedule looks like, holds and idles."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from pypar.pipeline_parallel.check import check
from pypar.pipeline_parallel.draw import headline, picture, trace
from pypar.pipeline_parallel.generators import NAMES, make_schedule
from pypar.pipeline_parallel.schedule import Schedule
from pypar.pipeline_parallel.simulate import Costs, simulate

EPILOG = """examples
  pypar chart --schedule zbv --pp 4 --micro-batches 8              zbv.png
  pypar chart --schedule 1f1b --pp 4 --out 1f1b.json               a trace for ui.perfetto.dev
  pypar chart --all --pp 4 --micro-batches 16                      a table of all schedules
  pypar chart --schedule vhalf --pp 4 --csv > mine.csv             as torch.distributed.pipelining reads it
  pypar chart --from-csv mine.csv --costs 1,1.2,0.9                one of your own, checked and drawn
"""


def table(num_ranks: int, micro_batches: int, costs: Costs) -> str:
    """Markdown: all schedules by name."""
    lines = [
        f"| {num_ranks} ranks, {micro_batches} micro-batches | stages | bubble | idle | activations held | slots |",
        "|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        schedule = make_schedule(name, num_ranks, micro_batches)
        timeline = simulate(schedule, costs)
        per_rank = schedule.num_stages / num_ranks
        slots = max(check(schedule).slots.values(), default=0)
        lines.append(
            f"| {name} | {schedule.num_stages} | {100 * timeline.bubble:.1f} % | "
            f"{(timeline.makespan - timeline.busy) / per_rank:g} | {max(timeline.peaks) / per_rank:g} | {slots} |"
        )
    return "\n".join(lines)


def costs_of(text: str) -> Costs:
    try:
        values = [float(part) for part in text.split(",")]
        is_time = all(math.isfinite(value) and value >= 0 for value in values)
        if not 1 <= len(values) <= 4 or not is_time or not any((values + [1.0] * 3)[:3]):
            raise ValueError
        return Costs(*values)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give up to four times F,I,W,communication, as 1,1.2,0.9,0.05, and not only zeros"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """2 for a schedule that can't be."""
    p = argparse.ArgumentParser(
        prog="pypar chart",
        description="Draw a pipeline schedule: a picture (PNG, SVG), a Perfetto trace (JSON), a table or CSV.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--schedule", default="1f1b", metavar="NAME", help=f"of {', '.join(NAMES)}; default 1f1b")
    p.add_argument("--from-csv", type=Path, metavar="FILE", help="a schedule of your own instead: a line per rank")
    p.add_argument("--pp", type=int, default=4, metavar="N", help="ranks of the pipeline; default 4")
    p.add_argument("--micro-batches", type=int, default=8, metavar="M", help="default 8")
    p.add_argument("--virtual-stages", type=int, metavar="V", help="stages per rank, where there is a choice")
    p.add_argument("--costs", type=costs_of, default=Costs(), metavar="F,I,W,C",
                   help="time of forward, input gradient, weight gradient, message; default 1,1,1,0")  # fmt: skip
    p.add_argument("--out", type=Path, metavar="FILE", help=".png, .svg, .pdf, or .json for Perfetto; default NAME.png")
    p.add_argument("--csv", action="store_true", help="print the schedule as CSV instead")
    p.add_argument("--all", action="store_true", help="print a table of all schedules instead")
    args = p.parse_args(argv)
    try:
        if args.all:
            print(table(args.pp, args.micro_batches, args.costs))
            return 0
        if args.from_csv is not None:
            schedule = Schedule.from_csv(args.from_csv.read_text(), args.from_csv.stem)
        else:
            stages = None if args.virtual_stages is None else args.virtual_stages * args.pp
            schedule = make_schedule(args.schedule, args.pp, args.micro_batches, stages)
        check(schedule)
    except (ValueError, OSError) as error:
        print(f"pypar chart: {error}", file=sys.stderr)
        return 2
    if args.csv:
        print(schedule.to_csv(), end="")
        return 0
    timeline = simulate(schedule, args.costs)
    out = args.out or Path(f"{schedule.name}.png")
    try:
        if out.suffix == ".json":
            out.write_text(trace(timeline))
        else:
            picture(timeline, out)
    except ImportError:
        print('pypar chart draws with matplotlib: pip install "pypar[train]"', file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"pypar chart: {out}: {error}", file=sys.stderr)
        return 2
    print(f"{headline(timeline)}\n{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
