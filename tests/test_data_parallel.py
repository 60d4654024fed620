"""DataParallel: the same training as one process and as torch's DDP, the same bits in every run."""

from __future__ import annotations

import copy
import itertools
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pypar
from pypar.testing import run_ranks

BACKEND = "gloo"
TINY = {"bucket_size_mb": 1e-5, "first_bucket_size_mb": 1e-5}  # a bucket for every parameter
BATCH = 12  # of all ranks together: divisible by 2, 3 and 4


class Net(nn.Module):
    """A tied embedding, a frozen layer, a bias, a norm, a layer that is used twice, an embedding."""

    def __init__(self, vocab_size: int = 17, width: int = 12):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(8, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.twice = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 31), nn.Linear(31, width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        x = self.frozen(x)
        x = x + torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


def batch(step: int = 0, vocab_size: int = 17):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(vocab_size, (2, BATCH, 5), generator=generator)


def loss_of(module, data):
    return F.cross_entropy(module(data[0]).flatten(0, 1), data[1].flatten())


def optimizer_for(module, name):
    params = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=0.05, eps=1e-5) if name == "adamw" else torch.optim.SGD(params, lr=0.3)


def train(module, optimizer_name, share=slice(None), steps=3, set_to_none=True):
    """[losses], [{name: gradient} per step], {name: weight}"""
    optimizer = optimizer_for(module, optimizer_name)
    bare = getattr(module, "module", module)
    losses, grads = [], []
    for step in range(steps):
        loss = loss_of(module, batch(step)[:, share])
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad.clone() for n, p in bare.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return losses, grads, {n: p.detach().clone() for n, p in bare.named_parameters()}


def share_of(rank, world_size):
    return slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)


def all_home(wrapper):
    return all(slot.param.grad is not None and slot.is_home(slot.param.grad) for slot in wrapper._reducer.slots)


def train_all(rank, world_size):
    """Every variant, on one rank."""
    share, results = share_of(rank, world_size), {}
    for optimizer in ("sgd", "adamw"):
        for kind, kwargs in {
            "default": {},
            "many buckets": {"bucket_size_mb": 0.0005, "first_bucket_size_mb": 0.0001},
            "copied": {**TINY, "fuse_linear_grads": False},
            "static": {**TINY, "static_graph": True},
            "unused": {**TINY, "find_unused_parameters": True},
        }.items():
            module = pypar.DataParallel(Net(), **kwargs)
            results[optimizer, kind] = train(module, optimizer, share, set_to_none=kind != "many buckets")
            module.zero_grad()
            loss_of(module, batch()[:, share]).backward()
            assert all_home(module), "a gradient does not lie in its bucket"
        ddp = nn.parallel.DistributedDataParallel(Net())
        results[optimizer, "ddp"] = train(ddp, optimizer, share)
    again = pypar.DataParallel(Net(), bucket_size_mb=0.0005, first_bucket_size_mb=0.0001)
    results["again"] = train(again, "adamw", share, set_to_none=False)
    return results


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_parity_with_one_process(world_size):
    ranks = run_ranks(train_all, world_size, backend=BACKEND)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for optimizer in ("sgd", "adamw"):
        losses, grads, weights = train(Net(), optimizer)
        for kind in [kind for key in ranks[0] if key[0] == optimizer for kind in [key[1]]]:
            where = f"{optimizer}, {kind}, world size {world_size}"
            mean = [sum(x) / world_size for x in zip(*(r[optimizer, kind][0] for r in ranks), strict=True)]
            torch.testing.assert_close(mean, losses, **close, msg=where)
            torch.testing.assert_close(ranks[0][optimizer, kind][1], grads, **close)
            torch.testing.assert_close(ranks[0][optimizer, kind][2], weights, **close)
            for rank in ranks[1:]:
                torch.testing.assert_close(rank[optimizer, kind][1:], ranks[0][optimizer, kind][1:], rtol=0, atol=0)
    for rank in ranks:
        torch.testing.assert_close(rank["again"], rank["adamw", "many buckets"], rtol=0, atol=0)


def small(*sizes, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes)))


def gradients(module):
    return {n: p.grad.clone() for n, p in getattr(module, "module", module).named_parameters() if p.grad is not None}


def inputs(rank, step=0, rows=3, width=4):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(100 * rank + step))


def mean_gradients(world_size, make, loss):
    """{name: mean over ranks of the gradient of loss(module, rank)}, computed by one process."""
    sums: dict[str, torch.Tensor] = {}
    for rank in range(world_size):
        module = make()
        loss(module, rank).backward()
        for name, grad in gradients(module).items():
            sums[name] = sums.get(name, 0) + grad / world_size
    return sums


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# Each check_* runs on every rank and is one feature; they share the processes of one run_ranks call.


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


class Branches(nn.Module):
    """`left` and `right` are used by some ranks, `never` by none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.never, self.left, self.right, self.both = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, left):
        return self.both((self.left if left else self.right)(x))


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
    def __init__(self, reentrant, shared=False, unused=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.reentrant, self.shared = reentrant, shared
        if unused:
            self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=self.reentrant)
        again = self.first if self.shared else self.second
        x = torch.utils.checkpoint.checkpoint(again, torch.tanh(x), use_reentrant=self.reentrant)
        return self.last(self.second(x) if self.shared else x)


def check_checkpointing(rank, world_size):
    cases = [
        (dict(reentrant=False), {}),
        (dict(reentrant=False, shared=True), {}),
        (dict(reentrant=True), {}),
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


def check_bfloat16(rank, world_size):
    for dtype in (torch.bfloat16, torch.float16):
        module = pypar.DataParallel(small(4, 64, 2).to(dtype), **TINY)
        module(inputs(rank).to(dtype)).square().sum().backward()
        local = []
        for r in range(world_size):
            alone = small(4, 64, 2).to(dtype)
            alone(inputs(r).to(dtype)).square().sum().backward()
            local.append(gradients(alone))
        for name, grad in gradients(module).items():
            exact = sum(g[name].float() for g in local) / world_size
            assert grad.dtype == dtype
            assert torch.equal(grad, exact.to(dtype)), f"{dtype} {name}: not the float32 sum, rounded once"


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


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


def run_checks(rank, world_size, names):
    """{name: None or the traceback}. Ends at the first failure, on whichever rank: the ranks part ways there."""
    store, results = dist.distributed_c10d._get_default_store(), {}
    for name in names:
        try:
            CHECKS[name](rank, world_size)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
        store.set(f"{name}/{rank}", "failed" if results[name] else "passed")
        if any(store.get(f"{name}/{r}") == b"failed" for r in range(world_size)):
            break
    return results


@pytest.fixture(scope="module")
def checked():
    return run_ranks(run_checks, 2, list(CHECKS), backend=BACKEND, timeout_s=30)


@pytest.mark.parametrize("name", list(CHECKS))
def test_feature(checked, name):
    for rank, results in enumerate(checked):
        if name not in results:
            pytest.fail("did not run, because a check before it failed", pytrace=False)
        if results[name] is not None:
            pytest.fail(f"rank {rank}: {results[name]}", pytrace=False)
