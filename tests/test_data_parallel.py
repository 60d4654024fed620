"""DataParallel: the same training as one process and as torch's DDP, the same bits in every run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from data_parallel_common import TINY, all_home, gradients, inputs, small
from torch import nn

import pypar
from pypar.testing import run_ranks

BACKEND = "pypar"
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


def average_low_precision(rank, world_size):
    """The float32 sum, rounded once: no further than half a unit in the last place from the exact mean."""
    for dtype in (torch.bfloat16, torch.float16):
        module = pypar.DataParallel(small(4, 64, 2).to(dtype), **TINY)
        module(inputs(rank).to(dtype)).square().sum().backward()
        local = []
        for other in range(world_size):
            alone = small(4, 64, 2).to(dtype)
            alone(inputs(other).to(dtype)).square().sum().backward()
            local.append(gradients(alone))
        for name, grad in gradients(module).items():
            exact = sum(g[name].double() for g in local) / world_size
            error = (grad.double() - exact).abs()
            assert grad.dtype == dtype
            assert (error <= 0.5001 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all(), f"{dtype} {name}"


def train_all(rank, world_size):
    """Every variant, on one rank."""
    share, results = share_of(rank, world_size), {}
    average_low_precision(rank, world_size)
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
