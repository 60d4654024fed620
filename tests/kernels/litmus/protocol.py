"""Every edge of docs/gpu_kernels.md as a small program, and the mistakes that break it.

Two threads stand for a block: 0 moves data, 1 signals, or the other way round. Names: `data` what is written into a
slot, `full` and `empty` flags, `epoch`, `done` as in csrc/cuda/channel.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.litmus.model import Op, Program, Thread, add, bar, fence, load, store


@dataclass(frozen=True)
class Edge:
    """mistakes: name -> the program with it, which must race or go wrong."""

    name: str
    program: Program
    mistakes: dict[str, Program]


def publish(flag: str, call: int = 1, sem: str = "release", scope: str = "sys") -> Op:
    return store(flag, call, sem, scope)


def consume(
    flag: str, call: int = 1, sem: str = "relaxed", has_fence: bool = True, fence_scope: str = "sys"
) -> tuple[Op, ...]:
    """A spin that has found its flag, of this call or a later one, and the fence behind it."""
    between = (fence("acq_rel", fence_scope),) if has_fence else ()
    return (load(f"saw {flag} {call}", flag, sem, "sys", least=call), *between)


def push(
    barrier_before: bool = True,
    barrier_after: bool = True,
    sem: str = "release",
    scope: str = "sys",
    poll: str = "relaxed",
    has_fence: bool = True,
    is_async: bool = False,
    fence_scope: str = "sys",
) -> Program:
    """publish() of a block on GPU 0, wait() of a block on GPU 1, whose other thread reads the data."""
    before = (bar(),) if barrier_before else ()
    after = (bar(),) if barrier_after else ()
    return Program(
        (
            Thread((store("data", 1, is_async=is_async), *before)),
            Thread((*before, publish("full", 1, sem, scope))),
            Thread((*consume("full", 1, poll, has_fence, fence_scope), *after), gpu=1),
            Thread((*after, load("d", "data")), gpu=1),
        ),
        lambda r: r["d"] == 0,
    )


def last_arriver(count: str = "acq_rel", scope: str = "gpu", barrier: bool = True) -> Program:
    """Two blocks store; the last one to count publishes for both."""
    between = (bar(),) if barrier else ()
    return Program(
        (
            Thread((store("data", 1), *between), block=0),
            Thread((*between, add("first", "done", 1, count, scope, want=0)), block=0),
            Thread((add("last", "done", 1, count, scope, want=1), publish("full")), block=1),
            Thread((*consume("full"), load("d", "data")), gpu=1),
        ),
        lambda r: r["d"] == 0,
    )


def slot_again(gated: bool = True, sem: str = "release", early: bool = False, poll_fence: bool = True) -> Program:
    """Call n was read on GPU 1, which says so; GPU 0 writes call n + 2 into the same slot, too early for n if read."""
    said = publish("empty", 1, sem)
    read = load("d", "data")
    return Program(
        (
            Thread(
                (
                    store("data", 1),
                    publish("full"),
                    *(consume("empty", 1, has_fence=poll_fence) if gated else ()),
                    store("data", 2),
                )
            ),
            Thread((*consume("full"), *((said, read) if early else (read, said))), gpu=1),
        ),
        lambda r: r["d"] != 1,
    )


def slot_again_by_blocks(count: str = "acq_rel") -> Program:
    """finish(): two blocks of GPU 1 read, the last one to count gives the slot back."""
    return Program(
        (
            Thread((store("data", 1), publish("full"), *consume("empty"), store("data", 2))),
            Thread(
                (*consume("full"), load("d", "data"), add("first", "done", 1, count, "gpu", want=0)), gpu=1, block=0
            ),
            Thread((add("last", "done", 1, count, "gpu", want=1), publish("empty")), gpu=1, block=1),
        ),
        lambda r: r["d"] != 1,
    )


def slot_again_by_threads(gated: bool = True, behind_gate: bool = True, before_finish: bool = True) -> Program:
    """gate() and finish() with the thread that signals apart from the one that moves data; call 3 is waited for too."""
    gate, into, out = consume("empty") if gated else (), (bar(),) * behind_gate, (bar(),) * before_finish
    return Program(
        (
            Thread((store("data", 1), bar(), *into, store("data", 3), bar())),
            Thread((bar(), publish("full"), *gate, *into, bar(), publish("full", 3))),
            Thread((*consume("full"), bar(), *out, publish("empty"), *consume("full", 3), bar()), gpu=1),
            Thread((bar(), load("d", "data"), *out, bar(), load("e", "data")), gpu=1),
        ),
        lambda r: (r["d"], r["e"]) != (1, 3),
    )


def pairs_again(gated: bool = True, early: bool = False) -> Program:
    """A pair of call 1 (11), overwritten by call 3 (31): it must still be there when call 1 looks."""
    said, read = publish("empty"), load("p", "pair", "relaxed", "sys", least=11)
    return Program(
        (
            Thread(
                (
                    store("pair", 11, "relaxed", "sys"),
                    *(consume("empty") if gated else ()),
                    store("pair", 31, "relaxed", "sys"),
                )
            ),
            Thread((said, read) if early else (read, said), gpu=1),
        ),
        lambda r: r["p"] != 11,
    )


def end_of_call(count: str = "acq_rel") -> Program:
    """Every block reads the epoch as it begins; the last one to count writes done and epoch without an order."""

    def begins(reg: str) -> Op:
        return load(reg, "epoch")

    return Program(
        (
            Thread((begins("a"), bar())),
            Thread((begins("b"), bar(), add("first", "done", 1, count, "gpu", want=0))),
            Thread((bar(), add("last", "done", 1, count, "gpu", want=1), store("done", 0), store("epoch", 1)), block=1),
            Thread((begins("c"), bar()), block=1),
        ),
        lambda r: 1 in (r["a"], r["b"], r["c"]),
    )


def copy_again(gated: bool = True, waits: bool = True) -> Program:
    """Copies use one slot: a kernel that gates, the copy, a kernel that publishes, one behind the other."""
    return Program(
        (
            Thread(consume("empty") if gated else ()),
            Thread((store("data", 2),), block=8, kernel=1 if waits else 0),
            Thread((publish("full", 2),), kernel=2),
            Thread((load("d", "data"), publish("empty"), *consume("full", 2), load("e", "data")), gpu=1),
        ),
        lambda r: (r["d"], r["e"]) != (0, 2),
    )


def freed_by_kernel(waits: bool = True) -> Program:
    """zero_gather_free: the slot's readers are kernels in front of the one that gives it back."""
    return Program(
        (
            Thread((*consume("empty"), store("data", 2))),
            Thread((load("d", "data"),), gpu=1, block=8),
            Thread((publish("empty"),), gpu=1, kernel=1 if waits else 0),
        ),
        lambda r: r["d"] != 0,
    )


def parities(slots: int) -> Program:
    """GPU 0 writes calls 1 and 2 without waiting in between; GPU 1 reads call 1 meanwhile."""
    second = "data 1" if slots == 2 else "data 0"
    return Program(
        (
            Thread((store("data 0", 1), publish("full 0"), store(second, 2), publish("full 1", 2))),
            Thread((*consume("full 0"), load("d", "data 0")), gpu=1),
        ),
        lambda r: r["d"] != 1,
    )


def next_kernel(kernel: int) -> Program:
    """The last block ends the call; the next kernel reads its number and what its slot holds."""
    return Program(
        (
            Thread((store("epoch", 1), store("out", 1)), block=3),
            Thread((load("e", "epoch"), load("o", "out")), block=0, kernel=kernel),
        ),
        lambda r: (r["e"], r["o"]) != (1, 1),
    )


def pairs(split: bool) -> Program:
    """Data and the number of its call in one 64-bit access (value 11: data 1 of call 1), or as two."""
    if not split:
        return Program(
            (
                Thread((store("pair", 11, "relaxed", "sys"),)),
                Thread((load("p", "pair", "relaxed", "sys", want=11),), gpu=1),
            ),
            lambda r: r["p"] % 10 != 1,
        )
    return Program(
        (
            Thread((store("data", 1, "relaxed", "sys"), store("call", 1, "relaxed", "sys"))),
            Thread((load("c", "call", "relaxed", "sys", want=1), load("d", "data", "relaxed", "sys")), gpu=1),
        ),
        lambda r: r["d"] == 0,
    )


def told_by_copy() -> Program:
    """A flag that a copy engine writes: a weak write to the axioms, however the two copies follow each other."""
    return Program(
        (
            Thread((store("data", 1),), kernel=0),
            Thread((store("full", 1),), kernel=1),
            Thread((*consume("full"), load("d", "data")), gpu=1),
        ),
        lambda r: r["d"] == 0,
    )


def ring(with_credit: bool = True, early_credit: bool = False) -> Program:
    """One slot: message 1, its credit, message 2 in its place."""
    credit, read = publish("credit"), load("d", "slot")
    return Program(
        (
            Thread(
                (
                    store("slot", 1),
                    publish("arrived"),
                    *(consume("credit") if with_credit else ()),
                    store("slot", 2),
                    publish("arrived", 2),
                )
            ),
            Thread((*consume("arrived"), *((credit, read) if early_credit else (read, credit))), gpu=1),
        ),
        lambda r: r["d"] != 1,
    )


def barrier(has_fence: bool = True) -> Program:
    """All tell all, and wait for all; what was written before is read behind."""
    return Program(
        (
            Thread((store("x", 1), publish("to 1"), *consume("to 0", has_fence=has_fence), load("b", "y"))),
            Thread((store("y", 1), publish("to 0"), *consume("to 1", has_fence=has_fence), load("a", "x")), gpu=1),
        ),
        lambda r: r["a"] == 0 or r["b"] == 0,
    )


def abort_word(sem: str = "release", has_fence: bool = True) -> Program:
    """Who gives up writes why, then tells; who is told reads why."""
    return Program(
        (
            Thread((store("why", 7), store("abort", 1, sem, "sys"))),
            Thread((*consume("abort", has_fence=has_fence), load("w", "why")), gpu=1),
        ),
        lambda r: r["w"] == 0,
    )


def copy_engine(waits: bool = True) -> Program:
    """A copy, then a kernel on its stream that signals; or a signal that does not wait for the copy."""
    return Program(
        (
            Thread((store("data", 1),), block=8, kernel=0),
            Thread((publish("full"),), kernel=1 if waits else 0),
            Thread((*consume("full"), load("d", "data")), gpu=1),
        ),
        lambda r: r["d"] == 0,
    )


EDGES = [
    Edge(
        "push, publish, wait, read",
        push(),
        {
            "published without release": push(sem="relaxed"),
            "waited without acquire": push(has_fence=False),
            "acquired at the GPU's scope": push(fence_scope="gpu"),
            "polled with weak (volatile) loads": push(poll="weak"),
            "signalled at the GPU's scope to another GPU": push(scope="gpu"),
            "no bar.sync before the flag": push(barrier_before=False),
            "no bar.sync behind the wait": push(barrier_after=False),
            "signalled when only the source of an asynchronous copy is free": push(is_async=True),
        },
    ),
    Edge(
        "the last block publishes for all (counter at the GPU's scope)",
        last_arriver(),
        {
            "counted without order": last_arriver(count="relaxed"),
            "counted without acquire": last_arriver(count="release"),
            "counted without release": last_arriver(count="acquire"),
            "counted at the block's scope": last_arriver(scope="cta"),
            "no bar.sync before counting": last_arriver(barrier=False),
        },
    ),
    Edge(
        "a slot is used again",
        slot_again(),
        {
            "no gate": slot_again(gated=False),
            "given back without release": slot_again(sem="relaxed"),
            "given back before it was read": slot_again(early=True),
            "the gate without acquire": slot_again(poll_fence=False),
        },
    ),
    Edge(
        "a slot that several blocks read is used again",
        slot_again_by_blocks(),
        {"counted without order": slot_again_by_blocks("relaxed")},
    ),
    Edge(
        "a slot is used again, by threads of blocks",
        slot_again_by_threads(),
        {
            "no gate": slot_again_by_threads(gated=False),
            "no bar.sync behind the gate": slot_again_by_threads(behind_gate=False),
            "no bar.sync before the slot is given back": slot_again_by_threads(before_finish=False),
        },
    ),
    Edge("two parities, no wait between two calls", parities(2), {"one slot for both": parities(1)}),
    Edge("the next kernel reads the epoch", next_kernel(1), {"a block of the same kernel reads it": next_kernel(0)}),
    Edge("the last block ends the call", end_of_call(), {"counted without order": end_of_call("relaxed")}),
    Edge(
        "8-byte pairs are used again",
        pairs_again(),
        {"no gate": pairs_again(gated=False), "given back before it was read": pairs_again(early=True)},
    ),
    Edge("8-byte pairs of data and call", pairs(False), {"two accesses of 4 bytes": pairs(True)}),
    Edge(
        "ring of one slot",
        ring(),
        {"sent without its credit": ring(with_credit=False), "credit before reading": ring(early_credit=True)},
    ),
    Edge("barrier of all ranks", barrier(), {"waited without acquire": barrier(has_fence=False)}),
    Edge(
        "abort",
        abort_word(),
        {"told without release": abort_word("relaxed"), "read without acquire": abort_word(has_fence=False)},
    ),
    Edge(
        "copy engine, then a kernel that signals",
        copy_engine(),
        {"the signal does not wait": copy_engine(False), "the copy engine writes the flag too": told_by_copy()},
    ),
    Edge(
        "the copy engine's slot is used again",
        copy_again(),
        {"no gate": copy_again(gated=False), "the copy does not wait for the gate": copy_again(waits=False)},
    ),
    Edge(
        "a slot is freed by a kernel behind its readers",
        freed_by_kernel(),
        {"the kernel does not wait for them": freed_by_kernel(waits=False)},
    ),
]
