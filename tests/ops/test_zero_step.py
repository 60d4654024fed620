"""zero_step: against torch's AdamW and Adam, the same bits as the reference up to rounding, wrong input."""

from __future__ import annotations

import hashlib

import pytest
import torch

import pypar
from pypar import backend
from pypar.reference.zero_step import zero_step as reference
from pypar.testing import run_ranks

# Around the vectors of every width and the block of 1024, with tails.
COUNTS = [0, 1, 7, 15, 16, 33, 1023, 1024, 1025, 5000]


def tensors(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_as_torch(kind, amsgrad, maximize):
    for n in COUNTS:
        weights, *grads = tensors(n, n)
        settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
        theirs = torch.nn.Parameter(weights.clone())
        optimizer = kind([theirs], amsgrad=amsgrad, maximize=maximize, foreach=False, **settings)
        ours, exp_avg, exp_avg_sq = weights.clone(), torch.zeros(n), torch.zeros(n)
        largest = torch.zeros(n) if amsgrad else None
        for step, grad in enumerate(grads, 1):
            theirs.grad = 0.5 * grad
            optimizer.step()
            pypar.ops.zero_step(
                ours, grad, exp_avg, exp_avg_sq, step, max_exp_avg_sq=largest, grad_scale=0.5,
                decoupled=kind is torch.optim.AdamW, maximize=maximize, **settings,
            )  # fmt: skip
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
        if n:
            torch.testing.assert_close(exp_avg, optimizer.state[theirs]["exp_avg"], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(exp_avg_sq, optimizer.state[theirs]["exp_avg_sq"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_is_the_weights_rounded_once(dtype):
    for n in COUNTS:
        weights, grad, exp_avg, exp_avg_sq = tensors(n)
        low = torch.full((n,), 7.0, dtype=dtype)
        pypar.ops.zero_step(weights, grad, exp_avg, exp_avg_sq.abs(), 3, low=low)
        assert torch.equal(low, weights.to(dtype))


def test_reference():
    for amsgrad in (False, True):
        mine, theirs = tensors(3000), tensors(3000)
        for given in (mine, theirs):
            given[3].abs_()
        extra = [torch.rand(3000) if amsgrad else None for _ in range(2)]
        if amsgrad:
            extra[1] = extra[0].clone()
        numbers = (4, 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.7, True, False)
        torch.ops.pypar.zero_step(*mine, extra[0], None, *numbers)
        reference(*theirs, extra[1], None, *numbers)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def bits():
    given = [*tensors(5000), torch.rand(5000, generator=torch.Generator().manual_seed(1))]
    given[3].abs_()
    low = torch.zeros(5000, dtype=torch.bfloat16)
    for decoupled in (True, False):
        weights, grad, *moments, largest = given
        pypar.ops.zero_step(weights, grad, *moments, 4, max_exp_avg_sq=largest, low=low, decoupled=decoupled)
    return hashlib.sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in (*given, low))).hexdigest()


def check_capability(rank, world):
    return backend.extension.cpu_capability(), bits()


def test_the_same_bits_on_every_instruction_set(monkeypatch):
    found = {}
    for capability in ("plain", "avx2", "avx512"):
        monkeypatch.setenv("PYPAR_CPU_CAPABILITY", capability)
        ((used, digest),) = run_ranks(check_capability, 1, backend="none")
        found[used] = digest  # a processor that lacks one runs a lower one
    assert "plain" in found and len(set(found.values())) == 1, found


def test_opcheck():
    torch.library.opcheck(
        torch.ops.pypar.zero_step.default,
        (*tensors(9)[:3], torch.rand(9), torch.rand(9), torch.zeros(9, dtype=torch.bfloat16), 2, 1e-3, 0.9, 0.99, 1e-8,
         0.1, 1.0, True, False),
    )  # fmt: skip


def test_wrong_input():
    good = [torch.zeros(4) for _ in range(4)]
    for at, bad, text in (
        (0, torch.zeros(4, dtype=torch.float64), "param is Double"),
        (1, torch.zeros(5), r"grad is Float\[5\], expected a contiguous float32 tensor of 4"),
        (2, torch.zeros(8)[::2], "exp_avg is .* not contiguous"),
    ):
        given = list(good)
        given[at] = bad
        with pytest.raises(ValueError, match=text):
            pypar.ops.zero_step(*given, 1)
    with pytest.raises(ValueError, match="step is 0"):
        pypar.ops.zero_step(*good, 0)
    with pytest.raises(ValueError, match="low is Float"):
        pypar.ops.zero_step(*good, 1, low=torch.zeros(4))
