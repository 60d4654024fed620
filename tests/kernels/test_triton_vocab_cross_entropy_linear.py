"""The GPU form of the loss from hidden states, its kernels interpreted: a chunk of rows at a time, as the reference."""

from __future__ import annotations

import pytest
import torch
from ops.collective_cases import name, same_bits
from ops.matmul_cases import close, matrix
from ops.vocab_cases import IGNORED, on_all_ranks, own, targets, torch_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pypar.testing import run_ranks

# (T, K, sizes of the vocabulary, chunk_rows): no rows, one chunk and many, rows that chunks don't divide, a rank
# without columns, chunks of more rows than there are; sizes that are even are left out of the call.
CASES = {
    2: [(0, 3, [2, 3], 4), (1, 3, [1, 1], 1), (7, 5, [0, 9], 3), (23, 8, [70, 31], 5), (12, 4, [6, 6], 100)],
    3: [(0, 2, [1, 0, 1], 2), (5, 3, [0, 1, 0], 2), (19, 6, [40, 2, 9], 8), (9, 4, [5, 5, 5], 3)],
}
SETTINGS = [("some", 0.0), ("none", 0.1), ("all", 0.1), ("some", 0.1)]


def interpreted():
    """The module of the GPU ops; of a rank's imports the first, since it turns the interpreter on."""
    import triton_matmul_executor  # noqa: F401

    from pypar.ops.gpu import loss

    return loss


def check_values(rank, world, dtype):
    ours = interpreted().linear_vocab_cross_entropy
    from pypar.reference import vocab_cross_entropy as reference

    for i, (T, K, sizes, chunk_rows) in enumerate(CASES[world]):
        V, (ignore, smoothing) = sum(sizes), SETTINGS[i % 4]
        hidden, weight, target = matrix(T, T, K, dtype), matrix(V, V, K, dtype), targets(T, V, ignore)
        mine = own(weight, rank, sizes, 0)
        given = None if len(set(sizes)) == 1 else sizes
        raw = (hidden, mine, target, given, IGNORED, smoothing, chunk_rows, True, True, name())
        what = (T, K, sizes, chunk_rows, dtype, ignore, smoothing)
        got, want = ours(*raw), reference.linear_vocab_cross_entropy(*raw)
        assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in want], what
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=4e-5 * max(1, T))
        assert got[1] == want[1] == (target != IGNORED).sum(), what
        # Where float32 is next to a tie before a rounding, one of dlogits may be another: one unit of its last place.
        for a, b in zip(got[2:], want[2:], strict=True):
            torch.testing.assert_close(a, b, rtol=max(3e-5, 2 * eps), atol=max(3e-6, eps * V**0.5 if eps > 1e-4 else 0))
        exact = [t.double().requires_grad_() for t in (hidden, weight)]
        expected = torch_loss(exact[0] @ exact[1].t(), target, smoothing)
        expected.backward()
        torch.testing.assert_close(got[0].double(), expected.detach(), rtol=4 * eps, atol=4e-5 * max(1, T))
        close(got[2], exact[0].grad, V, what)
        close(got[3].to(dtype), own(exact[1].grad, rank, sizes, 0), max(T, K), what)
        for t in got[:3]:
            on_all_ranks(t, world)
        assert all(same_bits(a, b) for a, b in zip(got, ours(*raw), strict=True)), ("runs differ", what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_agrees_with_the_reference_and_float64(world, dtype):
    run_ranks(check_values, world, dtype)


class Made(TorchDispatchMode):
    """Within the block, the sizes in bytes of the tensors that operations gave."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes |= {t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


def check_memory(rank, world):
    ours = interpreted().linear_vocab_cross_entropy
    from pypar.reference import vocab_cross_entropy as reference

    T, K, columns, chunk_rows = 30, 2, 1200, 4  # a chunk is larger than a tile, which the interpreter makes tensors of
    hidden, weight = matrix(1, T, K, torch.float32), matrix(2 + rank, columns, K, torch.float32)
    target = targets(T, 2 * columns)
    raw = (hidden, weight, target, None, IGNORED, 0.0, chunk_rows, True, True, name())
    ours(*raw)  # the channels are made once
    with Made() as made:
        ours(*raw)
    assert max(made.sizes) == 4 * chunk_rows * columns, sorted(made.sizes)
    with Made() as made:
        reference.linear_vocab_cross_entropy(*raw)
    assert 4 * T * columns in made.sizes, "the measure sees no logits"


def test_the_logits_of_all_rows_never_exist():
    run_ranks(check_memory, 2)


def check_needs(rank, world):
    """What nobody asked for is not made, and the rest is the same."""
    ours = interpreted().linear_vocab_cross_entropy
    hidden, weight, target = matrix(1, 9, 4, torch.bfloat16), matrix(2 + rank, 6, 4, torch.bfloat16), targets(9, 12)

    def run(dhidden, dweight):
        return ours(hidden, weight, target, [6, 6], IGNORED, 0.1, 4, dhidden, dweight, name())

    both = run(True, True)
    for needs in ((True, False), (False, True), (False, False)):
        got = run(*needs)
        assert same_bits(got[0], both[0]) and same_bits(got[1], both[1])
        for made, whole, needed in zip(got[2:], both[2:], needs, strict=True):
            assert same_bits(made, whole) if needed else made.shape == (0, 4) and made.dtype == whole.dtype


def check_rounding(rank, world):
    """dweight is summed in float32, products of halves included: of the very dlogits, nothing else is rounded."""
    loss = interpreted()
    hidden, weight, target = matrix(1, 9, 4, torch.bfloat16), matrix(2 + rank, 6, 4, torch.bfloat16), targets(9, 12)
    shared, logits = (None, IGNORED, 0.1), hidden @ weight.t()
    stats = loss.vocab_cross_entropy(logits, target, *shared, name())[2]
    dlogits = loss.vocab_cross_entropy_dlogits(logits, target, stats, torch.tensor(1.0), *shared, name())
    want = dlogits.float().t() @ hidden.float()
    for chunk_rows in (4, 9):
        got = loss.linear_vocab_cross_entropy(hidden, weight, target, *shared, chunk_rows, False, True, name())[3]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def check_choices(rank, world):
    """float64, determinism "layout", and no Triton: no kernel runs."""
    loss = interpreted()
    from pypar.channel import _channels
    from pypar.ops.gpu import run
    from pypar.reference import vocab_cross_entropy as reference

    hidden, weight, target = matrix(1, 9, 4, torch.float32), matrix(2 + rank, 8, 4, torch.float32), targets(9, 16)

    def both(h, w, *how):
        raw = (h, w, target, None, IGNORED, 0.1, 4, True, True, name(), *how)
        return loss.linear_vocab_cross_entropy(*raw), reference.linear_vocab_cross_entropy(*raw)

    got, want = both(hidden, weight, "layout")
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    torch.testing.assert_close(*both(hidden.double(), weight.double()))
    with pytest.MonkeyPatch.context() as patch:
        for module in (loss, run, loss.collectives):
            patch.setattr(module, "triton_kernels", lambda _: None)
        torch.testing.assert_close(*both(hidden, weight), rtol=1e-5, atol=1e-5)
    assert not _channels  # no kernel exchanged anything


def check_errors(rank, world):
    ours = interpreted().linear_vocab_cross_entropy
    hidden, weight, target = torch.ones(9, 2), torch.ones(4, 2), torch.zeros(9, dtype=torch.int64)

    def call(h=hidden, w=weight, t=target, sizes=None, chunk_rows=4):
        return ours(h, w, t, sizes, IGNORED, 0.0, chunk_rows, True, True, name())

    bad = target.clone()
    bad[7] = 8  # in the second chunk
    with pytest.raises(ValueError, match=r"target\[7\] is 8, outside the vocabulary of 8"):
        call(t=bad)
    with pytest.raises(ValueError, match=r"sizes is \[5, 3\]"):
        call(sizes=[5, 3])
    with pytest.raises(ValueError, match="chunk_rows is 0, expected at least 1"):
        call(chunk_rows=0)
    for wrong in ({"w": torch.ones(4, 3)}, {"t": target[:8]}, {"h": torch.ones(9, 2, 1)}):
        with pytest.raises(ValueError, match=r"hidden \[T, K\], weight \[V_r, K\] and target \[T\] don't fit"):
            call(**wrong)


def check_the_rest(rank, world):
    check_choices(rank, world)
    check_needs(rank, world)
    check_rounding(rank, world)
    check_errors(rank, world)


def test_needs_choices_and_errors():
    run_ranks(check_the_rest, 2)
