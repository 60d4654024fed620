"""The loss curve as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pypar.trainer.metrics import curve


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Training and validation loss over steps. rows: of metrics.jsonl. Raises OSError when it can't be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = curve(rows, "train")
    if steps:
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(
            steps, _smooth(losses), color="tab:blue", label=f"training, smoothed (last {_smooth(losses)[-1]:.3f})"
        )
    steps, losses = curve(rows, "val")
    if steps:
        axes.plot(steps, losses, color="tab:orange", marker="o", label=f"validation (last {losses[-1]:.3f})")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1.0 - weight) * value
        norm = weight * norm + (1.0 - weight)
        smoothed.append(total / norm)
    return smoothed
