"""DataParallel: dtypes, buffers, hooks, buckets, uneven inputs, groups, errors."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
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

import pypar
from pypar.testing import run_ranks

BACKEND = "pypar"


def check_mixed_dtypes(rank, world_size):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(4, 4).double(), nn.Linear(4, 4), nn.Linear(4, 4).double()

        def forward(self, x):
            return self.c(self.b(self.a(x.double()).float()).double())

    module = pypar.DataParallel(Mixed(), **TINY)
    for _ in range(2):
        module.zero_grad()
        module(inputs(rank)).square().sum().backward()
        expected = mean_gradients(world_size, Mixed, lambda m, r: m(inputs(r)).square().sum())
        assert_close(gradients(module), expected)


def check_strides(rank, world_size):
    def conv():
        torch.manual_seed(0)
        return nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)

    def image(r):
        return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(r))

    module = pypar.DataParallel(conv())
    module(image(rank)).square().sum().backward()
    assert module.module.weight.grad.stride() == module.module.weight.stride()
    assert_close(gradients(module), mean_gradients(world_size, conv, lambda m, r: m(image(r)).square().sum()))


def check_buffers(rank, world_size):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = small(4, 4)
            self.register_buffer("value", torch.tensor(float(rank)))
            self.register_buffer("flag", torch.tensor([rank == 0]))

        def forward(self, x):
            self.value += 1 + rank
            return self.layer(x) * self.value

    module = pypar.DataParallel(Counting())
    assert module.module.value.item() == 0 and module.module.flag.item()
    module(inputs(rank)).sum().backward()
    assert module.module.value.item() == 1 + rank
    module(inputs(rank)).sum().backward()
    assert module.module.value.item() == 2 + rank
    module = pypar.DataParallel(Counting(), broadcast_buffers=False)
    module(inputs(rank)).sum().backward()
    assert module.module.value.item() == 1 + 2 * rank


def check_initial_broadcast(rank, world_size):
    torch.manual_seed(rank)
    module = pypar.DataParallel(nn.Linear(4, 4), init_sync=True)
    torch.manual_seed(0)
    assert torch.equal(module.module.weight, nn.Linear(4, 4).weight)
    torch.manual_seed(rank)
    assert torch.equal(pypar.DataParallel(nn.Linear(4, 4), init_sync=False).module.weight, fresh(rank).weight)


def fresh(seed):
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


def check_comm_hooks(rank, world_size):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    expected = mean_gradients(world_size, lambda: small(4, 6, 2), lambda m, r: m(inputs(r)).square().sum())
    for hook, tolerance in ((default_hooks.allreduce_hook, 1e-5), (default_hooks.bf16_compress_hook, 2e-2)):
        module = pypar.DataParallel(small(4, 6, 2), **TINY)
        module.register_comm_hook(None, hook)
        for _ in range(2):
            module.zero_grad()
            module(inputs(rank)).square().sum().backward()
            torch.testing.assert_close(gradients(module), expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(RuntimeError, match="registered already"):
        module.register_comm_hook(None, default_hooks.allreduce_hook)

    seen = []

    def doubled(state, bucket):
        seen.append((state, bucket.index(), bucket.is_last(), len(bucket.gradients()), len(bucket.parameters())))
        future = torch.futures.Future()
        future.set_result(bucket.buffer() * 2)
        return future

    module = pypar.DataParallel(small(4, 6, 2))
    module.register_comm_hook("state", doubled)
    module(inputs(rank)).square().sum().backward()
    alone = small(4, 6, 2)
    alone(inputs(rank)).square().sum().backward()
    assert_close(gradients(module), {n: 2 * g for n, g in gradients(alone).items()})
    assert seen == [("state", 0, True, 4, 4)]
    module = pypar.DataParallel(small(4, 6, 2))
    module.register_comm_hook(None, lambda state, bucket: bucket.buffer())
    with pytest.raises(TypeError, match=r"returns a torch.futures.Future"):
        module(inputs(rank)).square().sum().backward()


def check_buckets(rank, world_size):
    """Reverse registration first, then the order of readiness; what is reduced does not change."""

    class Crossed(nn.Module):  # registered in another order than used
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.last, self.first, self.middle = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x):
            return self.last(self.middle(self.first(x)))

    module = pypar.DataParallel(Crossed(), **TINY)
    names = [[s.name for s in b.slots] for b in module._reducer.buckets]
    assert names == [["middle.weight"], ["first.weight"], ["last.weight"]]
    launched = []
    launch = module._reducer.launch
    module._reducer.launch = lambda bucket: (launched.append((bucket.label, module._reducer.next)), launch(bucket))
    for step in range(2):
        module.zero_grad()
        module(inputs(rank, width=8)).square().sum().backward()
        expected = mean_gradients(world_size, Crossed, lambda m, r: m(inputs(r, width=8)).square().sum())
        assert_close(gradients(module), expected)
        assert all_home(module), step
    names = [[s.name for s in b.slots] for b in module._reducer.buckets]
    assert names == [["last.weight"], ["middle.weight"], ["first.weight"]]
    assert [label for label, _ in launched[3:]] == ["'last.weight'", "'middle.weight'", "'first.weight'"]
    for bucket in module._reducer.buckets:
        assert all(view.data_ptr() % 64 == bucket.flat.data_ptr() % 64 for view in bucket.gradients())


def check_reduced_during_backward(rank, world_size):
    module = pypar.DataParallel(small(4, 8, 8, 2, bias=False), **TINY)
    reducer, launched = module._reducer, []
    module.module[0].register_full_backward_pre_hook(lambda m, g: launched.append(reducer.next))
    for _ in range(2):
        module(inputs(rank)).sum().backward()
    assert launched == [2, 2], "the later layers' gradients are on their way before the first layer's backward"


def check_join(rank, world_size):
    for initial in (True, False):
        module = pypar.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), **TINY)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        with module.join(divide_by_initial_world_size=initial):
            for step in range(2 + rank):
                module(inputs(rank, step)).square().sum().backward()
                if step >= 2:  # rank 0 is out
                    alone = copy.deepcopy(module.module)
                    alone.zero_grad()
                    alone(inputs(rank, step)).square().sum().backward()
                    share = world_size if initial else world_size - 1
                    active = world_size - 1
                    if active == 1:
                        assert_close(gradients(module), {n: g / share for n, g in gradients(alone).items()})
                optimizer.step()
                optimizer.zero_grad()
        state = [None] * world_size
        dist.all_gather_object(state, module.state_dict())
        torch.testing.assert_close(state, [state[0]] * world_size, rtol=0, atol=0)
        module.zero_grad()  # and on as before
        module(inputs(rank)).square().sum().backward()
    module = pypar.DataParallel(Branches(), find_unused_parameters=True, **TINY)
    with module.join():
        for step in range(1 + 2 * rank):
            with module.no_sync() if step == 1 else torch.enable_grad():
                module(inputs(rank, step), left=True).square().sum().backward()
    with (
        pytest.raises(RuntimeError, match="exhausted"),
        module.join(throw_on_early_termination=True),
    ):
        for step in range(1 + rank):
            module(inputs(rank, step), left=True).square().sum().backward()


def check_subgroup(rank, world_size):
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    module = pypar.DataParallel(small(4, 6, 2), alone)
    module(inputs(rank)).square().sum().backward()
    own = small(4, 6, 2)
    own(inputs(rank)).square().sum().backward()
    assert_close(gradients(module), gradients(own))
    backwards = dist.new_group(list(range(world_size)))
    module = pypar.DataParallel(small(4, 6, 2), backwards)
    module(inputs(rank)).square().sum().backward()
    expected = mean_gradients(world_size, lambda: small(4, 6, 2), lambda m, r: m(inputs(r)).square().sum())
    assert_close(gradients(module), expected)
    other = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="not in the given group"):
            pypar.DataParallel(small(4, 2), other if other is not None else dist.GroupMember.NON_GROUP_MEMBER)


def check_errors(rank, world_size):
    with pytest.raises(ValueError, match=r"parameter 'weight' is .*\[3, 4\].* on rank 0, .*\[4, 4\].* on rank 1.*"):
        pypar.DataParallel(nn.Linear(4, 4 if rank else 3, bias=False))
    with pytest.raises(ValueError, match=r"torch.float32.*torch.float64"):
        pypar.DataParallel(nn.Linear(4, 4, dtype=torch.float64 if rank else torch.float32))
    with pytest.raises(ValueError, match=r"number 1 in order of registration is parameter 'bias'.*missing on rank 1"):
        pypar.DataParallel(nn.Linear(4, 4, bias=rank == 0))
    module = nn.Linear(4, 4)
    module.register_buffer("extra", torch.zeros(1 + rank))
    with pytest.raises(ValueError, match="buffer 'extra'"):
        pypar.DataParallel(module)
    with pytest.raises(ValueError, match="none of the 2 parameters of Linear requires a gradient"):
        pypar.DataParallel(nn.Linear(4, 4).requires_grad_(False))
    with pytest.raises(ValueError, match="meta device"):
        pypar.DataParallel(nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match="not initialized"):
        pypar.DataParallel(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="'0' makes sparse gradients"):
        pypar.DataParallel(nn.Sequential(nn.Embedding(4, 4, sparse=True)))
    with pytest.raises(ValueError, match="bucket_size_mb must be above 0, got -1"):
        pypar.DataParallel(nn.Linear(4, 4), bucket_size_mb=-1)
    with pytest.raises(TypeError, match="not copied or pickled"):
        copy.deepcopy(pypar.DataParallel(nn.Linear(4, 4)))
    module = pypar.DataParallel(nn.Linear(4, 4))
    module.double()
    with pytest.raises(RuntimeError, match=r"'weight' was torch.float32 on cpu.*is torch.float64 on cpu"):
        module(inputs(rank).double())


def check_state_dict(rank, world_size):
    module = pypar.DataParallel(small(4, 2))
    assert list(module.state_dict()) == ["module.0.weight", "module.0.bias"]
    assert [n for n, _ in module.named_parameters()] == ["module.0.weight", "module.0.bias"]
    other = small(4, 2)
    nn.modules.utils.consume_prefix_in_state_dict_if_present(state := module.state_dict(), "module.")
    other.load_state_dict(state)


def check_evaluation_does_not_communicate(rank, world_size):
    module = pypar.DataParallel(small(4, 2))
    if rank == 0:
        with torch.no_grad():
            module(inputs(rank))
    module(inputs(rank)).sum().backward()


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


def lose_a_rank(rank, world_size):
    module = pypar.DataParallel(small(4, 2))
    if rank == 1:
        os._exit(7)
    module(inputs(rank)).sum().backward()


def test_failed_reduction_raises_in_backward():
    *_, failures = run_ranks(lose_a_rank, 2, backend=BACKEND, timeout_s=20, expect_failure=True)
    assert "exit code 7" in failures[1]
    assert "module(inputs(rank)).sum().backward()" in failures[0]
    assert "rank 0 of 2: reducing bucket 1 of 1, 32 x torch.float32, gradients of '0.bias' to '0.weight'" in failures[0]
