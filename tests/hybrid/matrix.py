"""The cells of the matrix of plans, models and settings, few that cover every pair of values, and their runs.

python tests/hybrid/matrix.py [--pairs] [--filter TEXT] [--docs docs/matrix.md]     (make verify-matrix)
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import torch
from hybrid.hybrid_common import differences, init_on_hosts, make_batches, make_model
from torch import nn

from pypar.hybrid import Plan
from pypar.testing import RankFailed, run_ranks
from pypar.verify.seeded import seeded
from pypar.verify.steps import Run, Settings, alone, together

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbh1", "zbv", "dualpipev")
LAYOUTS = ((1, 4, 1), (1, 1, 4), (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2))


@dataclass(frozen=True)
class Cell:
    """layout: (pp, dp, tp). uneven ones: heads that tp, a vocabulary that tp, blocks that stages, samples that dp and
    micro-batches do not divide."""

    layout: tuple[int, int, int]
    zero: int
    schedule: str
    sequence_parallel: bool
    recompute: bool
    model: str
    tied: bool
    uneven_heads: bool
    uneven_vocab: bool
    uneven_layers: bool
    uneven_batch: bool
    accumulate: int
    clip: bool
    dropout: bool
    frozen: bool

    @property
    def is_legal(self) -> bool:
        """A value that its layout has no use for is there in its first form alone."""
        pp, dp, tp = self.layout
        return (
            (dp > 1 or self.zero == 0)
            and (pp > 1 or self.schedule == SCHEDULES[0])
            and (tp > 1 or not self.sequence_parallel)
            and (tp > 1 or not (self.uneven_heads or self.uneven_vocab))
            and (pp > 1 or not self.uneven_layers)
        )

    @property
    def plan(self) -> Plan:
        pp, dp, tp = self.layout
        return Plan(
            pp=pp, dp=dp, tp=tp, zero=self.zero, schedule=self.schedule if pp > 1 else "1f1b",
            micro_batches=4 if pp > 1 else 2, sequence_parallel=self.sequence_parallel, recompute=self.recompute,
        )  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        """Of make_model."""
        pp, _, tp = self.layout
        stages = {"interleaved": 2, "zbv": 2, "dualpipev": 2}.get(self.schedule, 1) * pp
        layers = max(2, stages) + (1 if self.uneven_layers else 0)
        heads = 4 if not self.uneven_heads else 6 if tp == 2 else 5
        vocab = 97 if self.uneven_vocab else 96
        return {
            "layers": layers, "tied": self.tied, "heads": heads, "vocab": vocab,
            "dropout": 0.1 if self.dropout else 0.0, "frozen": self.frozen,
        }  # fmt: skip

    @property
    def samples(self) -> int:
        return 9 if self.uneven_batch else 8

    @property
    def settings(self) -> Settings:
        return Settings(clip=0.5 if self.clip else None, accumulate=self.accumulate)

    def __str__(self) -> str:
        said = [f"{self.model}{' tied' if self.tied else ''}", str(self.plan)]
        flags = ("uneven_heads", "uneven_vocab", "uneven_layers", "uneven_batch", "clip", "dropout", "frozen")
        said += [name for name in flags if getattr(self, name)]
        return ", ".join(said + ([f"accumulate={self.accumulate}"] if self.accumulate > 1 else []))


VALUES: dict[str, Sequence[Any]] = {
    "layout": LAYOUTS, "zero": (0, 1, 2, 3), "schedule": SCHEDULES, "sequence_parallel": (False, True),
    "recompute": (False, True), "model": ("own", "llama", "gpt2"), "tied": (False, True),
    "uneven_heads": (False, True), "uneven_vocab": (False, True), "uneven_layers": (False, True),
    "uneven_batch": (False, True), "accumulate": (1, 3), "clip": (False, True), "dropout": (False, True),
    "frozen": (False, True),
}  # fmt: skip
MAIN = ("layout", "zero", "schedule", "sequence_parallel", "recompute", "model", "tied")


def full() -> Iterator[Cell]:
    """Every combination of the plan, the model and tying; the other settings vary from cell to cell."""
    rest = [name for name in VALUES if name not in MAIN]
    rng = random.Random(0)
    for values in itertools.product(*(VALUES[name] for name in MAIN)):
        given = dict(zip(MAIN, values, strict=True))
        for _ in range(200):
            cell = Cell(**given, **{name: rng.choice(VALUES[name]) for name in rest})
            if cell.is_legal:
                yield cell
                break


def pairs() -> list[Cell]:
    """Few cells in which every two values that can stand together do."""
    names = list(VALUES)
    rng = random.Random(1)

    def pairs_of(cell: Cell) -> set[tuple[str, Any, str, Any]]:
        return {(a, getattr(cell, a), b, getattr(cell, b)) for a, b in itertools.combinations(names, 2)}

    def draw(fixed: dict[str, Any]) -> Cell | None:
        for _ in range(100):
            cell = Cell(**{name: fixed.get(name, rng.choice(VALUES[name])) for name in names})
            if cell.is_legal:
                return cell
        return None

    missing = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x in VALUES[a] for y in VALUES[b]
        if draw({a: x, b: y}) is not None
    }  # fmt: skip
    chosen: list[Cell] = []
    while missing:
        a, x, b, y = min(missing, key=repr)
        options = [cell for cell in (draw({a: x, b: y}) for _ in range(60)) if cell is not None]
        best = max(options, key=lambda cell: len(pairs_of(cell) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def parts_of(cell: Cell, dtype: torch.dtype) -> tuple[nn.Module, list[Any]]:
    model = make_model(cell.model, **cell.options).to(dtype)
    # Sequence parallel begins at 48 tokens of a forward.
    tokens = 50 if cell.sequence_parallel else 12
    return model, make_batches(3 * cell.accumulate, cell.samples, cell.options["vocab"], tokens)


def run_cells(
    rank: int, world: int, cells: list[Cell], dtype: torch.dtype, ranks_per_host: int, store: str
) -> list[Run]:
    """ranks_per_host: that many, in order, are taken to be one host."""
    init_on_hosts(rank, world, [str(each // ranks_per_host) for each in range(world)], store)
    found = []
    for cell in cells:
        model, batches = parts_of(cell, dtype)
        torch.manual_seed(1)
        run = together(model, cell.plan, batches, cell.settings)
        found.append(run if rank == 0 else Run())
    return found


def references(cells: Sequence[Cell], dtype: torch.dtype) -> list[Run]:
    """Of one process; with dropout it draws what the plan does."""
    dropping = [cell for cell in cells if cell.dropout]
    drawn = iter(run_ranks(draw_cells, 1, dropping, dtype, limit_s=60 + 20 * len(cells))[0] if dropping else [])
    found = []
    for cell in cells:
        model, batches = parts_of(cell, dtype)
        found.append(next(drawn) if cell.dropout else alone(model, batches, cell.settings))
    return found


def draw_cells(rank: int, world: int, cells: list[Cell], dtype: torch.dtype) -> list[Run]:
    found = []
    for cell in cells:
        model, batches = parts_of(cell, dtype)
        torch.manual_seed(1)
        found.append(seeded(model, cell.plan, batches, cell.settings))
    return found


def check(cells: Sequence[Cell], ranks_per_host: int = 8) -> list[str]:
    """Runs cells of one number of ranks; what differs from one process, by cell ("": nothing).

    Where a gradient is nothing but rounding (of a key's bias), AdamW makes steps of it. So a cell that is off by no
    more than ten times the tolerance is run again in float64, where 1e-10 decides."""
    found = run(cells, torch.float32, 1e-5, 1e-6, ranks_per_host)
    for number, (cell, wrong) in enumerate(zip(cells, found, strict=True)):
        is_near = wrong and not wrong.startswith("failed")
        if is_near and not any(run([cell], torch.float32, 1e-4, 1e-5, ranks_per_host)):
            found[number] = run([cell], torch.float64, 1e-10, 1e-10, ranks_per_host)[0]
    return found


def run(cells: Sequence[Cell], dtype: torch.dtype, rtol: float, atol: float, ranks_per_host: int) -> list[str]:
    (world,) = {cell.plan.world_size for cell in cells}
    limit_s = 60 + 20 * len(cells)
    try:
        with tempfile.TemporaryDirectory() as folder:
            given = list(cells), dtype, ranks_per_host, f"{folder}/store"
            found = run_ranks(run_cells, world, *given, backend="none", limit_s=limit_s)[0]
    except RankFailed as error:
        if len(cells) == 1:
            texts = {text.strip().splitlines()[-1] for text in error.failures.values() if text.strip()}
            return ["failed: " + " | ".join(sorted(texts, key=lambda t: "PeerError" in t)[:2])]
        return [each for cell in cells for each in run([cell], dtype, rtol, atol, ranks_per_host)]
    both = zip(found, references(cells, dtype), strict=True)
    return ["; ".join(differences(theirs, wanted, rtol, atol)[:3]) for theirs, wanted in both]


def batches_of(cells: Iterable[Cell], size: int) -> list[list[Cell]]:
    """Cells of one number of ranks together, which start once."""
    by_world: dict[int, list[Cell]] = {}
    for cell in cells:
        by_world.setdefault(cell.plan.world_size, []).append(cell)
    groups = [[group[i : i + size] for i in range(0, len(group), size)] for group in by_world.values()]
    return [group for of_worlds in itertools.zip_longest(*groups) for group in of_worlds if group is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", action="store_true", help="the covering set of the test suite, not all cells")
    parser.add_argument("--filter", default="", help="cells whose text contains this")
    parser.add_argument("--docs", type=Path, help="write the table there")
    parser.add_argument("--limit", type=int, help="so many cells, drawn from all")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="every Nth cell: 5 is each plan with one model"
    )
    parser.add_argument(
        "--ranks-per-host", type=int, default=8, metavar="N", help="hosts of N ranks each, on this machine (default 8)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = [cell for cell in (pairs() if args.pairs else full()) if args.filter in str(cell)]
    cells = cells[:: args.every]
    if args.limit:
        cells = random.Random(2).sample(cells, min(args.limit, len(cells)))
    results: dict[Cell, str] = {}
    started = time.monotonic()
    order = {cell: number for number, cell in enumerate(cells)}
    random.Random(3).shuffle(cells)  # a run that is ended early has some of everything
    for group in batches_of(cells, 12):
        for cell, wrong in zip(group, check(group, args.ranks_per_host), strict=True):
            results[cell] = wrong
            if wrong:
                print(f"WRONG {cell}: {wrong}", flush=True)
        print(f"{len(results)} of {len(cells)} cells, {time.monotonic() - started:.0f} s", flush=True)
        if args.docs:
            args.docs.write_text(table({cell: results[cell] for cell in sorted(results, key=order.__getitem__)}))
    bad = sum(bool(wrong) for wrong in results.values())
    print(f"{len(cells) - bad} of {len(cells)} cells agree with one process")
    return 1 if bad else 0


def table(results: dict[Cell, str]) -> str:
    """Plans by row, models by column: how many of the cells agree."""
    models = [f"{model}{' tied' if tied else ''}" for model in VALUES["model"] for tied in (False, True)]
    lines = [
        "# Every plan against one process",
        "",
        "Written by `make verify-matrix`. A cell is green where loss, every gradient and every weight after 3 steps",
        "equal those of one process (float32, rtol 1e-5, atol 1e-6); heads, vocabulary, blocks and batches that don't",
        "divide, accumulation, clipping, dropout and frozen parameters vary from cell to cell. Empty: not in this run.",
        "",
        "| plan | " + " | ".join(models) + " |",
        "|---|" + "---|" * len(models),
    ]
    rows: dict[str, dict[str, list[str]]] = {}
    for cell, wrong in results.items():
        row = rows.setdefault(str(cell.plan), {})
        row.setdefault(f"{cell.model}{' tied' if cell.tied else ''}", []).append(wrong)
    for plan, row in rows.items():
        shown = []
        for model in models:
            wrongs = row.get(model)
            shown.append("" if wrongs is None else "🟩" if not any(wrongs) else "🟥")
        lines.append(f"| {plan} | " + " | ".join(shown) + " |")
    good = sum(not wrong for wrong in results.values())
    return "\n".join([*lines, "", f"{good} of {len(results)} cells are green.", ""])


assert [field.name for field in fields(Cell)] == list(VALUES)

if __name__ == "__main__":
    sys.exit(main())
