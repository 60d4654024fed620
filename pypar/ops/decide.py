"""Which form a fused matmul takes over ranks that share no memory: what it is decided by, and why.

The decision itself is csrc/cpu/decide.cpp: a pure function of sizes and of a `Calibration` that the ranks of a group
agreed on. docs/design/0006-overlap-between-hosts.md has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from pypar import backend
from pypar.ops.library import name_of
from pypar.reference.collectives import group_of

Shape = Sequence[int]

_OVERLAPS = {
    "all_gather_matmul": "gather",
    "all_gather_matmul_dw": "gather",
    "all_gather_matmul_both": "gather",
    "matmul_reduce_scatter": "scatter",
    "matmul_all_reduce": "reduce",
}
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Calibration:
    """What the links between hosts and the matmuls of a group reach.

    latency_s: of a small message from host to host. bytes_per_s: out of a host while as much comes in. chunk_s: that
    one more chunk costs beside a matmul, when the transport waits for a core. wire_cpu: share of the wire's time, 0 to
    1, that the transport takes from cores that multiply; 0 where there are cores to spare.
    *_flops: floating-point operations per second of one rank's matmul.
    """

    latency_s: float
    bytes_per_s: float
    chunk_s: float
    wire_cpu: float
    float32_flops: float
    float64_flops: float
    bfloat16_flops: float
    float16_flops: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "wire_cpu":
                if not 0 <= value <= 1:
                    raise ValueError(f"Calibration: wire_cpu is {value}, expected 0 to 1")
            elif not value > 0:
                raise ValueError(f"Calibration: {name} is {value}, expected a positive number")

    def flops(self, dtype: torch.dtype) -> float:
        name = f"{str(dtype).removeprefix('torch.')}_flops"
        if name not in asdict(self):
            raise ValueError(f"fused matmuls take float32, bfloat16, float16 and float64, got {dtype}")
        return float(asdict(self)[name])


@dataclass(frozen=True)
class Explanation:
    """form: "one host", "whole", "chunked" or "reference". Times in seconds, predicted, None where nothing is."""

    op: str
    form: str
    num_chunks: int
    matmul_s: float | None
    wire_s: float | None
    whole_s: float | None
    chunked_s: float | None
    text: str

    def __str__(self) -> str:
        return self.text


def _served(group_name: str) -> Any:
    """pypar's own group behind a name; None where another backend serves it."""
    served = group_of(group_name)._get_backend(torch.device("cpu"))
    served = getattr(served, "wrapped_pg", served)  # under TORCH_DISTRIBUTED_DEBUG=DETAIL
    return served if backend.extension is not None and isinstance(served, backend.extension.ProcessGroup) else None


def calibrate(
    group: dist.ProcessGroup | str | None = None, calibration: Calibration | None = None
) -> Calibration | None:
    """Measures what a group that spans hosts reaches, or sets it; a call of all ranks, which get the same numbers.

    Without it, the first fused matmul of the group measures (about a second). A calibration given by hand
    fixes which form every op takes, and so the bits of its sums, from one launch to the next.
    Returns None where there is nothing to decide: the ranks share memory, or pypar doesn't serve the group.
    Raises ValueError: the ranks give different calibrations.
    """
    name = name_of(group)
    served = _served(name)
    if served is None or not served.spans_hosts:
        return None
    extension = backend.extension
    assert extension is not None
    c10d_group = group_of(name)
    given: list[Calibration | None] = [None] * c10d_group.size()
    dist.all_gather_object(given, calibration, group=c10d_group)
    if any(other != given[0] for other in given):
        said = ", ".join(f"rank {r}: {other}" for r, other in enumerate(given))
        raise ValueError(f"calibrate: the ranks give different calibrations ({said}); pass the same on all")
    extension.set_calibration(name, extension.Calibration(astuple(calibration)) if calibration else None)
    return _agreed(name)


def _agreed(group_name: str) -> Calibration:
    assert backend.extension is not None
    agreed = backend.extension.calibration(group_name)
    return Calibration(*(getattr(agreed, name) for name in Calibration.__dataclass_fields__))


def explain(
    op: str,
    shapes: Sequence[Shape],
    dtype: torch.dtype = torch.float32,
    group: dist.ProcessGroup | str | None = None,
    hosts: Sequence[int] | None = None,
    calibration: Calibration | None = None,
) -> Explanation:
    """Which form a fused matmul takes, and why, with the times that decide it. print() it for the text.

    shapes: of the tensors that one rank passes: all_gather_matmul x [M_r, K], w_i [N_i, K] ...; matmul_reduce_scatter
    and matmul_all_reduce x [M, K], w [N, K]; of their backward, all_gather_matmul_dw x [M_r, K], dy_i [M, N_i] ... and
    all_gather_matmul_both dy [M_r, N], x [M, K], w [N, K].
    hosts: ranks on each host; default, as they are in `group`. calibration: default, the group's, which is a call of
    all ranks where it was not measured yet; with `hosts` given, needed.
    Raises ValueError: an unknown op, shapes that don't fit, nothing to calibrate with.
    """
    if op not in _OVERLAPS:
        raise ValueError(f"explain: unknown op {op!r}; it knows {', '.join(_OVERLAPS)}")
    head = f"{op}({', '.join(str(list(s)) for s in shapes)}, {str(dtype).removeprefix('torch.')})"
    if backend.extension is None:
        text = f"{head}: reference; the compiled extension is absent, plain torch communicates and multiplies"
        return Explanation(op, "reference", 1, None, None, None, None, text)
    if hosts is None:
        served = _served(name_of(group))
        if served is None:
            text = f"{head}: another backend than pypar serves the group: in shared memory on one host, else whole"
            return Explanation(op, "whole", 1, None, None, None, None, text)
        hosts = [len(ranks) for ranks in served.hosts]
        if len(hosts) > 1 and calibration is None:
            calibration = _agreed(name_of(group))
    if not hosts or min(hosts) < 1:
        raise ValueError(f"explain: hosts is {list(hosts)}, expected the number of ranks on each host")
    world = sum(hosts)
    rows, cols, flop = _sizes(op, [list(s) for s in shapes], world)
    head += f", {world} rank{'s' * (world > 1)} on {len(hosts)} host{'s' * (len(hosts) > 1)}"
    if len(hosts) == 1:
        text = (
            f"{head}: one host; rows are multiplied, or made, where they lie in shared memory: there is no copy to hide"
        )
        return Explanation(op, "one host", 1, None, None, None, None, text)
    if calibration is None:
        raise ValueError("explain: hosts are given without a calibration; pass calibration=pypar.Calibration(...)")
    # Hosts that add several ranks' shares send float32 sums of half types, to round them once.
    widened = dtype in _HALF and _OVERLAPS[op] != "gather" and world > len(hosts)
    row_bytes = cols * (4 if widened else dtype.itemsize)
    d = backend.extension.decide(
        _OVERLAPS[op],
        rows,
        row_bytes,
        flop,
        calibration.flops(dtype),
        len(hosts),
        calibration.latency_s,
        calibration.bytes_per_s,
        calibration.chunk_s,
        calibration.wire_cpu,
    )
    form = "chunked" if d["num_chunks"] > 1 else "whole"
    text = f"{head}: {_why(d, form, rows, flop, calibration, dtype)}"
    return Explanation(op, form, d["num_chunks"], d["matmul_s"], d["wire_s"], d["whole_s"], d["chunked_s"], text)


def _sizes(op: str, shapes: list[list[int]], world: int) -> tuple[int, int, float]:
    """(rows of the whole product, columns of what travels, operations of one rank's matmul)."""

    def need(fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"explain: {op} takes {expected}, got {shapes}")

    need(len(shapes) >= 2 and all(len(s) == 2 for s in shapes), "two matrices or more")
    x, w = shapes[0], shapes[1]
    if op == "all_gather_matmul":
        need(all(s[1] == x[1] for s in shapes), "x [M_r, K], w [N, K] ...")
        rows, travels, per_row = x[0] * world, x[1], sum(s[0] * x[1] for s in shapes[1:])
    elif op == "all_gather_matmul_dw":
        need(all(s[0] == x[0] * world for s in shapes[1:]), f"x [M_r, K], dy [{world} * M_r, N] ...")
        rows, travels, per_row = x[0] * world, x[1], sum(s[1] * x[1] for s in shapes[1:])
    elif op == "all_gather_matmul_both":
        need(len(shapes) == 3 and shapes[2] == [x[1], w[1]], "dy [M_r, N], x [M, K], w [N, K]")
        rows, travels, per_row = w[0], x[1], 2 * x[1] * w[1]
    else:
        need(len(shapes) == 2 and w[1] == x[1], "x [M, K], w [N, K]")
        rows, travels, per_row = x[0], w[0], w[0] * x[1]
    return rows, travels, 2.0 * rows * per_row


def _why(d: dict[str, Any], form: str, rows: int, flop: float, calibration: Calibration, dtype: torch.dtype) -> str:
    matmul, wire = d["matmul_s"], d["wire_s"]
    gain = d["whole_s"] / d["chunked_s"]
    most = 1 + min(matmul, wire) / max(matmul, wire) if max(matmul, wire) > 0 else 1.0
    if form == "chunked":
        why = f"chunked, {d['num_chunks']} chunks: the rows of one travel while another is multiplied"
    elif rows < 48:
        why = f"whole: a plain matmul and one small message; {rows} rows are below 48"
    elif d["chunked_s"] == d["whole_s"]:
        why = f"whole: {rows} rows make no two chunks of 64 on every host"
    else:
        why = "whole: chunks would gain less than 5 %"
    flops = calibration.flops(dtype)
    return (
        f"{why}\n"
        f"  matmul {1e3 * matmul:.3g} ms a rank: {flop / 1e9:.3g} GFLOP at {flops / 1e9:.3g} GFLOP/s\n"
        f"  wire {1e3 * wire:.3g} ms: {wire * calibration.bytes_per_s / 1e6:.3g} MB out of each host at "
        f"{calibration.bytes_per_s / 1e6:.4g} MB/s, {100 * calibration.wire_cpu:.0f} % of it on cores that multiply\n"
        f"  a message {1e6 * calibration.latency_s:.3g} us, one more chunk {1e6 * calibration.chunk_s:.3g} us\n"
        f"  whole {1e3 * d['whole_s']:.3g} ms, in chunks {1e3 * d['chunked_s']:.3g} ms: {gain:.2f} times as fast, "
        f"at best {most:.2f}"
    )
