"""The fused matmuls in Triton with stalls, with changing shapes, without a peer, with mistakes in the protocol."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch

from pypar.testing import run_ranks

CALLS = 54


def drawn(seed, shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run_calls(rank, world, seed, stall_us):
    """CALLS calls of the three ops, drawn: order, shapes, so that channels grow; returns all results."""
    import triton_matmul_executor as ex

    from pypar.triton_kernels import all_gather_matmul as gather
    from pypar.triton_kernels import matmul_all_reduce as reduce
    from pypar.triton_kernels import matmul_reduce_scatter as scatter

    results, draw = [], random.Random(seed)  # the same draws on all ranks
    with contextlib.ExitStack() as stack:
        for i, name in enumerate(("publish", "wait", "wait_empty", "finish") if stall_us else ()):
            stack.enter_context(ex.stalled(name, 100 * seed + 10 * rank + i, stall_us))
        for i in range(CALLS):
            M, N, K = draw.randint(0, 20), draw.randint(1, 40), draw.randint(1, 40)
            dtype = draw.choice([torch.float32, torch.bfloat16])
            x, w = drawn(1000 * i + rank, (M, K), dtype), drawn(1000 * i + 500 + rank, (N, K), dtype)
            op = draw.choice(["gather", "scatter", "reduce", "reduce in two"])
            config = draw.choice([ex.SMALL, ex.WITH_TMA])
            copied = draw.random() < 0.5
            reduce.ONE_STEP_BYTES = 0 if op == "reduce in two" else 256 * 1024
            if op == "gather":
                channel = ex.channel(op, gather.all_gather_matmul_bytes(M, K, world, dtype))
                addresses = channel.pointers.tolist() if copied else None
                y = gather.all_gather_matmul(x, [w], **ex.where(channel), config=config, addresses=addresses)[0]
            elif op == "scatter":
                channel = ex.channel(op, scatter.matmul_reduce_scatter_bytes(M, N, world, dtype))
                y = scatter.matmul_reduce_scatter(x, w, **ex.where(channel), config=config)
            else:
                channel = ex.channel(op, reduce.matmul_all_reduce_bytes(M, N, world, dtype))
                y = reduce.matmul_all_reduce(x, w, **ex.where(channel), config=config)
            channel.check()
            results.append((op, y))
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_stalls_change_no_bit_whatever_the_shapes(world_size):
    calm = run_ranks(run_calls, world_size, 1, 0)
    stalled = run_ranks(run_calls, world_size, 1, 3000)
    for rank in range(world_size):
        for (op, y), (_, again) in zip(calm[rank], stalled[rank], strict=True):
            assert torch.equal(y, again), op
    for (op, y), *others in zip(*calm, strict=True):
        assert "reduce" not in op or all(torch.equal(y, other) for _, other in others)
    check_against_float64(calm, world_size)


def check_against_float64(calm, world):
    draw = random.Random(1)
    for i in range(CALLS):
        M, N, K = draw.randint(0, 20), draw.randint(1, 40), draw.randint(1, 40)
        dtype = draw.choice([torch.float32, torch.bfloat16])
        xs = [drawn(1000 * i + r, (M, K), dtype).double() for r in range(world)]
        ws = [drawn(1000 * i + 500 + r, (N, K), dtype).double() for r in range(world)]
        op = draw.choice(["gather", "scatter", "reduce", "reduce in two"])
        draw.choice([0, 0]), draw.random()
        got = [calm[r][i][1].double() for r in range(world)]
        if op == "gather":
            want = [torch.cat(xs) @ w.t() for w in ws]
        else:
            total = sum(x @ w.t() for x, w in zip(xs, ws, strict=True))
            want = list(total.split(-(-M // world))) if op == "scatter" and M else [total] * world
            want += [total[:0]] * (world - len(want))
        # half an ulp of bfloat16 for each share and for the sum; float32 far below
        tolerance = 2e-5 if dtype == torch.float32 else 2**-8 * (world + 1)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * (1 + b.abs().max().item() if b.numel() else 1))


OPS = ("scatter", "reduce", "reduce in two", "gather by kernel", "gather by copies")


def one_call(ex, op, rank, world, step, polls=None, out=None, splits=None):
    """Call `step` of an op with data of its own; (result, channel)."""
    from pypar.triton_kernels import all_gather_matmul as gather
    from pypar.triton_kernels import matmul_all_reduce as reduce
    from pypar.triton_kernels import matmul_reduce_scatter as scatter

    reduce.ONE_STEP_BYTES = 0 if op == "reduce in two" else 256 * 1024
    channel = ex.channel(op, 1 << 15)
    where = ex.where(channel, polls or ex.POLLS)
    x, w = shared_inputs(op, rank, step, splits)
    if op == "scatter":
        return scatter.matmul_reduce_scatter(x, w, **where, config=ex.SMALL, out=out, splits=splits), channel
    if op.startswith("reduce"):
        return reduce.matmul_all_reduce(x, w, **where, config=ex.SMALL, out=out), channel
    addresses = channel.pointers.tolist() if op == "gather by copies" else None
    outs = None if out is None else [out]
    y = gather.all_gather_matmul(x, [w], **where, config=ex.SMALL, outs=outs, addresses=addresses, splits=splits)[0]
    return y, channel


def shared_inputs(op, rank, step, splits=None):
    rows = splits[rank] if splits and op.startswith("gather") else 35
    x = torch.randint(-3, 4, (rows, 16), generator=torch.Generator().manual_seed(10 * step + rank)).float()
    w = torch.randint(-3, 4, (40, 16), generator=torch.Generator().manual_seed(10 * step + rank + 5000)).float()
    return x, w


def wanted(op, rank, world, step, splits=None):
    inputs = [shared_inputs(op, r, step, splits) for r in range(world)]
    if op.startswith("gather"):
        return torch.cat([x for x, _ in inputs]) @ inputs[rank][1].t()
    total = sum(x @ w.t() for x, w in inputs)
    return total.split(splits or -(-35 // world))[rank] if op == "scatter" else total


def call_alone(rank, world, op):
    """Rank 0 makes a call that rank 1 doesn't. Returns what it raised and what was written."""
    import torch.distributed as dist
    import triton_matmul_executor as ex

    rows = {"scatter": 18, "reduce": 35, "reduce in two": 35}.get(op, 70)
    for step in range(2):
        y, channel = one_call(ex, op, rank, world, step)
        channel.check()
        assert torch.equal(y, wanted(op, rank, world, step))
    said, out = "", torch.full((rows, 40), torch.nan)
    if rank == 0:
        _, channel = one_call(ex, op, rank, world, 2, polls=200, out=out)
        with pytest.raises(RuntimeError) as raised:
            channel.check()
        said = f"{type(raised.value).__name__}: {raised.value}"
    dist.barrier()
    if rank == 1:  # comes too late, and is told; neither does it hand out what the slots held before
        out = torch.full((70 if "gather" in op else out.shape[0] - (op == "scatter"), 40), torch.nan)
        _, channel = one_call(ex, op, rank, world, 2, polls=200, out=out)
        with pytest.raises(RuntimeError) as raised:
            channel.check()
        said = f"{type(raised.value).__name__}: {raised.value}"
    return said, out


@pytest.mark.parametrize("op", OPS)
def test_a_peer_that_does_not_call_is_named_and_nothing_stale_comes_out(op):
    (said, out), (late, out_late) = run_ranks(call_alone, 2, op)
    assert said.startswith("PeerError") and "call 3: rank 0 waited for the data of rank 1" in said, said
    assert "rank 1 stopped with the others, who waited for rank 1" in late or "the data of rank 0" in late, late
    new = wanted(op, 1, 2, 2)  # rank 0's data may all be there
    assert (out_late.isnan() | (out_late == new)).all()
    if op.startswith("gather"):  # the own shard needs no peer
        fresh = shared_inputs(op, 0, 2)
        assert torch.equal(out[:35], fresh[0] @ fresh[1].t())
        out = out[35:]
    assert out.isnan().all()


def run_ahead(rank, world):
    """Rank 1 owns no rows, so that it waits for nobody's data: its third call needs the slot of its first, which rank 0
    has not read."""
    import torch.distributed as dist
    import triton_matmul_executor as ex

    said = ""
    ex.channel("scatter", 1 << 15)
    if rank == 1:
        for step in range(3):
            _, channel = one_call(ex, "scatter", rank, world, step, polls=200, splits=[35, 0])
            if step < 2:
                channel.check()
        with pytest.raises(RuntimeError) as raised:
            channel.check()
        said = str(raised.value)
    dist.barrier()
    return said


def test_who_runs_ahead_waits_for_an_empty_slot_and_names_its_owner():
    assert "call 1: rank 1 waited for an empty slot of rank 0" in run_ranks(run_ahead, 2)[1]


def pass_the_end_of_int32(rank, world):
    """Calls number 2^31 - 3 to 2^31 + 4."""
    import torch.distributed as dist
    import triton_matmul_executor as ex

    for op in OPS:
        memory = ex.channel(op, 1 << 15).memory.view(torch.int32)
        words = 16 + 2 * world * 256 + 2 * world
        memory[16:words] = memory[0] = 2**31 - 4
        dist.barrier()
        for step in range(8):
            y, channel = one_call(ex, op, rank, world, step)
            channel.check()
            assert torch.equal(y, wanted(op, rank, world, step)), (op, step)


def test_the_number_of_the_call_wraps():
    run_ranks(pass_the_end_of_int32, 2)


# Mistakes of the kind that shipped elsewhere. Each one: what to replace, by what, and where it must be seen.


def no_wait(rank):
    return (
        "wait",
        lambda wait: (
            lambda flag, call, pointers, rank, code, *rest: (
                True if code == 1 else wait(flag, call, pointers, rank, code, *rest)
            )
        ),
    )


def no_gate(rank):
    return "wait_empty", lambda wait_empty: lambda *args: True


def one_slot(rank):
    return "slot_of", lambda slot_of: lambda words, call, *rest: slot_of(words, call * 0, *rest)


def the_other_slot_is_read(rank):
    return (
        "part_of",
        lambda part_of: lambda words, source, rows, N, call, *rest: part_of(words, source, rows, N, call + 1, *rest),
    )


def an_older_flag_will_do(rank):
    return "wait", lambda wait: lambda flag, call, *rest: wait(flag, call - 2, *rest)


def sum_from_the_own_rank_on(rank):
    import torch.distributed as dist

    world = dist.get_world_size()
    return "part_of", lambda part_of: lambda words, source, *rest: part_of(words, (rank - source) % world, *rest)


def the_first_tile_raises_the_flag(rank):
    return "arrive", lambda arrive: lambda counter, expected, stored: True


def the_slot_is_empty_before_it_is_read(rank):
    """Tells the producers at the gate, not in finish."""
    from pypar.triton_kernels import signal

    def make(wait_empty):
        def call_it(pointers, rank, call, polls, WORLD, CHUNKS):
            for peer in range(WORLD):
                flag = signal.empty_flag(signal.words_of(pointers, peer), rank, call, WORLD, CHUNKS)
                signal.publish(flag, call)
            return wait_empty(pointers, rank, call, polls, WORLD, CHUNKS)

        return call_it

    return "wait_empty", make


def exchange(rank, world, mistake, op, splits, slow):
    """Calls with data of their own each; `slow` ranks rest before they store and after they waited. Raises where a
    result is wrong. A mistake shows in the first calls; on a machine with much else to do it has more of them."""
    import triton_matmul_executor as ex

    with contextlib.ExitStack() as stack:
        if mistake is not None:
            name, make = mistake(rank)
            modules = (ex.matmul_parts,) if name == "part_of" else ex.MODULES  # where the parts are added
            stack.enter_context(ex.replaced(name, make, modules))
        if rank in slow:
            stack.enter_context(ex.stalled("wait_empty", rank, 40_000, share=1, after=True))
            stack.enter_context(ex.stalled("publish", rank, 10_000))
            stack.enter_context(ex.stalled("wait", rank, 20_000, share=0.5, after=True))
        for step in range(8 if mistake is None else 40):
            y, channel = one_call(ex, op, rank, world, step, polls=8_000, splits=splits)
            channel.check()
            if not torch.equal(y, wanted(op, rank, world, step, splits)):
                ex.give_up(channel)
                raise AssertionError(f"wrong result in call {step + 1}")


def orders(rank, world, mistake, op, splits, slow):
    """Sums of numbers whose rounding shows the order; all ranks must have the same bits."""
    import torch.distributed as dist
    import triton_matmul_executor as ex

    from pypar.triton_kernels.matmul_all_reduce import matmul_all_reduce

    channel = ex.channel(op, 1 << 15)
    with contextlib.ExitStack() as stack:
        if mistake is not None:
            name, make = mistake(rank)
            stack.enter_context(ex.replaced(name, make, (ex.matmul_parts,)))
        y = matmul_all_reduce(
            drawn(rank, (16, 16), torch.float32), drawn(9 + rank, (40, 16), torch.float32), **ex.where(channel),
            config=ex.SMALL,
        )  # fmt: skip
        channel.check()
    every = [torch.empty_like(y) for _ in range(world)]
    dist.all_gather(every, y)
    assert all(torch.equal(y, other) for other in every), "the ranks hold different bits"


# What `mistake` needs to be seen: a test body, the world size, the op, splits, the ranks that are slow.
SCENES = {
    "exchange, slow publisher": (exchange, 2, "scatter", None, (1,)),
    "exchange in two steps, slow publisher": (exchange, 2, "reduce in two", None, (1,)),
    "gather, slow publisher": (exchange, 2, "gather by kernel", None, (1,)),
    "gather by copies, slow reader": (exchange, 2, "gather by copies", None, (0,)),
    "exchange, slow reader": (exchange, 2, "reduce", None, (0,)),
    "a rank without rows runs ahead": (exchange, 2, "scatter", [35, 0], (0,)),
    "order of the sum": (orders, 3, "reduce", None, ()),
}
CAUGHT = {
    no_wait: ("exchange, slow publisher", "exchange in two steps, slow publisher", "gather, slow publisher"),
    an_older_flag_will_do: ("exchange, slow publisher", "gather, slow publisher"),
    no_gate: ("a rank without rows runs ahead",),
    the_slot_is_empty_before_it_is_read: ("a rank without rows runs ahead",),
    one_slot: ("exchange, slow reader", "gather, slow publisher"),
    the_other_slot_is_read: ("exchange, slow reader",),
    the_first_tile_raises_the_flag: ("exchange, slow publisher",),
    sum_from_the_own_rank_on: ("order of the sum",),
}


def caught():
    """Rows (mistake, scene that fails with it), for the docs; memory order is in test_triton_matmul_static.py."""
    return [(mistake.__name__.replace("_", " "), scene) for mistake, scenes in CAUGHT.items() for scene in scenes]


@pytest.mark.parametrize("scene", SCENES)
def test_without_a_mistake_every_scene_goes_well(scene):
    body, world, *rest = SCENES[scene]
    run_ranks(body, world, None, *rest)


@pytest.mark.parametrize("mistake, scene", [(m, s) for m, scenes in CAUGHT.items() for s in scenes])
def test_a_mistake_is_seen(mistake, scene):
    body, world, *rest = SCENES[scene]
    *_, failures = run_ranks(body, world, mistake, *rest, expect_failure=True)
    said = "\n".join(failures.values())
    assert any(word in said for word in ("wrong result in call", "different bits")), said
