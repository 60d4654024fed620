"""Where the time of a training step goes, from torch.profiler's events of the thread that trains.

Every event gives its own time (without what it called) to one category:

- matmul, attention: by the name of the op. The matmul inside a fused op of pypar is a matmul.
- optimizer: every op inside Optimizer.step and Optimizer.zero_grad, except communication; zero_step.
- communication: pypar's collectives and fused ops without their matmul, c10d's, gloo's, and waits for them.
- waiting: the part of an exchange before the last rank came to it. The k-th exchange of every rank is the same one,
  and the ranks of a host have one clock; a rank comes to a fused op when its matmul inside is done.
- other compute: any other op of torch that touches elements: norms, activations, rotary embedding, copies, loss.
- python: the remainder of the step: views, allocation, autograd, DTensor's dispatch, Python itself. The profiler's own
  cost is taken out of it: the number of events times what one costs in a loop of an op that does nothing.

vocab_cross_entropy computes and exchanges three numbers per row: its time is other compute, but for the waiting.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

CATEGORIES = ("matmul", "attention", "other compute", "optimizer", "communication", "waiting", "python")

_MATMUL = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::mv", "aten::addmv"}
_NO_ELEMENTS = {
    *("aten::t", "aten::transpose", "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::as_strided"),
    *(
        "aten::expand",
        "aten::unsqueeze",
        "aten::squeeze",
        "aten::detach",
        "aten::slice",
        "aten::narrow",
        "aten::select",
    ),
    *(
        "aten::split",
        "aten::chunk",
        "aten::unflatten",
        "aten::flatten",
        "aten::permute",
        "aten::alias",
        "aten::view_as",
    ),
    *("aten::linear", "aten::matmul", "aten::to", "aten::contiguous", "aten::empty", "aten::empty_strided"),
    *("aten::empty_like", "aten::resize_", "aten::result_type", "aten::scaled_dot_product_attention", "aten::item"),
    *("aten::is_same_size", "aten::expand_as", "aten::_reshape_alias", "aten::cross_entropy_loss", "aten::rms_norm"),
    *("aten::nll_loss_nd", "aten::embedding_backward", "aten::numpy_T", "aten::unbind", "aten::new_empty"),
}
_COMMUNICATION = ("pypar::", "pypar:", "c10d::", "_c10d_functional", "gloo:", "record_param_comms")
_COMPUTE = {"pypar::vocab_cross_entropy", "pypar::vocab_cross_entropy_dlogits", "pypar::linear_vocab_cross_entropy"}


def category(name: str) -> str:
    """Of an event's own time; "" for what is in the remainder."""
    if name in _MATMUL:
        return "matmul"
    if "scaled_dot_product" in name and name not in _NO_ELEMENTS:
        return "attention"
    if name in _COMPUTE:
        return "other compute"
    if name == "pypar::zero_step":
        return "optimizer"
    if name.startswith(_COMMUNICATION):
        return "communication"
    if name.startswith("aten::") and name not in _NO_ELEMENTS:
        return "other compute"
    return ""


@dataclass(frozen=True)
class Exchange:
    """came_us: when this rank was ready for the others, on the host's clock. own_us: how long it took from there."""

    came_us: float
    own_us: float
    kind: str


@dataclass
class StepProfile:
    """Of one step of one rank, microseconds. ops: own time of every op that is in no remainder."""

    wall_us: float
    num_events: int = 0
    event_cost_us: float = 0.0
    categories: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)
    exchanges: list[Exchange] = field(default_factory=list)


def profile(step: Callable[[], None], barrier: Callable[[], None], num_steps: int) -> list[StepProfile]:
    profiles = []
    for _ in range(num_steps):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            barrier()
            start = time.perf_counter_ns()
            step()
            wall_us = (time.perf_counter_ns() - start) / 1e3
        profiles.append(_profile_of(profiler, wall_us))
    return profiles


def _profile_of(profiler: Any, wall_us: float) -> StepProfile:
    result = StepProfile(wall_us, event_cost_us=_event_cost_us())
    origin_us = profiler.profiler.kineto_results.trace_start_ns() / 1e3
    roots = [event for event in profiler.events() if event.cpu_parent is None]
    trains = Counter(event.thread for event in roots).most_common(1)[0][0]  # gloo has threads of its own
    mine = sorted((e for e in roots if e.thread == trains), key=lambda e: e.time_range.start)
    for event, in_optimizer in _walk(mine):
        result.num_events += 1
        kind, own_us = category(event.name), event.self_cpu_time_total
        if not kind or _calls_itself(event):
            continue
        if in_optimizer and kind != "communication":
            kind = "optimizer"
        result.categories[kind] += own_us
        result.ops[event.name] += own_us
        if kind == "communication" or event.name in _COMPUTE:
            products = [child.time_range.end for child in event.cpu_children if category(child.name) == "matmul"]
            came_us = origin_us + max(products, default=event.time_range.start)
            result.exchanges.append(Exchange(came_us, own_us, kind))
    return result


def _walk(events: Sequence[Any], in_optimizer: bool = False) -> Iterator[tuple[Any, bool]]:
    for event in events:
        inside = in_optimizer or event.name.startswith("Optimizer.")
        yield event, inside
        yield from _walk(event.cpu_children, inside)


def _calls_itself(event: Any) -> bool:
    """A DTensor's op, which runs the same op on the shard: its own time is dispatch."""
    return any(child.name == event.name or _calls_itself(child) for child in event.cpu_children)


@functools.cache
def _event_cost_us(num: int = 500) -> float:
    x = torch.zeros(1)

    def loop_us() -> float:
        start = time.perf_counter_ns()
        for _ in range(num):
            x.detach()  # one event
        return (time.perf_counter_ns() - start) / 1e3

    plain_us = min(loop_us() for _ in range(10))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        profiled_us = min(loop_us() for _ in range(10))
    return max(0.0, profiled_us - plain_us) / num


def least_disturbed(by_rank: Sequence[Sequence[StepProfile]]) -> list[StepProfile]:
    """Of the step whose slowest rank was the fastest, the profile of every rank."""
    return list(min(zip(*by_rank, strict=True), key=lambda step: max(p.wall_us for p in step)))


def merge(step: Sequence[StepProfile]) -> dict[str, float]:
    """{category: microseconds}, the mean of the ranks of one step. What a rank waited is taken out of where it did."""
    if len({len(p.exchanges) for p in step}) != 1:
        raise ValueError(f"the ranks had {[len(p.exchanges) for p in step]} exchanges, expected the same number")
    of_ranks = [{name: p.categories[name] for name in CATEGORIES} for p in step]
    for same in zip(*(p.exchanges for p in step), strict=True):
        last_us = max(exchange.came_us for exchange in same)
        for us, exchange in zip(of_ranks, same, strict=True):
            wait_us = min(exchange.own_us, last_us - exchange.came_us)
            us["waiting"] += wait_us
            us[exchange.kind] -= wait_us
    for us, p in zip(of_ranks, step, strict=True):
        us["python"] = max(0.0, p.wall_us - sum(us.values()) - p.num_events * p.event_cost_us)
    return {name: statistics.mean(us[name] for us in of_ranks) for name in CATEGORIES}
