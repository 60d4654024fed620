"""A schedule to look at: a picture, or a trace for Perfetto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pypar.pipeline_parallel.schedule import KINDS
from pypar.pipeline_parallel.simulate import Timeline

COLORS = {
    "F": ("#4c78a8", "#9ecae9"),
    "B": ("#54a24b", "#a7d79f"),
    "I": ("#f58518", "#ffbf79"),
    "W": ("#72b7b2", "#b8e0dc"),
}
TEXT_FITS = 70  # units across, up to which micro-batches can be read


def headline(timeline: Timeline) -> str:
    schedule = timeline.schedule
    return (
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_stages} stages, {schedule.micro_batches} "
        f"micro-batches; bubble {100 * timeline.bubble:.1f} %, activations held up to {max(timeline.peaks)}"
    )


def picture(timeline: Timeline, path: Path) -> None:
    """PNG, SVG or PDF, by the ending: a row per rank, a box per action; lighter boxes are of later stages of a rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    schedule = timeline.schedule
    wide = max(8.0, min(40.0, timeline.makespan * 0.32))
    figure = Figure(figsize=(wide, 1.6 + 0.55 * schedule.num_ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    first = {rank: min(s for s, at in enumerate(schedule.ranks) if at == rank) for rank in set(schedule.ranks)}
    used = set()
    for rank, row in enumerate(timeline.spans):
        for span in row:
            action = span.action
            later = action.stage != first[rank]
            axes.barh(
                rank, span.end - span.start, left=span.start, height=0.86, color=COLORS[action.kind][later],
                edgecolor="white", linewidth=0.6,
            )  # fmt: skip
            used.add(action.kind)
            if timeline.makespan <= TEXT_FITS:
                middle = (span.start + span.end) / 2
                axes.text(middle, rank, str(action.micro_batch), ha="center", va="center", fontsize=8)
    total = timeline.makespan or 1.0
    axes.set_yticks(
        range(schedule.num_ranks),
        [f"rank {rank}: idle {100 * idle / total:.0f} %, holds {held}"
         for rank, (idle, held) in enumerate(zip(timeline.idle, timeline.peaks, strict=True))],
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.makespan)
    axes.set_xlabel("time, units of a forward; in the boxes: the micro-batch")
    axes.set_title(headline(timeline), fontsize=10)
    handles = [Patch(color=COLORS[kind][0], label=f"{kind}: {KINDS[kind]}") for kind in "FBIW" if kind in used]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.savefig(path, dpi=120)


def trace(timeline: Timeline) -> str:
    """Chrome's trace format, which Perfetto (ui.perfetto.dev) opens: a unit of time is a millisecond."""
    events: list[dict[str, Any]] = []
    for rank, row in enumerate(timeline.spans):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}})
        for span in row:
            action = span.action
            events.append(
                {
                    "ph": "X", "name": str(action), "cat": KINDS[action.kind], "pid": 0, "tid": rank,
                    "ts": 1000 * span.start, "dur": 1000 * (span.end - span.start),
                    "args": {"stage": action.stage, "micro_batch": action.micro_batch},
                }
            )  # fmt: skip
    return json.dumps({"traceEvents": events, "otherData": {"schedule": headline(timeline)}})
