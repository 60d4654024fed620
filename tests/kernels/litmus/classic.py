"""Programs whose verdict under PTX is published or plain: they hold the model, not the protocol."""

from __future__ import annotations

from kernels.litmus.model import Program, Thread, add, bar, fence, load, store


def two(first: tuple, second: tuple, stale, same_gpu: bool = False) -> Program:
    return Program((Thread(first), Thread(second, gpu=0 if same_gpu else 1, block=1)), stale)


def passes(write: str, read: str, scope: str, same_gpu: bool = False) -> Program:
    """Message passing: data, then a flag; the flag is seen, is the data?"""
    return two(
        (store("data", 1), store("flag", 1, write, scope)),
        (load("f", "flag", read, scope, want=1), load("d", "data")),
        lambda r: r["d"] == 0,
        same_gpu,
    )


def buffering(with_fences: bool) -> Program:
    between = (fence("sc"),) if with_fences else ()
    return two(
        (store("x", 1, "relaxed", "sys"), *between, load("a", "y", "relaxed", "sys")),
        (store("y", 1, "relaxed", "sys"), *between, load("b", "x", "relaxed", "sys")),
        lambda r: r["a"] == r["b"] == 0,
    )


def independent_reads(with_fences: bool) -> Program:
    between = (fence("sc"),) if with_fences else ()
    writers = (Thread((store("x", 1, "relaxed", "sys"),)), Thread((store("y", 1, "relaxed", "sys"),), gpu=1))
    one = (load("a", "x", "acquire", "sys"), *between, load("b", "y", "acquire", "sys"))
    other = (load("c", "y", "acquire", "sys"), *between, load("d", "x", "acquire", "sys"))
    return Program(
        (*writers, Thread(one, gpu=2), Thread(other, gpu=3)), lambda r: (r["a"], r["b"], r["c"], r["d"]) == (1, 0, 1, 0)
    )


def load_buffering(write: str, read: str) -> Program:
    return two(
        (load("a", "x", read, "sys"), store("y", 1, write, "sys")),
        (load("b", "y", read, "sys"), store("x", 1, write, "sys")),
        lambda r: r["a"] == r["b"] == 1,
    )


def coherent_reads(sem: str) -> Program:
    return two(
        (store("x", 1, sem, "sys"),),
        (load("a", "x", sem, "sys"), load("b", "x", sem, "sys")),
        lambda r: (r["a"], r["b"]) == (1, 0),
    )


def third_thread(read: str) -> Program:
    """Write to read causality: what a thread was told, it tells on."""
    return Program(
        (
            Thread((store("data", 1), store("flag", 1, "release", "sys"))),
            Thread((load("f", "flag", read, "sys", want=1), store("next", 1, "release", "sys")), gpu=1),
            Thread((load("n", "next", "acquire", "sys", want=1), load("d", "data")), gpu=2),
        ),
        lambda r: r["d"] == 0,
    )


def through_barrier(with_barrier: bool) -> Program:
    between = (bar(),) if with_barrier else ()
    return Program(
        (
            Thread((store("data", 1), *between)),
            Thread((*between, store("flag", 1, "release", "sys"))),
            Thread((load("f", "flag", "acquire", "sys", want=1), load("d", "data")), gpu=1),
        ),
        lambda r: r["d"] == 0,
    )


def through_atomic(sem: str) -> Program:
    """The flag is counted up by another thread in between."""
    return Program(
        (
            Thread((store("data", 1), add("x", "count", 1, "release", "sys", want=0))),
            Thread((add("y", "count", 1, sem, "sys", want=1),), gpu=1),
            Thread((load("c", "count", "acquire", "sys", want=2), load("d", "data")), gpu=2),
        ),
        lambda r: r["d"] == 0,
    )


# name: (program, whether the outcome is allowed, whether there is a race)
CLASSIC = {
    "MP, release and acquire": (passes("release", "acquire", "sys"), False, False),
    "MP, relaxed": (passes("relaxed", "relaxed", "sys"), True, True),
    "MP, no acquire": (passes("release", "relaxed", "sys"), True, True),
    "MP, no release": (passes("relaxed", "acquire", "sys"), True, True),
    "MP, weak": (passes("weak", "weak", "sys"), True, True),
    "MP, scope of the GPU on one GPU": (passes("release", "acquire", "gpu", same_gpu=True), False, False),
    "MP, scope of the GPU on two": (passes("release", "acquire", "gpu"), True, True),
    "MP, scope of the block on one GPU": (passes("release", "acquire", "cta", same_gpu=True), True, True),
    "SB": (buffering(False), True, False),
    "SB, fence.sc": (buffering(True), False, False),
    "IRIW, acquire": (independent_reads(False), True, False),
    "IRIW, fence.sc": (independent_reads(True), False, False),
    "LB, relaxed": (load_buffering("relaxed", "relaxed"), True, False),
    "LB, release and acquire": (load_buffering("release", "acquire"), False, False),
    "CoRR, relaxed": (coherent_reads("relaxed"), False, False),
    "CoRR, weak": (coherent_reads("weak"), True, True),
    "WRC, acquire in between": (third_thread("acquire"), False, False),
    "WRC, relaxed in between": (third_thread("relaxed"), True, True),
    "MP through bar.sync": (through_barrier(True), False, False),
    "MP without bar.sync": (through_barrier(False), True, True),
    "MP through a relaxed atomic": (through_atomic("relaxed"), False, False),
}
