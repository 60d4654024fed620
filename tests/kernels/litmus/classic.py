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


def chain_of_writes(middle: str) -> Program:
    """Only atomics hand a release on: a plain write in between ends it."""
    counts = (add("y", "c", 1, "relaxed", "sys", want=1),)
    writes = (load("y", "c", "relaxed", "sys", want=1), store("c", 2, "relaxed", "sys"))
    return Program(
        (
            Thread((store("data", 1), store("c", 1, "release", "sys"))),
            Thread(counts if middle == "RMW" else writes, gpu=1),
            Thread((load("z", "c", "acquire", "sys", want=2), load("d", "data")), gpu=2),
        ),
        lambda r: r["d"] == 0,
    )


def fenced(scope: str) -> Program:
    """Relaxed accesses of the system between fences of `scope`."""
    return two(
        (store("data", 1), fence("acq_rel", scope), store("flag", 1, "relaxed", "sys")),
        (load("f", "flag", "relaxed", "sys", want=1), fence("acq_rel", scope), load("d", "data")),
        lambda r: r["d"] == 0,
    )


def patterns(of_release: bool) -> Program:
    """A release and a later write of its location, or a read and a later acquire of it: patterns of two accesses."""
    if of_release:
        return two(
            (store("data", 1), store("flag", 1, "release", "sys"), store("flag", 2, "relaxed", "sys")),
            (load("f", "flag", "acquire", "sys", want=2), load("d", "data")),
            lambda r: r["d"] == 0,
        )
    reads = (
        load("f", "flag", "relaxed", "sys", want=1),
        load("g", "flag", "acquire", "sys", want=5),
        load("d", "data"),
    )
    return Program(
        (
            Thread((store("data", 1), store("flag", 1, "release", "sys"))),
            Thread(reads, gpu=1),
            Thread((store("flag", 5, "relaxed", "sys"),), gpu=2),  # so that the acquire itself finds no release
        ),
        lambda r: r["d"] == 0,
    )


def atomics(scope: str) -> Program:
    """Two that add: both find 0?"""
    return two((add("a", "x", 1, "relaxed", scope),), (add("b", "x", 1, "relaxed", scope),), lambda r: r["a"] == r["b"])


def atomic_and_store(scope: str) -> Program:
    """An atomic that read 0 and the other's write between its read and its write: 1 must not stay."""
    return Program(
        (
            Thread((add("a", "x", 1, "relaxed", scope, want=0), store("f", 1, "release", "sys"))),
            Thread((store("x", 10, "relaxed", scope), store("g", 1, "release", "sys")), gpu=1),
            Thread(
                (
                    load("h", "f", "acquire", "sys", want=1),
                    load("i", "g", "acquire", "sys", want=1),
                    load("b", "x", "relaxed", "sys"),
                ),
                gpu=2,
            ),
        ),
        lambda r: r["b"] == 1,
    )


def coherent_writes() -> Program:
    """Weak writes of two threads, one behind the other by release and acquire: the first one must not stay."""
    return Program(
        (
            Thread((store("x", 1), store("f", 1, "release", "sys"))),
            Thread((load("a", "f", "acquire", "sys", want=1), store("x", 2), store("g", 1, "release", "sys")), gpu=1),
            Thread((load("b", "g", "acquire", "sys", want=1), load("c", "x")), gpu=2),
        ),
        lambda r: r["c"] != 2,
    )


def barriers_met(blocks: int, first_only: bool) -> Program:
    """bar.sync of another block, or data stored behind the barrier that the flag's thread has passed."""
    data = (bar(), store("data", 1), bar()) if first_only else (store("data", 1), bar())
    flag = (bar(), store("flag", 1, "release", "sys"), *((bar(),) if first_only else ()))
    return Program(
        (
            Thread(data),
            Thread(flag, block=blocks - 1),
            Thread((load("f", "flag", "acquire", "sys", want=1), load("d", "data")), gpu=1),
        ),
        lambda r: r["d"] == 0,
    )


def buffering_in_scope(scope: str) -> Program:
    return two(
        (store("x", 1, "relaxed", "sys"), fence("sc", scope), load("a", "y", "relaxed", "sys")),
        (store("y", 1, "relaxed", "sys"), fence("sc", scope), load("b", "x", "relaxed", "sys")),
        lambda r: r["a"] == r["b"] == 0,
    )


def writes_cross(with_fences: bool) -> Program:
    """2+2W; the next kernel reads what is left."""
    between = (fence("sc"),) if with_fences else ()
    return Program(
        (
            Thread((store("x", 1, "relaxed", "sys"), *between, store("y", 2, "relaxed", "sys"))),
            Thread((store("y", 1, "relaxed", "sys"), *between, store("x", 2, "relaxed", "sys")), block=1),
            Thread((load("a", "x"), load("b", "y")), kernel=1),
        ),
        lambda r: (r["a"], r["b"]) == (1, 1),
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
    "MP through an atomic on a store": (chain_of_writes("RMW"), False, False),
    "MP through a relaxed store": (chain_of_writes("W"), True, True),
    "MP, fences": (fenced("sys"), False, False),
    "MP, fences at the GPU's scope on two": (fenced("gpu"), True, True),
    "MP, release then a write of the flag": (patterns(True), False, False),
    "MP, a read then an acquire of the flag": (patterns(False), False, False),
    "MP through bar.sync of two blocks": (barriers_met(2, False), True, True),
    "MP, stored behind the bar.sync": (barriers_met(1, True), True, True),
    "SB, fence.sc at the GPU's scope on two": (buffering_in_scope("gpu"), True, False),
    "2+2W": (writes_cross(False), True, False),
    "2+2W, fence.sc": (writes_cross(True), False, False),
    "CoWW, weak and ordered": (coherent_writes(), False, False),
    "two atomics": (atomics("sys"), False, False),
    "two atomics at the GPU's scope on two": (atomics("gpu"), True, True),
    "an atomic and a store": (atomic_and_store("sys"), False, False),
    "an atomic and a store at the GPU's scope on two": (atomic_and_store("gpu"), True, True),
}
