"""DataParallel over all the ways in which forward and backward passes follow each other."""

from __future__ import annotations

import pytest
import torch
from data_parallel_common import (
    TINY,
    Branches,
    all_home,
    assert_close,
    checks_of,
    gradients,
    inputs,
    mean_gradients,
    run_checks,
    small,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import pypar
from pypar.testing import run_ranks

BACKEND = "pypar"


def check_no_sync_adds_up_locally(rank, world_size):
    for fuse in (True, False):
        for set_to_none in (True, False):
            module = pypar.DataParallel(small(4, 6, 2), fuse_linear_grads=fuse, **TINY)
            for _ in range(2):  # before and after the buckets are rebuilt
                module.zero_grad(set_to_none=set_to_none)
                with module.no_sync():
                    for step in range(2):
                        module(inputs(rank, step)).square().sum().backward()
                local = gradients(module)
                assert all_home(module)
                module(inputs(rank, 2)).square().sum().backward()
                alone = small(4, 6, 2)
                for step in range(2):
                    alone(inputs(rank, step)).square().sum().backward()
                assert_close(local, gradients(alone))
                expected = mean_gradients(
                    world_size,
                    lambda: small(4, 6, 2),
                    lambda m, r: sum(m(inputs(r, s)).square().sum() for s in range(3)),
                )
                assert_close(gradients(module), expected)


def check_forward_decides_about_no_sync(rank, world_size):
    module = pypar.DataParallel(small(4, 2))
    with module.no_sync():
        loss = module(inputs(rank)).sum()
    loss.backward()
    alone = small(4, 2)
    alone(inputs(rank)).sum().backward()
    assert_close(gradients(module), gradients(alone))


def check_backward_without_zero_grad(rank, world_size):
    module = pypar.DataParallel(small(4, 6, 2))
    for step in range(2):
        module(inputs(rank, step)).square().sum().backward()
    expected = mean_gradients(
        world_size, lambda: small(4, 6, 2), lambda m, r: sum(m(inputs(r, s)).square().sum() for s in range(2))
    )
    assert_close(gradients(module), expected)


def check_several_forwards_then_one_backward(rank, world_size):
    module = pypar.DataParallel(small(4, 6, 2))
    sum(module(inputs(rank, step)).square().sum() for step in range(3)).backward()
    expected = mean_gradients(
        world_size, lambda: small(4, 6, 2), lambda m, r: sum(m(inputs(r, s)).square().sum() for s in range(3))
    )
    assert_close(gradients(module), expected)


def check_several_backwards_of_one_forward(rank, world_size):
    module = pypar.DataParallel(small(4, 6, 2))
    output = module(inputs(rank)).square()
    output[:, 0].sum().backward(retain_graph=True)
    output[:, 1].sum().backward()
    expected = mean_gradients(world_size, lambda: small(4, 6, 2), lambda m, r: m(inputs(r)).square().sum())
    assert_close(gradients(module), expected)


def check_replaced_gradient(rank, world_size):
    module = pypar.DataParallel(small(4, 6, 2))
    for param in module.parameters():
        param.grad = torch.full_like(param, float(rank))
    module(inputs(rank)).square().sum().backward()
    expected = mean_gradients(world_size, lambda: small(4, 6, 2), lambda m, r: m(inputs(r)).square().sum())
    mean_rank = (world_size - 1) / 2
    assert_close(gradients(module), {n: g + mean_rank for n, g in expected.items()})
    assert all_home(module)


def check_unused_parameters(rank, world_size):
    module = pypar.DataParallel(Branches(), find_unused_parameters=True, **TINY)
    for step in range(3):
        module.zero_grad()
        module(inputs(rank, step), left=(rank + step) % 2 == 0).square().sum().backward()
        expected = mean_gradients(
            world_size, Branches, lambda m, r, s=step: m(inputs(r, s), left=(r + s) % 2 == 0).square().sum()
        )
        assert_close(gradients(module), expected)
        assert module.module.never.weight.grad is None
    module.zero_grad()
    module(inputs(rank), left=True).square().sum().backward()
    assert module.module.right.weight.grad is None, "used by no rank: the gradient stays None"
    module.zero_grad()  # used under no_sync only, by rank 0 only
    with module.no_sync():
        module(inputs(rank), left=rank == 0).square().sum().backward()
    module(inputs(rank), left=False).square().sum().backward()
    expected = mean_gradients(
        world_size,
        Branches,
        lambda m, r: m(inputs(r), left=r == 0).square().sum() + m(inputs(r), left=False).square().sum(),
    )
    assert_close(gradients(module), expected)
    module.zero_grad()
    x = inputs(rank).requires_grad_()
    torch.autograd.grad(module(x, left=True).sum(), x)  # accumulates nothing, so nothing is reduced
    assert not gradients(module)


def check_unused_parameters_error(rank, world_size):
    module = pypar.DataParallel(Branches())
    with pytest.raises(RuntimeError, match=r"rank \d: 4 of 8 parameters got no gradient.*'never.weight'.*find_unused"):
        module(inputs(rank), left=True).sum().backward()


def check_static_graph(rank, world_size):
    module = pypar.DataParallel(Branches(), static_graph=True, **TINY)
    for step in range(3):  # every rank always takes its own branch; rank 1 never uses `left`
        module.zero_grad()
        module(inputs(rank, step), left=rank == 0).square().sum().backward()
        expected = mean_gradients(
            world_size, Branches, lambda m, r, s=step: m(inputs(r, s), left=r == 0).square().sum()
        )
        assert_close(gradients(module), expected)
        assert module.module.never.weight.grad is None
    module = pypar.DataParallel(Branches(), static_graph=True)
    module(inputs(rank), left=True).sum().backward()
    with pytest.raises(RuntimeError, match=r"static_graph=True, but.*right"):
        module(inputs(rank), left=False).sum().backward()


class Checkpointed(nn.Module):
    def __init__(self, reentrant, shared=False, unused=False, last=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 4) if last else nn.Tanh()
        self.reentrant, self.shared = reentrant, shared
        if unused:
            self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = checkpoint(self.first, x, use_reentrant=self.reentrant)
        again = self.first if self.shared else self.second
        x = checkpoint(again, torch.tanh(x), use_reentrant=self.reentrant)
        return self.last(self.second(x) if self.shared else x)


def check_checkpointing(rank, world_size):
    cases = [
        (dict(reentrant=False), {}),
        (dict(reentrant=False, shared=True), {}),
        (dict(reentrant=True), {}),
        (dict(reentrant=True, last=False), {}),  # the first gradient arrives in an inner backward
        (dict(reentrant=True, shared=True, unused=True), {"static_graph": True}),
    ]
    for net, kwargs in cases:
        module = pypar.DataParallel(Checkpointed(**net), **TINY, **kwargs)
        for step in range(2):
            module.zero_grad()
            module(inputs(rank, step).requires_grad_()).square().sum().backward()
            expected = mean_gradients(
                world_size,
                lambda net=net: Checkpointed(**net),
                lambda m, r, s=step: m(inputs(r, s).requires_grad_()).square().sum(),
            )
            assert_close(gradients(module), expected)
    module = pypar.DataParallel(Checkpointed(reentrant=True, shared=True))
    with pytest.raises(RuntimeError, match=r"'first.*' got a second gradient.*use_reentrant=False"):
        module(inputs(rank).requires_grad_()).square().sum().backward()
    module = pypar.DataParallel(Checkpointed(reentrant=True, unused=True))
    with pytest.raises(
        RuntimeError, match=r"'unused.weight'"
    ):  # from backward, or, at the latest, from the next forward
        module(inputs(rank).requires_grad_()).square().sum().backward()
        module(inputs(rank))


def check_failed_backward(rank, world_size):
    module = pypar.DataParallel(small(4, 6, 2))
    output = module(inputs(rank))
    output.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.sum().backward()
    module.zero_grad()
    module(inputs(rank)).square().sum().backward()  # nothing had been reduced: still in step
    expected = mean_gradients(world_size, lambda: small(4, 6, 2), lambda m, r: m(inputs(r)).square().sum())
    assert_close(gradients(module), expected)

    module = pypar.DataParallel(small(4, 6, 2), **TINY)
    hidden = {}
    module.module[0].register_forward_hook(lambda m, args, out: hidden.update(out=out))
    output = module(inputs(rank))
    hidden["out"].register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.sum().backward()
    with pytest.raises(RuntimeError, match=r"previous backward pass did not reach.*1 of \d buckets.*'0.weight'"):
        module(inputs(rank))


@pytest.fixture(scope="module")
def checked():
    return run_ranks(run_checks, 2, __name__, backend=BACKEND, timeout_s=30)


@pytest.mark.parametrize("name", list(checks_of(__name__)))
def test_feature(checked, name):
    for rank, results in enumerate(checked):
        if name not in results:
            pytest.fail("did not run, because a check before it failed", pytrace=False)
        if results[name] is not None:
            pytest.fail(f"rank {rank}: {results[name]}", pytrace=False)
