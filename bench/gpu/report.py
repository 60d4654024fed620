"""One report of a run: markdown to read, CSV to keep, a chart."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from bench.gpu.limits import Reached


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tests_table(cells: list[tuple[str, str, str]]) -> str:
    """(test, outcome, why) of every test, grouped by outcome; failures are listed."""
    counts = {outcome: sum(o == outcome for _, o, _ in cells) for outcome in ("passed", "failed", "skipped")}
    said = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    failed = [[name, why.splitlines()[0] if why else ""] for name, outcome, why in cells if outcome == "failed"]
    reasons = sorted({why for _, outcome, why in cells if outcome == "skipped" and why})
    parts = [said, _table(["failed", "why"], failed) if failed else ""]
    return "\n\n".join([*(p for p in parts if p), *(f"Skipped: {reason}" for reason in reasons)])


def bench_table(rows: list[dict[str, Any]]) -> str:
    """Variants of a program side by side, and how near the best of ours is to the roofline. A peer that isn't there, or
    whose call failed, is there in words."""
    keys = list(dict.fromkeys((r["op"], r["size"], r["dtype"]) for r in rows))
    body = []
    for key in keys:
        mine = {r["variant"]: r for r in rows if (r["op"], r["size"], r["dtype"]) == key}
        ours = mine["pypar"]
        if ours["us"] is None:
            body.append([*key, "REFUSED", ours["refused"], "", ""])
            continue
        others = {name: r for name, r in mine.items() if name != "pypar"}
        said = ", ".join(
            f"{name} {r['us']:.1f}" if r["us"] else f"{name}: {r['refused']}" for name, r in others.items()
        )
        timed = [r["us"] for r in others.values() if r["us"]]
        ratio = min(timed) / ours["us"] if timed else float("nan")
        body.append([*key, f"{ours['us']:.1f}", said, f"{ratio:.2f}", f"{100 * ours['share']:.0f} %"])
    return _table(["op", "size", "dtype", "pypar us", "others us", "best other / pypar", "of the limit"], body)


def limits_table(reached: Reached) -> str:
    rows = [[f"matmul {dtype}", f"{flops / 1e12:.3g} TFLOP/s"] for dtype, flops in reached.flops.items()]
    rows.append(["memory, read and written", f"{reached.memory_bytes / 1e9:.4g} GB/s"])
    rows.append(["to a peer, one way", f"{reached.peer_bytes / 1e9:.4g} GB/s"])
    return _table(["limit, measured in this run", ""], rows)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    names = ["op", "size", "dtype", "variant", "us", "least_us", "share", "refused"]
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def chart(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Share of the limit that each variant reaches, by op and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [r for r in rows if r["us"]]
    labels = list(dict.fromkeys(f"{r['op']}\n{r['size']}" for r in timed))
    variants = list(dict.fromkeys(r["variant"] for r in timed))
    figure, axes = pyplot.subplots(figsize=(max(6, 0.9 * len(labels)), 5))
    width = 0.8 / max(1, len(variants))
    for n, variant in enumerate(variants):
        shares = {f"{r['op']}\n{r['size']}": 100 * r["share"] for r in timed if r["variant"] == variant}
        axes.bar([i + n * width for i in range(len(labels))], [shares.get(k, 0) for k in labels], width, label=variant)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(labels))], labels, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("per cent of the limit")
    axes.set_title(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
