"""What is timed: each op of pypar beside what torch has for the same, and the least that it must compute and move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu.peers import Make, Run, peers_of

Find = Callable[[str], Callable[..., Any]]


@dataclass
class Program:
    """One op at one size. variants[0] is pypar; flops, memory and peer bytes are of one rank. peers: variants that may
    not be there, or not work."""

    op: str
    size: str
    variants: dict[str, Run]
    dtype: str
    flops: float = 0.0
    memory_bytes: float = 0.0
    peer_bytes: float = 0.0
    peers: dict[str, Make] = field(default_factory=dict)


def _collective(op: str, nbytes: int, find: Find, device: str) -> Program:
    world, name = dist.get_world_size(), dist.group.WORLD.group_name
    numel = nbytes // 2 // world * world
    x = torch.randn(numel, device=device).to(torch.bfloat16)
    ours, share = find(op), nbytes * (world - 1) / world
    if op == "all_reduce":

        def theirs() -> torch.Tensor:
            out = x.clone()
            dist.all_reduce(out)
            return out

        variants, peer_bytes = {"pypar": lambda: ours(x, "sum", name), "torch": theirs}, 2 * share
    elif op == "reduce_scatter":
        part = torch.empty(numel // world, dtype=x.dtype, device=device)

        def theirs() -> torch.Tensor:
            dist.reduce_scatter_tensor(part, x)
            return part

        variants, peer_bytes = {"pypar": lambda: ours(x, "sum", name), "torch": theirs}, share
    else:
        whole = torch.empty(numel * world, dtype=x.dtype, device=device)

        def theirs() -> torch.Tensor:
            dist.all_gather_into_tensor(whole, x)
            return whole

        variants, peer_bytes = {"pypar": lambda: ours(x, name), "torch": theirs}, nbytes * (world - 1)
    return Program(op, f"{nbytes >> 10} KiB", variants, "bfloat16", peer_bytes=peer_bytes)


def _random(rows: int, columns: int, device: str, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(rows, columns, device=device) * scale).to(torch.bfloat16)


def _gather_matmul(rows: int, hidden: int, inner: int, find: Find, device: str) -> Program:
    world, name = dist.get_world_size(), dist.group.WORLD.group_name
    x, w = _random(rows // world, hidden, device), _random(inner // world, hidden, device, hidden**-0.5)
    gathered, ours = torch.empty(rows, hidden, dtype=x.dtype, device=device), find("all_gather_matmul")

    def theirs() -> torch.Tensor:
        dist.all_gather_into_tensor(gathered, x)
        return gathered @ w.t()

    variants = {"pypar": lambda: ours(x, [w], [], None, name)[0], "torch": theirs}
    flops = 2.0 * rows * hidden * inner / world
    return Program(
        "all_gather_matmul",
        f"{rows} x {hidden} x {inner}",
        variants,
        "bfloat16",
        flops,
        peer_bytes=x.nbytes * (world - 1),
        peers=peers_of("all_gather_matmul", x, w),
    )


def _row_parallel(op: str, rows: int, hidden: int, inner: int, find: Find, device: str) -> Program:
    world, name = dist.get_world_size(), dist.group.WORLD.group_name
    x, w = _random(rows, inner // world, device), _random(hidden, inner // world, device, inner**-0.5)
    part, ours = torch.empty(rows // world, hidden, dtype=x.dtype, device=device), find(op)
    peers: dict[str, Make] = {}
    if op == "matmul_all_reduce":

        def theirs() -> torch.Tensor:
            y = x @ w.t()
            dist.all_reduce(y)
            return y

        variants = {"pypar": lambda: ours([x], [w], None, None, name), "torch": theirs}
    else:

        def theirs() -> torch.Tensor:
            dist.reduce_scatter_tensor(part, x @ w.t())
            return part

        variants = {"pypar": lambda: ours([x], [w], None, None, None, name), "torch": theirs}
        peers = peers_of(op, x, w)
    flops = 2.0 * rows * hidden * inner / world
    peer_bytes = part.nbytes * (world - 1) * (2 if op == "matmul_all_reduce" else 1)
    size = f"{rows} x {hidden} x {inner}"
    return Program(op, size, variants, "bfloat16", flops, peer_bytes=peer_bytes, peers=peers)


def _step(numel: int, find: Find, device: str) -> Program:
    given = [torch.rand(numel, device=device) for _ in range(4)]
    param = torch.nn.Parameter(given[0].clone())
    param.grad = given[1].clone()
    fused = torch.optim.AdamW([param], lr=1e-3, fused=True)
    ours, settings = find("zero_step"), (1, 1e-3, 0.9, 0.999, 1e-8, 1e-2, 1.0, True, False)
    variants = {"pypar": lambda: ours(*given, None, None, *settings), "torch": fused.step}
    moved = 4.0 * numel * 7  # the gradient read; weight and both moments read and written
    return Program("zero_step", f"{numel} parameters", variants, "float32", memory_bytes=moved)


COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
ROW_PARALLEL = ("matmul_reduce_scatter", "matmul_all_reduce")


def programs(find: Find, ops: tuple[str, ...], device: str, is_small: bool) -> Iterator[Program]:
    """Those that an executor has, one at a time; is_small: for a CPU that only tests this code."""
    sizes = (1 << 10, 8 << 10) if is_small else (1 << 10, 16 << 10, 256 << 10, 1 << 20, 8 << 20, 64 << 20)
    shapes = ((64, 32, 64),) if is_small else ((2048, 4096, 11008), (8192, 8192, 28672))
    world = dist.get_world_size()
    shapes = tuple((rows // world * world, hidden, inner // world * world) for rows, hidden, inner in shapes)
    for op in COLLECTIVES:
        if op in ops:
            yield from (_collective(op, nbytes, find, device) for nbytes in sizes)
    for shape in shapes:
        if "all_gather_matmul" in ops:
            yield _gather_matmul(*shape, find, device)
        yield from (_row_parallel(op, *shape, find, device) for op in ROW_PARALLEL if op in ops)
    if "zero_step" in ops:
        yield _step(1 << 10 if is_small else 1 << 26, find, device)
