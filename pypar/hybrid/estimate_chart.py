"""An estimate to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pypar.hybrid.estimate import Estimate

KIND_COLORS = {
    "parameters": "#4c78a8",
    "gradients": "#54a24b",
    "optimizer": "#f58518",
    "activations": "#9ecae9",
    "buffers": "#bab0ac",
}
AXIS_COLORS = {"pp": "#4c78a8", "dp": "#54a24b", "tp": "#f58518", "all": "#bab0ac"}
MOST_ROWS = 32


def picture(estimate: Estimate, path: Path) -> Path:
    """PNG, SVG or PDF: on the left the bytes that each rank holds at most, by kind, on the right those that it sends
    per step, by axis. Raises ValueError for another ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"chart {path}: give a name that ends in .png, .svg or .pdf")
    rows = estimate.rows(MOST_ROWS)
    figure = Figure(figsize=(12, 1.8 + 0.36 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [f"rank {label}  (pp {r.pp_rank}, dp {r.dp_rank}, tp {r.tp_rank})" for r, label in rows]
    memory = {kind: [rank.memory[kind] / 1e6 for rank, _ in rows] for kind in KIND_COLORS}
    sent = {axis: [sum(rank.sent.get(axis, {}).values()) / 1e6 for rank, _ in rows] for axis in AXIS_COLORS}
    _bars(left, memory, KIND_COLORS)
    _bars(right, sent, AXIS_COLORS)
    left.set_yticks(range(len(rows)), labels)
    left.invert_yaxis()
    left.set_xlabel("held at most by a rank, MB")
    right.set_xlabel("sent by a rank per step, MB")
    figure.suptitle(f"{estimate.num_parameters / 1e6:.1f} million parameters, {estimate.plan}", fontsize=10)
    figure.savefig(path, dpi=120)
    return path


def _bars(axes: Any, values: dict[str, list[float]], colors: dict[str, str]) -> None:
    count = len(next(iter(values.values())))
    left = [0.0] * count
    for name, widths in values.items():
        if any(widths):
            axes.barh(range(count), widths, left=left, color=colors[name], label=name, height=0.8)
            left = _add(left, widths)
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:,.4g}", va="center", fontsize=8)
    axes.set_xlim(0, 1.12 * max([*left, 1e-9]))
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _add(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)]
