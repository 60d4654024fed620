"""What the device reaches, measured in the same run: the rooflines of the report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Reached:
    """Per second: operations of a matmul by dtype, bytes of memory read and written, bytes one way to a peer."""

    flops: dict[str, float]
    memory_bytes: float
    peer_bytes: float


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Of one call, by the device's clock where it has one; the calls are queued one behind the other."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        sync(device)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        sync(device)
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def median_seconds(run: Callable[[], object], device: str, repeats: int, rounds: int = 5) -> float:
    run()
    return statistics.median(seconds(run, device, repeats) for _ in range(rounds))


def measure(device: str, is_small: bool) -> Reached:
    """A call of all ranks. is_small: for a CPU that only tests this code."""
    n, numel = (64, 1 << 12) if is_small else (8192, 1 << 28)
    repeats = 1 if is_small else 10
    flops = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        flops[str(dtype).removeprefix("torch.")] = 2 * n**3 / median_seconds(lambda a=a, b=b: a @ b, device, repeats)
    source = torch.zeros(numel, device=device)
    target = torch.empty_like(source)
    memory = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats)
    peer = (dist.get_rank() + 1) % dist.get_world_size()

    def exchange() -> None:  # each sends to the next one, all at once
        works = [
            dist.P2POp(dist.isend, source, peer),
            dist.P2POp(dist.irecv, target, (dist.get_rank() - 1) % dist.get_world_size()),
        ]
        for work in dist.batch_isend_irecv(works):
            work.wait()

    to_peer = source.nbytes / median_seconds(exchange, device, repeats) if dist.get_world_size() > 1 else memory
    return Reached(flops, memory, to_peer)
