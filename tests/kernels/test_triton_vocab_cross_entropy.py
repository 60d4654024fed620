"""The Triton loss over a sharded vocabulary, interpreted, one process for each rank: its values."""

from __future__ import annotations

import pytest
import torch
from ops.collective_cases import name, same_bits
from ops.vocab_cases import IGNORED, on_all_ranks, own, targets, torch_loss

from pypar.testing import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (0, 1, 3, 129)
VOCABULARIES = {
    1: ([7], [1000]),
    2: ([0, 9], [7, 1], [1000, 333]),
    3: ([0, 1, 0], [3, 0, 1000], [5, 5, 5]),
    4: ([0, 1, 7, 0], [1, 1, 1, 1], [9, 1000, 0, 33]),
}
# One unit in the last place: next to a tie the float32 before the rounding decides, which may differ in its last bits.
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def full_logits(T, V, dtype, seed=0):
    """Of odd vocabularies so large that e^x overflows float32 unless the max is taken off."""
    return ((60 if V % 2 else 2) * torch.randn(T, V, generator=torch.Generator().manual_seed(31 * T + V + seed))).to(
        dtype
    )


def laid_out(x, how):
    """The same values, with other strides."""
    if how == "rows apart":
        return torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]]
    if how == "transposed":
        return x.t().contiguous().t()
    return x.contiguous()


def cases(world):
    """(rows, sizes, dtype, label_smoothing, ignored targets, strides): every value of each, not all combinations."""
    layouts, ignores, i = ("in line", "rows apart", "transposed"), ("some", "none", "all"), 0
    for sizes in VOCABULARIES[world]:
        for T in ROWS:
            yield T, sizes, DTYPES[i % 3], (0.0, 0.1)[i % 2], ignores[i // 3 % 3], layouts[i % 3]
            i += 1
    yield 33, [8] * world, torch.float32, 0.1, "some", "in line"


def forward_and_backward(loss, logits, target, sizes, smoothing, ignore=IGNORED):
    *values, stats = loss.vocab_cross_entropy(logits, target, sizes, ignore, smoothing, name())
    dloss = torch.tensor(0.37, dtype=stats.dtype)
    return (
        *values,
        stats,
        loss.vocab_cross_entropy_dlogits(logits, target, stats, dloss, sizes, ignore, smoothing, name()),
    )


def check_values(rank, world):
    import triton_matmul_executor  # noqa: F401  (turns the interpreter on)

    from pypar.ops.gpu import loss
    from pypar.reference import vocab_cross_entropy as reference

    for case in cases(world):
        T, sizes, dtype, smoothing, ignore, layout = case
        V = sum(sizes)
        full, target = full_logits(T, V, dtype), targets(T, V, ignore)
        logits = laid_out(own(full, rank, sizes), layout)
        given = None if len(set(sizes)) == 1 else sizes
        got = forward_and_backward(loss, logits, target, given, smoothing)
        wide = forward_and_backward(reference, logits.double(), target, given, smoothing)
        narrow = forward_and_backward(reference, logits, target, given, smoothing)
        # A row's loss is a difference of numbers of up to 300: a rounding of each is 2e-5.
        close = {"rtol": 2e-6, "atol": 4e-5 * max(1, T)}
        for want in (wide, narrow):
            torch.testing.assert_close(got[0].double(), want[0].double(), **close)
            assert got[1] == want[1] == (target != IGNORED).sum(), case
            assert torch.equal(got[2][0].double(), want[2][0].double()), case  # a max is exact
            torch.testing.assert_close(got[2][1].double(), want[2][1].double(), rtol=3e-5, atol=0)
            rtol = max(3e-5, ROUNDING[dtype])
            torch.testing.assert_close(got[3].double(), want[3].double(), rtol=rtol, atol=3e-7)
        torch.testing.assert_close(got[0].double(), torch_loss(full, target, smoothing), **close)
        assert [t.dtype for t in got] == [t.dtype for t in narrow] and got[3].is_contiguous()
        for t in got[:3]:
            on_all_ranks(t, world)
        again = forward_and_backward(loss, logits, target, given, smoothing)
        assert all(same_bits(a, b) for a, b in zip(got, again, strict=True)), case


@pytest.mark.parametrize("world_size", [1, 2, *(pytest.param(w, marks=pytest.mark.slow) for w in (3, 4))])
def test_agrees_with_the_reference_and_float64(world_size):
    run_ranks(check_values, world_size)


def check_tiles(rank, world):
    """Tiles that leave several rows to a flag, several flags to a program that merges, several columns to a row."""
    import torch.distributed as dist
    import triton_matmul_executor as ex

    from pypar.reference import vocab_cross_entropy as reference
    from pypar.triton_kernels import vocab_cross_entropy as kernels

    T, sizes = 258, [9, 4]
    full, target = full_logits(T, 13, torch.float32), targets(T, 13)
    shard = {"begin": 9 * rank, "vocabulary": 13, "ignore_index": IGNORED, "label_smoothing": 0.1}
    logits = own(full, rank, sizes)
    channel = ex.channel("loss", kernels.vocab_cross_entropy_bytes(T, world, 0.1))
    want = reference.vocab_cross_entropy(logits, target, sizes, IGNORED, 0.1, dist.group.WORLD.group_name)
    for config in (kernels.Config(rows=1, cols=8, merged=128), kernels.Config(rows=32, cols=16, merged=256)):
        got = kernels.vocab_cross_entropy(logits, target, **ex.where(channel), **shard, config=config)
        channel.check()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-5, atol=4e-5)
        dloss = torch.tensor(2.0)
        a = kernels.vocab_cross_entropy_dlogits(logits, target, want[2], dloss, **shard, config=config)
        b = reference.vocab_cross_entropy_dlogits(
            logits, target, want[2], dloss, sizes, IGNORED, 0.1, dist.group.WORLD.group_name
        )
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-7)


@pytest.mark.slow
def test_any_tiles_give_the_same():
    run_ranks(check_tiles, 2)


def check_extremes(rank, world):
    import triton_matmul_executor  # noqa: F401

    from pypar.ops.gpu import loss
    from pypar.reference import vocab_cross_entropy as reference

    sizes = [3, 5]
    full = full_logits(6, 8, torch.float32)
    full[0, :3] = -torch.inf  # all that rank 0 has of it
    full[1, 5] = -torch.inf
    full[2, 1] = torch.nan
    full[3, 7] = torch.inf
    full[4, :] = -torch.inf
    target = torch.tensor([6, 0, 0, 1, 2, 7])
    logits = own(full, rank, sizes)
    for keep in ([0, 1, 5], [2], [3], [4]):
        got = forward_and_backward(loss, logits[keep], target[keep], sizes, 0.0)
        want = forward_and_backward(reference, logits[keep], target[keep], sizes, 0.0)
        for a, b in zip((got[0], got[3]), (want[0], want[3]), strict=True):
            torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-7, equal_nan=True)
        assert got[0].isnan() == (keep != [0, 1, 5])


def test_infinite_logits_and_nan_go_where_the_reference_has_them():
    run_ranks(check_extremes, 2)


def check_choices(rank, world):
    import triton_matmul_executor  # noqa: F401

    from pypar.channel import _channels
    from pypar.ops.gpu import loss
    from pypar.reference import vocab_cross_entropy as reference

    sizes, target = [3, 5], torch.tensor([0, 7, IGNORED, 2])
    logits = own(full_logits(4, 8, torch.float32), rank, sizes)
    for wrong in (8, -1):
        bad = target.clone()
        bad[1] = wrong
        with pytest.raises(ValueError, match=rf"target\[1\] is {wrong}, outside the vocabulary of 8"):
            loss.vocab_cross_entropy(logits, bad, sizes, IGNORED, 0.0, name())
        with pytest.raises(ValueError, match="outside the vocabulary"):
            loss.vocab_cross_entropy_dlogits(
                logits, bad, torch.ones(2, 4), torch.tensor(1.0), sizes, IGNORED, 0.0, name()
            )
    with pytest.raises(ValueError, match=r"sizes is \[4, 4\]"):
        loss.vocab_cross_entropy(logits, target, [4, 4], IGNORED, 0.0, name())
    even = own(full_logits(4, 16, torch.float32), rank, [8, 8])
    for x, cut, how in ((even, None, "layout"), (logits.double(), sizes, "run")):
        got = loss.vocab_cross_entropy(x, target, cut, IGNORED, 0.1, name(), how)
        want = reference.vocab_cross_entropy(x, target, cut, IGNORED, 0.1, name(), how)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    assert not _channels  # so far no kernel exchanged anything
    # a vocabulary in which the ignored target is one of the ids
    got, want = (forward_and_backward(m, logits, target.clamp(0), sizes, 0.0, ignore=0) for m in (loss, reference))
    assert _channels
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=4e-5)


def test_wrong_targets_raise_and_the_reference_serves_what_is_not_fused():
    run_ranks(check_choices, 2)
