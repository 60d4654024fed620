"""The Triton all_reduce and loss under stalls, across wrapping epochs, without a peer, with mistakes in the protocol.

The mistakes are made by replacing a device function in the interpreter; CAUGHT says which scene fails with each. What
only memory order can show (a signal without release, a wait without acquire) is looked for in what is compiled.
"""

from __future__ import annotations

import contextlib
import functools
import random

import pytest
import torch
from ops.collective_cases import same_bits
from ops.vocab_cases import IGNORED

from pypar.reference.collectives import reduce_in_rank_order
from pypar.testing import run_ranks

OPS = ("one_shot", "two_shot", "loss")
CALLS = 54
BLOCK = 16  # elements at once, so that short vectors have several pieces
COLUMNS = 7


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(op, rank, step, length):
    """What a rank gives to call `step`: another payload each time."""
    x = drawn(1000 * step + rank, *((length, COLUMNS) if op == "loss" else (length,)))
    return x + step  # so that what is left from another call is far off


def targets(world, step, length):
    target = torch.randint(0, COLUMNS * world, (length,), generator=torch.Generator().manual_seed(step))
    return torch.where(torch.arange(length) % 5 == 3, IGNORED, target)


def one_call(ex, op, world, rank, step, length, polls=None, out=None):
    """(results, channel). The loss has no `out`: it says NaN where it has nothing."""
    from pypar.triton_kernels import all_reduce as reduce
    from pypar.triton_kernels import vocab_cross_entropy as loss

    x = inputs(op, rank, step, length)
    if op == "loss":
        channel = ex.channel(op, loss.vocab_cross_entropy_bytes(length, world, 0.1))
        config = loss.Config(rows=8, cols=16, merged=16)
        shard = {"begin": rank * COLUMNS, "vocabulary": COLUMNS * world, "ignore_index": IGNORED}
        where = ex.where(channel, polls or ex.POLLS)
        target = targets(world, step, length)
        return loss.vocab_cross_entropy(x, target, **where, **shard, label_smoothing=0.1, config=config), channel
    channel = ex.channel(op, reduce.all_reduce_bytes(length, world, x.dtype, op))
    return (reduce.all_reduce(x, "sum", op, **ex.where(channel, polls or ex.POLLS), block=BLOCK, out=out),), channel


def check(op, results, world, step, length):
    """Raises where a result of this call is wrong."""
    xs = [inputs(op, r, step, length) for r in range(world)]
    if op != "loss":
        assert same_bits(results[0], reduce_in_rank_order(xs, "sum")), f"wrong result in call {step + 1}"
        return
    full, target = torch.cat(xs, 1).double(), targets(world, step, length)
    want = torch.nn.functional.cross_entropy(full, target, reduction="sum", ignore_index=IGNORED, label_smoothing=0.1)
    right = torch.isclose(results[0].double(), want, rtol=1e-5, atol=1e-4)
    assert right and results[1] == (target != IGNORED).sum(), f"wrong result in call {step + 1}"


def run_calls(rank, world, seed, stall_us):
    """CALLS calls of the three ops in an order and of lengths that are drawn, so that channels grow; all results."""
    import triton_matmul_executor as ex

    results, draw = [], random.Random(seed)  # the same draws on all ranks
    with contextlib.ExitStack() as stack:
        for i, function in enumerate(("publish", "wait", "wait_empty", "finish") if stall_us else ()):
            stack.enter_context(ex.stalled(function, 100 * seed + 10 * rank + i, stall_us))
        for step in range(CALLS):
            op, length = draw.choice(OPS), draw.choice([0, 1, 3, draw.randint(2, 60)])
            length = 900 if step == 30 else length  # takes a larger channel
            got, channel = one_call(ex, op, world, rank, step, length)
            channel.check()
            check(op, got, world, step, length)
            results += got
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_stalls_change_no_bit_whatever_the_lengths(world_size):
    calm = run_ranks(run_calls, world_size, 1, 0)
    stalled = run_ranks(run_calls, world_size, 1, 2000)
    for rank in range(world_size):
        assert all(same_bits(a, b) for a, b in zip(calm[rank], stalled[rank], strict=True))
        assert all(same_bits(a, b) for a, b in zip(calm[0], calm[rank], strict=True))


def call_alone(rank, world, op):
    """The last rank leaves out a call that the others make. Returns what was raised and what was written."""
    import torch.distributed as dist
    import triton_matmul_executor as ex

    for step in range(2):
        got, channel = one_call(ex, op, world, rank, step, 40)
        channel.check()
        check(op, got, world, step, 40)
    said, out = "", torch.full((40,), torch.nan)
    for late in (False, True):  # the last rank comes too late: neither may it hand out what was there before
        dist.barrier()
        if late == (rank == world - 1):
            got, channel = one_call(ex, op, world, rank, 2, 40, polls=4000, out=out)
            with pytest.raises(RuntimeError) as raised:
                channel.check()
            said = f"{type(raised.value).__name__}: {raised.value}"
    dist.barrier()
    return said, got[0] if op == "loss" else out, got[2] if op == "loss" else None


@pytest.mark.parametrize(
    "op, world", [(op, 2) for op in OPS] + [pytest.param(op, 3, marks=pytest.mark.slow) for op in ("two_shot", "loss")]
)
def test_a_peer_that_does_not_call_is_named_and_nothing_stale_comes_out(op, world):
    *results, (late, out, _) = run_ranks(call_alone, world, op)
    for rank, (said, y, stats) in enumerate(results):
        waited = f"call 3: rank {rank} waited for the data of rank {world - 1}"
        told = f"call 3: rank {rank} stopped with the others, who waited for rank {world - 1}"
        assert said.startswith("PeerError") and (waited in said or told in said), said
        assert y.isnan().all()
        if stats is not None:
            assert stats.isnan().all()
    assert late.startswith("PeerError"), late
    if op == "loss":
        check_or_nan(out, world)
    else:
        fresh = reduce_in_rank_order([inputs(op, r, 2, 40) for r in range(world)], "sum")
        assert (out.isnan() | (out == fresh)).all()


def check_or_nan(loss, world):
    if not loss.isnan():
        check("loss", (loss, (targets(world, 2, 40) != IGNORED).sum()), world, 2, 40)


# Scenes: bodies of ranks in which a mistake shows.


def start_at(channel, epoch):
    """As if `epoch` calls were over: the epoch and all flags by hand, on every rank between two barriers."""
    import torch.distributed as dist

    from pypar.channel import CHUNKS, HEADER_WORDS

    dist.barrier()
    words = channel.memory[: 4 * (HEADER_WORDS + 2 * channel.world_size * (CHUNKS + 1))].view(torch.int32)
    signed = (epoch + 2**31) % 2**32 - 2**31
    words[0] = signed
    words[HEADER_WORDS:] = signed
    dist.barrier()


# Where a rank rests: a device function, whether behind it, how long at most in microseconds.
EVERYWHERE = (("wait_empty", True, 10_000), ("publish", False, 10_000), ("wait", True, 10_000))
BEFORE_IT_ADDS = (("wait_for_all", True, 100_000),)
BEFORE_IT_MERGES = (("wait", True, 50_000),)


def exchange(rank, world, mistake, op, slow, rests=EVERYWHERE, epoch=0, length=40):
    """7 calls, in which the `slow` ranks rest every other time."""
    import triton_matmul_executor as ex

    with contextlib.ExitStack() as stack:
        if mistake is not None:
            stack.enter_context(mistake(ex, rank, world))
        for name, after, most_us in rests if rank in slow else ():
            stack.enter_context(ex.stalled(name, rank, most_us, share=0.5, after=after))
        start_at(one_call(ex, op, world, rank, 0, 0)[1], epoch)
        for step in range(7):
            got, channel = one_call(ex, op, world, rank, step, length, polls=8000)
            channel.check()
            check(op, got, world, step, length)
        assert channel.words()[0].item() % 2**32 == (epoch + 7) % 2**32


def order(rank, world, mistake, op, slow):
    """All ranks must have the same bits, of sums whose rounding shows the order."""
    import torch.distributed as dist
    import triton_matmul_executor as ex

    with mistake(ex, rank, world) if mistake is not None else contextlib.nullcontext():
        got, channel = one_call(ex, op, world, rank, 0, 60)
        channel.check()
    y = got[-1]
    every = [torch.empty_like(y) for _ in range(world)]
    dist.all_gather(every, y)
    assert all(same_bits(y, other) for other in every), "the ranks hold different bits"


def full_slot(rank, world, mistake, op, slow):
    """Rank 1 never said that it had read call 1, so that rank 0 must not write call 3. (A peer that takes part in every
    call of these ops has read call n when it sends call n + 1: the flag is put back by hand.)"""
    import torch.distributed as dist
    import triton_matmul_executor as ex

    from pypar.channel import CHUNKS, HEADER_WORDS

    for step in range(2):
        _, channel = one_call(ex, op, world, rank, step, 40)
        channel.check()
    dist.barrier()
    if rank == 0:
        channel.memory.view(torch.int32)[HEADER_WORDS + 2 * world * CHUNKS + world + 1] = 0
        with mistake(ex, rank, world) if mistake is not None else contextlib.nullcontext():
            one_call(ex, op, world, rank, 2, 40, polls=1000)
        with pytest.raises(RuntimeError) as raised:
            channel.check()
        assert "call 1: rank 0 waited for an empty slot of rank 1" in str(raised.value), f"not at the gate: {raised}"
    dist.barrier()
    full = channel.memory.view(torch.int32)[HEADER_WORDS:][: 2 * world * CHUNKS].view(2, world, CHUNKS)
    assert rank == 0 or not (full == 3).any(), "a flag of call 3 is up, whose data must not be written"


# Mistakes: context managers of a rank.


def within(name, make, modules=None):
    """The mistake of replacing a device function by make(original)."""
    return lambda ex, rank, world: ex.replaced(name, make, modules(ex) if modules else ex.MODULES)


def true_without_waiting(wait):
    return lambda flag, call, pointers, rank, code, *rest: (
        True if code == 1 else wait(flag, call, pointers, rank, code, *rest)
    )


def flags_at_the_gate(wait_empty):
    """Flags go up first, data follow."""

    def gate(pointers, rank, call, polls, WORLD, CHUNKS):
        from pypar.triton_kernels import signal

        free = wait_empty(pointers, rank, call, polls, WORLD, CHUNKS)
        for peer in range(WORLD):
            for chunk in (0, 1, 2, 128, 129, 130):
                words = signal.words_of(pointers, peer)
                signal.publish(signal.full_flag(words, rank, chunk, call, WORLD, CHUNKS), call)
        return free

    return gate


def not_wrapping(lead):
    import triton.language as tl

    return lambda flag, call: flag.to(tl.int64) - call


def from_the_own_rank_on(name, source_of):
    """The sum in the order (rank - i) mod W: `source_of` numbers the sources within the function `name`."""

    def mistake(ex, rank, world):
        def rotated(of):
            return lambda words, source, *rest: of(words, (rank - source) % world, *rest)

        def make(original):
            def call(*args):
                with ex.replaced(source_of, rotated, (module,)):
                    return original(*args)

            return call

        module = ex.all_reduce if name == "reduced" else ex.vocab_cross_entropy
        return ex.replaced(name, make, (module,))

    return mistake


MISTAKES = {
    "no wait for data": within("wait", true_without_waiting),
    "a flag of two calls before will do": within(
        "wait", lambda wait: lambda flag, call, *rest: wait(flag, call - 2, *rest)
    ),
    "the flag before the data": within("wait_empty", flags_at_the_gate),
    "no gate": within("wait_empty", lambda wait_empty: lambda *args: True),
    "one slot for both parities": within(
        "slot_of", lambda slot_of: lambda words, call, *rest: slot_of(words, call * 0, *rest)
    ),
    "flags compared without wrapping": within("lead", not_wrapping),
    "the sum in the order (rank - i) mod W": from_the_own_rank_on("reduced", "part_of"),
    "the merge in the order (rank - i) mod W": from_the_own_rank_on("merged", "field_of"),
}
SCENES = {
    **{f"{op}, a slow rank": (exchange, 2, op, (1,)) for op in OPS},
    # One piece: of several, a peer sends the last one only when it has the next call's first from the slow reader.
    "one_shot, a slow reader": (exchange, 2, "one_shot", (1,), BEFORE_IT_ADDS, 0, BLOCK),
    "loss, a slow reader": (exchange, 2, "loss", (1,), BEFORE_IT_MERGES),
    **{f"{op} of four ranks": (exchange, 4, op, (1, 2)) for op in OPS},
    **{f"{op} across 2^31": (exchange, 2, op, (1,), EVERYWHERE, 2**31 - 4) for op in OPS},
    **{f"{op} across 2^32": (exchange, 2, op, (1,), EVERYWHERE, 2**32 - 4) for op in OPS},
    **{f"{op}, a full slot": (full_slot, 2, op, ()) for op in OPS},
    **{f"{op}, order of the sum": (order, 3, op, ()) for op in OPS},
}
CAUGHT = {
    "no wait for data": tuple(f"{op}, a slow rank" for op in OPS),
    "a flag of two calls before will do": tuple(f"{op}, a slow rank" for op in OPS),
    "the flag before the data": tuple(f"{op}, a slow rank" for op in OPS),
    "no gate": tuple(f"{op}, a full slot" for op in OPS),
    "one slot for both parities": ("one_shot, a slow reader", "loss, a slow reader"),
    "flags compared without wrapping": ("one_shot across 2^31", "loss across 2^31"),
    "the sum in the order (rank - i) mod W": ("one_shot, order of the sum",),
    "the merge in the order (rank - i) mod W": ("loss, order of the sum",),
}
SEEN = (
    "wrong result in call",
    "different bits",
    "PeerError",
    "not at the gate",
    "DID NOT RAISE",
    "a flag of call 3 is up",
)


def caught():
    """Rows (mistake, scene that fails with it), for the docs."""
    return [(mistake, scene) for mistake, scenes in CAUGHT.items() for scene in scenes]


def play(rank, world, mistake, scene):
    body, _, *rest = SCENES[scene]
    return functools.partial(body, rank, world, MISTAKES[mistake] if mistake else None)(*rest)


@pytest.mark.parametrize("scene", [pytest.param(s, marks=pytest.mark.slow) if "four ranks" in s else s for s in SCENES])
def test_without_a_mistake_every_scene_goes_well(scene):
    run_ranks(play, SCENES[scene][1], None, scene)


@pytest.mark.parametrize("mistake, scene", caught())
def test_a_mistake_is_seen(mistake, scene):
    *_, failures = run_ranks(play, SCENES[scene][1], mistake, scene, expect_failure=True, timeout_s=20.0)
    said = "\n".join(failures.values())
    assert any(words in said for words in SEEN), said
