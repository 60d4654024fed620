"""Tables, ratios against targets, and charts of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def _aligned(rows: list[list[str]]) -> str:
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
    return _aligned([*rows, ["regime", *(regimes.get(s, "-") for s in sizes)]])


def ratio_table(ratios: Sequence[Ratio], sizes: Sequence[int]) -> str:
    """The ratios, each with its verdict where it has a target."""
    rows = [["ratio", *map(size_name, sizes)]]
    for ratio in ratios:
        cells = [f"{_number(ratio.value(s))} {ratio.verdict(s)}".strip() for s in sizes]
        if any(cell != "-" for cell in cells):
            rows.append([ratio.name, *cells])
    return _aligned(rows)


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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
