"""torch.compile, activation checkpointing, mixed types and buffers, four ranks: the numbers of one process."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from zero.test_zero_parity import (
    CLOSE,
    OPTIMIZERS,
    Block,
    Model,
    assert_same,
    batch,
    loss_of,
    train_alone,
    train_sharded,
)

import pypar
from pypar.testing import run_ranks

ADAMW = OPTIMIZERS["AdamW"]


class Checkpointed(Model):
    reentrant = False

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x) * self.scale)


class Reentrant(Checkpointed):
    reentrant = True


class Mixed(Model):
    """One block in float64, a norm with buffers in float32, frozen parameters of both types."""

    def __init__(self):
        super().__init__()
        self.layers[1] = nn.Sequential(Cast(torch.float64), Block(20).double(), Cast(torch.float32))
        self.layers[1][1].up.requires_grad_(False)
        self.layers.append(Normed())


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(20, momentum=0.3).eval()
        self.register_buffer("offset", torch.full((20,), 0.25))

    def train(self, mode=True):
        return self  # statistics of a batch differ from those of its parts

    def forward(self, x):
        return x + self.norm(x.flatten(0, 1)).view_as(x) + self.offset


def check_models(rank, world):
    for model_class in (Checkpointed, Reentrant, Mixed):
        wanted = train_alone(world, ADAMW, clip=0.3, model_class=model_class, accumulate=2)
        results = []
        for stage in (1, 2, 3):
            results.append(train_sharded(rank, world, stage, ADAMW, clip=0.3, model_class=model_class, accumulate=2))
            assert_same(results[-1], wanted)
        for other in results[1:]:
            assert all(torch.equal(other[3][n], results[0][3][n]) for n in results[0][3]), model_class


@pytest.mark.parametrize("backend", ["pypar", "gloo"])
def test_checkpointing_types_and_buffers(backend):
    run_ranks(check_models, 2, backend=backend)


def check_four(rank, world):
    wanted = train_alone(world, ADAMW, clip=0.3)
    for stage in (1, 2, 3):
        assert_same(train_sharded(rank, world, stage, ADAMW, clip=0.3), wanted)


def test_four_ranks():
    run_ranks(check_four, 4)


class Compiled(Model):
    """how: what is compiled, before or after the module is wrapped."""

    how = ""

    def __init__(self):
        super().__init__()
        if self.how == "blocks":
            for layer in self.layers:
                layer.compile(backend="aot_eager")
        elif self.how == "module":
            self.compile(backend="aot_eager")


def check_compiled(rank, world, stages, ways):
    wanted = train_alone(world, ADAMW)
    for stage in stages:
        for how in ways:
            torch._dynamo.reset()
            Compiled.how = how
            found = train_sharded(rank, world, stage, ADAMW, model_class=Compiled)
            assert_same(found, wanted)
    for stage in stages:
        for how in ("wrapper", "its method", "its blocks"):
            torch._dynamo.reset()
            model = called = pypar.Zero(Model(), stage=stage, optimizer=torch.optim.AdamW, lr=1e-3, eps=1e-5)
            plain = Model()
            if how == "wrapper":
                called = torch.compile(model, backend="aot_eager")
            elif how == "its method":
                model.compile(backend="aot_eager")
            else:
                for n, layer in enumerate(model.module.layers):
                    model.module.layers[n] = torch.compile(layer, backend="aot_eager")
            for number in range(2):
                loss_of(called, batch(world, number)[rank * 4 : rank * 4 + 4]).backward()
                loss_of(plain, batch(world, number)).backward()
            grads = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
            torch.testing.assert_close(model.full_gradients(), grads, **CLOSE)


def test_compiled():
    run_ranks(check_compiled, 2, (1, 2, 3), ("blocks", "module"))
