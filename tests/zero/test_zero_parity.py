"""ZeRO 1, 2, 3 on several ranks against one process: loss, gradients, weights after 3 steps, optimizer states."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pypar
from pypar.testing import run_ranks

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
STEPS = 3


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 33), nn.Linear(33, width, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Tied embedding and head, a frozen layer, a scalar parameter, one that is never used."""

    def __init__(self, width=20, vocab=37):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight
        self.layers[1].up.requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x) * self.scale)


class Doubles(Model):
    """Of a type that zero_scatter doesn't take."""

    def __init__(self):
        super().__init__()
        self.double()


class WithUnused(Model):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(5, 5)


def batch(world, step):
    return torch.randint(37, (world * 4, 9), generator=torch.Generator().manual_seed(step))


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def groups_of(model):
    decayed = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
    rest = [p for p in model.parameters() if p.dim() <= 1 and p.requires_grad]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}]


OPTIMIZERS = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-5),
    "AdamW amsgrad": functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-5, amsgrad=True),
    "Adam": functools.partial(torch.optim.Adam, lr=1e-3, eps=1e-5, weight_decay=0.01),
    "SGD": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-3, eps=1e-4),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2, eps=1e-4),
}


def train_alone(world, make, clip=None, model_class=Model, accumulate=1):
    model = model_class()
    optimizer = make(groups_of(model))
    losses, norms, grads = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for part in range(accumulate):
            loss = loss_of(model, batch(world, step * accumulate + part))
            loss.backward()
            total += loss.item()
        if step == 0:
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(total)
    state = {
        n: {k: torch.as_tensor(v) for k, v in optimizer.state[p].items()}
        for n, p in model.named_parameters()
        if p in optimizer.state
    }
    return losses, norms, grads, model.state_dict(), state


def train_sharded(rank, world, stage, make, clip=None, model_class=Model, accumulate=1, **settings):
    full = model_class()
    if rank != 0:  # rank 0's values count
        for p in full.parameters():
            p.data.add_(1.0)
    model = pypar.Zero(full, stage=stage, optimizer=make(groups_of(full)), **settings)
    losses, norms, grads = [], [], []
    for step in range(STEPS):
        model.optimizer.zero_grad()
        total = 0.0
        for part in range(accumulate):
            mine = batch(world, step * accumulate + part)[rank * 4 : rank * 4 + 4]
            if part < accumulate - 1:
                with model.no_sync():
                    loss = loss_of(model, mine)
                    loss.backward()
            else:
                loss = loss_of(model, mine)
                loss.backward()
            mean = loss.detach().clone()
            dist.all_reduce(mean, op=dist.ReduceOp.AVG)
            total += mean.item()
        if step == 0:
            grads = model.full_gradients()
        if clip is not None:
            norms.append(model.optimizer.clip_grad_norm_(clip))
        model.optimizer.step()
        losses.append(total)
    with model.full_params():
        weights = {n: w.clone() for n, w in model.module.state_dict().items()}
    return losses, norms, grads, weights, model.optimizer.full_state()


def assert_same(found, wanted):
    for what, a, b in zip(("losses", "norms", "gradients", "weights", "states"), found, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, check_dtype=False, msg=lambda m, w=what: f"{w}: {m}")


def check_twice(rank, world, stage, model_class):
    """Two backward passes that both reduce, without zero_grad between them: the gradients add up."""
    model, full = pypar.Zero(model_class(), stage=stage), model_class()
    for number in range(2):
        loss_of(model, batch(world, number)[rank * 4 : rank * 4 + 4]).backward()
        loss_of(full, batch(world, number)).backward()
    wanted = {n: p.grad for n, p in full.named_parameters() if p.grad is not None}
    torch.testing.assert_close(model.full_gradients(), wanted, **CLOSE)


def norm_of(grads):
    return torch.cat([g.flatten() for g in grads.values()]).norm().item()


def check_clipped(rank, world):
    """Clipping is a factor until somebody looks, clips again, or adds to the gradients."""
    for stage in (1, 2, 3):
        model = pypar.Zero(Model(), stage=stage)
        loss_of(model, batch(world, 0)[rank * 4 : rank * 4 + 4]).backward()
        before = {n: g.clone() for n, g in model.full_gradients().items()}
        norm = model.optimizer.clip_grad_norm_(norm_of(before) / 2)
        assert norm == pytest.approx(norm_of(before), rel=1e-5)
        assert model.optimizer.clip_grad_norm_(norm / 4) == pytest.approx(norm / 2, rel=1e-4)
        if stage == 1:
            assert norm_of(model.full_gradients()) == pytest.approx(norm / 4, rel=1e-4)
            continue
        loss_of(model, batch(world, 0)[rank * 4 : rank * 4 + 4]).backward()
        wanted = {n: 1.25 * g for n, g in before.items()}
        torch.testing.assert_close(model.full_gradients(), wanted, rtol=1e-4, atol=1e-6)


def test_clipped_gradients_are_what_they_say():
    run_ranks(check_clipped, 2)


def check(rank, world):
    for name, make in OPTIMIZERS.items():
        wanted = train_alone(world, make)
        results = [train_sharded(rank, world, stage, make) for stage in (1, 2, 3)]
        for stage, found in enumerate(results, 1):
            try:
                assert_same(found, wanted)
            except AssertionError as error:
                raise AssertionError(f"{name}, stage {stage}: {error}") from None
        for other in results[1:]:
            assert all(torch.equal(other[3][n], results[0][3][n]) for n in results[0][3]), f"{name}: stages differ"
    adamw = OPTIMIZERS["AdamW"]
    clipped = []
    for stage in (1, 2, 3):
        assert_same(train_sharded(rank, world, stage, adamw, clip=0.3), train_alone(world, adamw, clip=0.3))
        assert_same(train_sharded(rank, world, stage, adamw, accumulate=3), train_alone(world, adamw, accumulate=3))
        assert_same(
            train_sharded(rank, world, stage, adamw, model_class=WithUnused, find_unused_parameters=True),
            train_alone(world, adamw, model_class=WithUnused),
        )
        for accumulate in (1, 2):
            assert_same(
                train_sharded(rank, world, stage, adamw, model_class=Doubles, clip=0.3, accumulate=accumulate),
                train_alone(world, adamw, model_class=Doubles, clip=0.3, accumulate=accumulate),
            )
        check_twice(rank, world, stage, Model)
        check_twice(rank, world, stage, Doubles)
        once = train_sharded(rank, world, stage, adamw, clip=0.3)
        again = train_sharded(rank, world, stage, adamw, clip=0.3)
        assert all(torch.equal(once[3][n], again[3][n]) for n in once[3])
        clipped.append(once[3])
    for other in clipped[1:]:
        assert all(torch.equal(other[n], clipped[0][n]) for n in other), "clipped: stages differ"


@pytest.mark.parametrize("world", [2, 3])
def test_parity(world):
    run_ranks(check, world)
