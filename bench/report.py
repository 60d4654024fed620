"""Tables, ratios against targets, and charts of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import RESULTS, Result, size_name

Times = dict[tuple[str, int], float]  # (variant, nbytes) -> median us


@dataclass(frozen=True)
class Ratio:
    """A row of ratios. value(nbytes): None where a side is missing. limit(nbytes): ("<=" or ">=", number) or None."""

    name: str
    value: Callable[[int], float | None]
    limit: Callable[[int], tuple[str, float] | None]

    def verdict(self, nbytes: int) -> str:
        """PASS or MISS; empty where there is nothing to hold."""
        value, limit = self.value(nbytes), self.limit(nbytes)
        if value is None or limit is None:
            return ""
        sign, bound = limit
        return "PASS" if (value <= bound if sign == "<=" else value >= bound) else "MISS"


def medians(results: Sequence[Result]) -> Times:
    return {(r.variant, r.case.nbytes): r.median_us for r in results if r.us and not r.refused}


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(cells))

    lines = [line(row) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table(results: Sequence[Result]) -> str:
    """Median microseconds: variants down, sizes across, and the regime of each size. One regime per size."""
    sizes = sorted({r.case.nbytes for r in results})
    names = list(dict.fromkeys(r.variant for r in results))
    times = medians(results)
    refused = {(r.variant, r.case.nbytes) for r in results if r.refused}
    regimes = {r.case.nbytes: r.regime for r in results if not r.refused}
    rows = [["us", *map(size_name, sizes)]]
    for name in names:
        rows.append([name, *("REFUSED" if (name, s) in refused else _number(times.get((name, s))) for s in sizes)])
    return aligned([*rows, ["regime", *(regimes.get(s, "-") for s in sizes)]])


def ratio_table(ratios: Sequence[Ratio], sizes: Sequence[int]) -> str:
    """The ratios, each with its verdict where it has a target."""
    rows = [["ratio", *map(size_name, sizes)]]
    for ratio in ratios:
        cells = [f"{_number(ratio.value(s))} {ratio.verdict(s)}".strip() for s in sizes]
        if any(cell != "-" for cell in cells):
            rows.append([ratio.name, *cells])
    return aligned(rows)


def step_table(results: Sequence[Result], ratios: Sequence[Ratio], tokens: int) -> str:
    """Variants down: milliseconds and tokens per second of a step, efficiency in per cent with its target. One case."""
    rows = [["variant", "median ms", "p20", "p80", "steps", "tokens/s", "efficiency %", "target"]]
    ratio_of = {ratio.name: ratio for ratio in ratios}
    for r in results:
        if r.refused:
            rows.append([r.variant, "REFUSED", *[""] * 6])
            continue
        ratio, nbytes = ratio_of[r.variant], r.case.nbytes
        ms = [f"{us / 1e3:.1f}" for us in (r.median_us, r.quantile_us(0.2), r.quantile_us(0.8))]
        percent, limit = ratio.value(nbytes), ratio.limit(nbytes)
        target = "" if limit is None else f"{limit[0]} {limit[1]:g} {ratio.verdict(nbytes)}".strip()
        per_second = f"{1e6 * tokens / r.median_us:.0f}"
        rows.append([r.variant, *ms, str(len(r.us)), per_second, "-" if percent is None else f"{percent:.1f}", target])
    return aligned(rows)


def bars(bench: str, title: str, results: Sequence[Result], ratios: Sequence[Ratio], folder: Path = RESULTS) -> Path:
    """Time of a step by variant, with whiskers from p20 to p80, and the efficiency on each bar. One case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [r for r in results if r.us and not r.refused]
    percents = {ratio.name: ratio.value(r.case.nbytes) for ratio in ratios for r in timed if r.variant == ratio.name}
    figure, axes = pyplot.subplots(figsize=(max(6, 1.6 * len(timed) + 1), 5.5), layout="constrained")
    ms = [r.median_us / 1e3 for r in timed]
    whiskers = [
        [m - r.quantile_us(0.2) / 1e3 for m, r in zip(ms, timed, strict=True)],
        [r.quantile_us(0.8) / 1e3 - m for m, r in zip(ms, timed, strict=True)],
    ]
    whiskers = [[max(0.0, length) for length in side] for side in whiskers]  # few samples: p20 may be the median
    names = [r.variant for r in timed]
    colors = ["0.6" if name == "none" else "C0" if name.startswith(("dp-", "tp-", "zero-")) else "C1" for name in names]
    drawn = axes.bar(names, ms, yerr=whiskers, capsize=6, color=colors)
    shown = [None if name == "none" else percents[name] for name in names]
    axes.bar_label(drawn, ["" if p is None else f"{p:.1f} %" for p in shown], label_type="center", color="white")
    axes.set_ylabel("median time of a step, ms (whiskers: p20 to p80)")
    axes.set_xlabel("on the bars: efficiency, the time of none / the time of the variant")
    axes.set_title(title, fontsize=10)
    axes.grid(True, axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    return save(figure, bench, folder)


def save(figure: Any, bench: str, folder: Path) -> Path:
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def chart(bench: str, title: str, results: Sequence[Result], folder: Path = RESULTS) -> Path:
    """Latency against size, both logarithmic, one line per variant, with the spread from p20 to p80."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    names = list(dict.fromkeys(r.variant for r in results))
    for k, name in enumerate(names):
        rows = sorted((r for r in results if r.variant == name and r.us and not r.refused), key=lambda r: r.case.nbytes)
        if not rows:
            continue
        sizes = [r.case.nbytes for r in rows]
        ours, reference = name.startswith("pypar"), name.startswith("reference")
        (line,) = axes.plot(
            sizes,
            [r.median_us for r in rows],
            label=name,
            color=f"C{k % 10}",
            marker="osv^D*xP"[k % 8],
            linewidth=2.4 if ours else 1.2,
            linestyle="--" if reference else "-" if ours or name == "gloo" else ":",
        )
        low, high = [r.quantile_us(0.2) for r in rows], [r.quantile_us(0.8) for r in rows]
        axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.12)
    ticks = sorted({r.case.nbytes for r in results})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [size_name(s) for s in ticks])
    axes.set_xlabel("size of the full tensor, float32")
    axes.set_ylabel("median time per op, µs (shaded: p20 to p80)")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(loc="upper left", fontsize=9)
    return save(figure, bench, folder)


Parts = dict[str, dict[str, float]]  # variant -> {part of a step: ms}


def part_table(parts: Parts, names: Sequence[str]) -> str:
    """Variants down, parts across, milliseconds."""
    rows = [["ms", *names, "sum"]]
    for variant, of in parts.items():
        rows.append([variant, *(f"{of[name]:.1f}" for name in names), f"{sum(of.values()):.1f}"])
    return aligned(rows)


def stacked(bench: str, title: str, parts: Parts, names: Sequence[str], folder: Path = RESULTS) -> Path:
    """A bar per variant, its parts one on the other, with the milliseconds of those large enough to read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(7, 1.6 * len(parts) + 3), 6.5), layout="constrained")
    bottoms = [0.0] * len(parts)
    highest = max(sum(of.values()) for of in parts.values())
    for k, name in enumerate(names):
        heights = [max(0.0, of[name]) for of in parts.values()]
        drawn = axes.bar(list(parts), heights, bottom=bottoms, label=name, color=f"C{k}")
        axes.bar_label(drawn, [f"{h:.0f}" if h > 0.025 * highest else "" for h in heights], label_type="center")
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("ms of a step, mean of the ranks")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    axes.grid(True, axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    return save(figure, bench, folder)
