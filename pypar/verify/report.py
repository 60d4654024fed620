"""What differs between a run under a plan and one process: by parameter, where, and on whose shard."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pypar.verify.holders import Holder
from pypar.verify.steps import Run


@dataclass
class Row:
    """One tensor. what: "gradient" (of `step`), "weight" or "state" (`key` of the optimizer's). size: the largest value
    in one process. absolute, relative: the largest errors, relative to size. at: the index of the worst element, of
    which found and wanted are the values. holders: ranks that hold it."""

    name: str
    what: str
    step: int
    ok: bool
    absolute: float
    relative: float
    at: tuple[int, ...] = ()
    found: float = 0.0
    wanted: float = 0.0
    holders: list[str] = field(default_factory=list)
    note: str = ""
    key: str = ""
    size: float = 0.0

    @property
    def title(self) -> str:
        return f"{self.key or self.what} of {self.name}"


@dataclass
class Report:
    """ok: everything agrees. losses, norms: (step, found, wanted, whether they agree). rows: of all tensors. blocks: of
    which the first step's forward put something else out. apart: tensors whose copies differ between two ranks. first:
    the layer that deviates first, or ""."""

    plan: str
    rtol: float
    atol: float
    losses: list[tuple[int, float, float, bool]]
    norms: list[tuple[int, float, float, bool]]
    rows: list[Row]
    blocks: list[str]
    apart: dict[str, tuple[int, int]]

    @property
    def ok(self) -> bool:
        numbers = all(ok for *_, ok in (*self.losses, *self.norms))
        return bool(self.losses) and numbers and all(row.ok for row in self.rows) and not self.apart

    @property
    def first(self) -> str:
        """Where to look: the first block whose output differs; else of the gradients of the first step the one nearest
        to the loss; else the first tensor that differs."""
        if self.blocks:
            return f"the output of {self.blocks[0]}"
        wrong = [row for row in self.rows if not row.ok]
        gradients = [row for row in wrong if row.what == "gradient"]
        if gradients:
            early = min(row.step for row in gradients)
            return f"the gradient of {[row for row in gradients if row.step == early][-1].name}"
        if self.apart:
            return next(iter(self.apart))
        return f"the {wrong[0].title}" if wrong else ""

    def to_json(self) -> str:
        """Numbers that JSON has no word for are the texts "nan", "inf" and "-inf"."""
        return json.dumps(_plain({**asdict(self), "ok": self.ok, "first": self.first}), indent=1, allow_nan=False)

    def table(self, every: bool = False) -> str:
        """Losses, then a line per parameter: the largest errors of its gradients and of its weight. every: also of what
        is in order, where something is not."""
        lines = [f"plan: {self.plan}", f"tolerance: {self.atol:g} + {self.rtol:g} x |value of one process|", ""]
        for what, numbers in (("loss", self.losses), ("norm", self.norms)):
            lines += [
                f"{what} of step {s + 1}: {a:.8g}, one process {b:.8g}{'' if ok else '   DIFFERS'}"
                for s, a, b, ok in numbers
            ]
        names = list(dict.fromkeys(row.name for row in self.rows))
        width = max((len(name) for name in names), default=4)
        head = "   ".join(f"{w:>9} abs {w:>9} rel" for w in ("gradient", "weight", "state"))
        lines += ["", f"{'':{width}}   {head}"]
        for name in names:
            rows = [row for row in self.rows if row.name == name]
            if not every and not self.ok and all(row.ok for row in rows):
                continue
            cells = []
            for what in ("gradient", "weight", "state"):
                mine = [row for row in rows if row.what == what]
                worst = max(mine, key=lambda row: (not row.ok, row.absolute), default=None)
                text = " " * 27 if worst is None else f"{worst.absolute:13.2e} {worst.relative:13.2e}"
                cells.append(text)
            lines.append(f"{name:{width}}   {'   '.join(cells)}{'' if all(r.ok for r in rows) else '   DIFFERS'}")
        suspect = self.first.rpartition(" of ")[2]
        wrong = [row for row in self.rows if not row.ok]
        wrong.sort(key=lambda row: f"{row.name}.".startswith(f"{suspect}."), reverse=True)
        lines += [_where(row) for row in wrong[:12]]
        lines += [f"{what} is not the same on ranks {a} and {b}" for what, (a, b) in self.apart.items()][:12]
        return "\n".join([*lines, "", self.verdict()])

    def verdict(self) -> str:
        if self.ok:
            return f"{len(self.rows)} tensors, {len(self.losses)} losses: all as in one process"
        wrong = sum(not row.ok for row in self.rows)
        return f"{wrong} of {len(self.rows)} tensors differ; look first at {self.first or 'the loss'}"


def _where(row: Row) -> str:
    step = f" in step {row.step + 1}" if row.what == "gradient" else ""
    held = f"; held by {', '.join(row.holders)}" if row.holders else ""
    if row.note:
        return f"{row.title}{step}: {row.note}{held}"
    return f"{row.title}{step}: {row.found:.8g} at {list(row.at)}, one process {row.wanted:.8g}{held}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def compare(plan: str, found: Run, wanted: Run, rtol: float, atol: float) -> Report:
    """found: of rank 0."""

    def numbers(ours: list[float], theirs: list[float]) -> list[tuple[int, float, float, bool]]:
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [(step, a, b, abs(a - b) <= atol + rtol * abs(b)) for step, (a, b) in pairs]

    rows: list[Row] = []
    for step, (ours, theirs) in enumerate(zip(found.gradients, wanted.gradients, strict=True)):
        rows += _rows("gradient", step, ours, theirs, rtol, atol, found.holders)
    rows += _rows("weight", 0, found.weights, wanted.weights, rtol, atol, found.holders)
    keys = dict.fromkeys(key for run in (wanted, found) for state in run.states.values() for key in state)
    for key in keys:
        ours, theirs = ({n: s[key] for n, s in run.states.items() if key in s} for run in (found, wanted))
        rows += _rows("state", 0, ours, theirs, rtol, atol, found.holders, key)
    _check_scale(rows, rtol)
    blocks = [
        name for name, value in wanted.outputs.items()
        if name in found.outputs and abs(found.outputs[name] - value) > max(1e-4, 10 * rtol) * abs(value)
    ]  # fmt: skip
    return Report(
        plan, rtol, atol, numbers(found.losses, wanted.losses), numbers(found.norms, wanted.norms), rows, blocks,
        found.apart,
    )  # fmt: skip


def _check_scale(rows: list[Row], rtol: float) -> None:
    """A gradient far smaller than the absolute tolerance still has to be right to three digits (at the default), unless
    it is nothing but rounding beside the others; an optimizer's state (squares of gradients are smaller still) to two,
    where the gradients are well above rounding."""
    gradients = [row for row in rows if row.what == "gradient"]
    largest = max((row.size for row in gradients), default=0.0)
    smallest: dict[str, float] = {}  # over the steps
    for row in gradients:
        smallest[row.name] = min(row.size, smallest.get(row.name, row.size))
        if row.relative > 100 * rtol and row.size > 1e-6 * largest:
            row.ok = False
    for row in rows:
        if row.what == "state" and row.relative > 1000 * rtol and smallest.get(row.name, 0.0) > 1e-4 * largest:
            row.ok = False


def _rows(
    what: str,
    step: int,
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    rtol: float,
    atol: float,
    holders: dict[str, list[Holder]],
    key: str = "",
) -> list[Row]:
    rows = []
    for name in dict.fromkeys([*theirs, *ours]):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape:
            shapes = ["nothing" if x is None else str(list(x.shape)) for x in (a, b)]
            note = f"{shapes[0]}, one process {shapes[1]}"
            row = Row(name, what, step, False, float("inf"), float("inf"), note=note, key=key)
            row.holders = [_named(holder) for holder in holders.get(name, ())]
            rows.append(row)
            continue
        if not b.numel():
            continue
        x, y = a.double(), b.double()
        error = (x - y).abs()
        over = torch.nan_to_num(error - (atol + rtol * y.abs()), nan=float("inf"))
        worst = int(over.argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), b.shape)) if b.dim() else ()
        size = float(y.abs().max())
        row = Row(
            name, what, step, not bool((over > 0).any()), float(error.max()),
            float(error.max()) / size if size else 0.0, at, float(x.flatten()[worst]), float(y.flatten()[worst]),
            key=key, size=size,
        )  # fmt: skip
        row.holders = [_named(h) for h in holders.get(name, ()) if not at or h.has(at)]
        rows.append(row)
    return rows


def _named(holder: Any) -> str:
    return f"rank {holder.rank} ({holder.where})"
