"""Stage 3 where units are gathered: prefetch changes no number, two units are whole at most, ranks gather alike."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from zero.test_zero_parity import CLOSE, Block

import pypar
from pypar.testing import run_ranks
from pypar.zero.order import Order

WIDTH, NUM_BLOCKS, STEPS = 12, 4, 3


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor


class Opaque:
    """What can't be looked into."""

    def __init__(self, value):
        self.held = lambda: value


class LoraBlock(nn.Module):
    """The frozen weight's node runs after both trained ones have their gradients."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)
        self.base.requires_grad_(False)

    def forward(self, x):
        return torch.tanh(self.base(x)) + self.up(self.down(x))


class Stack(nn.Module):
    """Blocks, used in one of several ways."""

    def __init__(self, way="plain"):
        super().__init__()
        torch.manual_seed(5)
        self.way, self.passes = way, 0
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(LoraBlock() if way == "lora" else Block(WIDTH) for _ in range(NUM_BLOCKS))
        if way == "nested":
            self.blocks[1].inner = nn.ModuleList(Block(WIDTH) for _ in range(2))
            self.blocks[1].forward = self.nested
        self.norm = nn.LayerNorm(WIDTH)

    def nested(self, x):
        block = self.blocks[1]
        y = block.norm(x)
        for inner in block.inner:
            y = checkpoint(inner, y, use_reentrant=False)
        return x + block.down(F.gelu(block.up(y)))

    def run(self, x, blocks):
        for block in blocks:
            x = block(x)
        return x

    def forward(self, x):
        self.passes += self.training
        x, (a, b, c, d) = self.first(x), self.blocks
        if self.way in ("checkpoint each", "reentrant each"):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.way == "reentrant each")
        elif self.way in ("checkpoint some", "reentrant some"):
            for some in ([a, b, c], [d]):
                x = checkpoint(self.run, x, some, use_reentrant=self.way == "reentrant some")
        elif self.way == "twice":
            x = self.run(x, [a, b, b, c, a, d])
        elif self.way == "branches":
            x = a(x) + b(x) * c(x)
            x = d(x) + x
        elif self.way == "dropped":  # another block in every pass, the same on every rank
            x = self.run(x, [block for n, block in enumerate(self.blocks) if n != self.passes % NUM_BLOCKS])
        elif self.way == "dataclasses":
            for block in self.blocks:
                x = Result(block(x)).hidden
        else:
            x = self.run(x, self.blocks)
        return self.norm(x)


class Wrapped(nn.Module):
    """Gives and takes dataclasses, or what hides its tensors."""

    def __init__(self, block, kind):
        super().__init__()
        self.block, self.kind = block, kind

    def forward(self, x):
        return self.kind(self.block(x if isinstance(x, torch.Tensor) else _open(x)))


def _open(x):
    return x.hidden if isinstance(x, Result) else x.held()


class Hidden(Stack):
    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(Wrapped(block, kind) for block in self.blocks)

    def forward(self, x):
        return self.norm(_open(self.run(self.first(x), self.blocks)))


WAYS = [
    "plain",
    "checkpoint each",
    "reentrant each",
    "checkpoint some",
    "reentrant some",
    "twice",
    "branches",
    "dropped",
    "lora",
    "nested",
]


class Watch:
    """What a Gatherer does: which units it gathers, in which order, how many are whole at a time."""

    def __init__(self, model, besides=()):
        self.names, self.peak = [], 0
        self.units = [u for u in model._gatherer.units if not u.stays]
        for unit in self.units:
            self.replace(unit, unit.start, besides)

    def replace(self, unit, start, besides):
        def recorded():
            if not unit.is_whole:
                self.names.append(unit.flats[0].unit)
            start()
            self.peak = max(self.peak, sum(u.is_whole and u.flats[0].unit not in besides for u in self.units))

        unit.start = recorded

    def stop(self):
        for unit in self.units:
            del unit.start

    def num_whole(self):
        return sum(u.is_whole for u in self.units)


def data(rank, number):
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(100 * number + rank))


def sharded(full, way, **settings):
    unused = way == "dropped"
    settings = {"lr": 1e-3, "eps": 1e-5, "find_unused_parameters": unused} | settings
    return pypar.Zero(full, stage=3, optimizer=torch.optim.AdamW, **settings)


def train(rank, world, way, make=Stack, **settings):
    model = sharded(make(way), way, **settings)
    watch = Watch(model, besides=("blocks.1",) if way == "nested" else ())
    losses = []
    for number in range(STEPS):
        model.optimizer.zero_grad()
        loss = model(data(rank, number)).square().mean()
        loss.backward()
        assert watch.num_whole() == 0, "freed after backward"
        losses.append(loss.item())
        model.optimizer.step()
        model.eval()
        with torch.no_grad() if number % 2 else torch.inference_mode():
            losses.append(model(data(rank, 50)).square().mean().item())
        model.train()
        assert watch.num_whole() == 0 and not any(flat.is_full for flat in model._flats), "freed without a backward"
        assert not any(p.is_inference() for p in model.parameters())
    watch.stop()
    with model.full_params():
        weights = {n: w.clone() for n, w in model.module.state_dict().items()}
    return losses, weights, watch


def train_alone(world, way):
    model = Stack(way)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-5)
    for number in range(STEPS):
        optimizer.zero_grad()
        model(torch.cat([data(r, number) for r in range(world)])).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def check(rank, world):
    next_unit = Order.next
    for way in WAYS:
        losses, weights, watch = train(rank, world, way)
        everyone = [None] * world
        dist.all_gather_object(everyone, watch.names)
        assert all(names == watch.names for names in everyone), f"{way}: the order of gathers differs"
        assert watch.peak == 2, f"{way}: {watch.peak} units were whole at a time"
        if way == "plain":
            names = [f"blocks.{n}" for n in range(NUM_BLOCKS)]
            # The last block stays for its backward, where it is known to be the last: not in the first pass.
            once, again = names + names[::-1] + names, names + names[-2::-1] + names
            assert watch.names == once + again * (STEPS - 1)
        alone = train_alone(world, way)
        torch.testing.assert_close(weights, alone, **CLOSE, msg=lambda m, w=way: f"{w}: {m}")
        Order.next = property(lambda self: None)
        try:
            found = train(rank, world, way)
        finally:
            Order.next = next_unit
        assert found[0] == losses and all(torch.equal(found[1][n], w) for n, w in weights.items()), way
        assert found[2].peak == 1, f"{way}, not prefetched: {found[2].peak}"


def test_prefetch():
    run_ranks(check, 2, backend="gloo")


def check_hidden(rank, world):
    """Units whose outputs hide their tensors stay whole until a backward has passed."""
    _, wanted, _ = train(rank, world, "plain")
    for kind, most in ((Result, 2), (Opaque, NUM_BLOCKS)):
        _, found, watch = train(rank, world, "plain", lambda _way, kind=kind: Hidden(kind))
        assert watch.peak == most
        for name, weight in wanted.items():
            head, _, tail = name.partition(".")
            number, _, rest = tail.partition(".")
            other = f"blocks.{number}.block.{rest}" if head == "blocks" else name
            assert torch.equal(found[other], weight), name


def test_outputs_that_are_no_tensors():
    run_ranks(check_hidden, 2, backend="gloo")


def check_exceptions(rank, world):
    """Every rank stops in the same place, and the next step is right."""
    _, wanted, _ = train(rank, world, "plain")
    model = sharded(Stack(), "plain")
    watch = Watch(model)

    def fail(*_):
        raise KeyError("here")

    for number in range(STEPS):
        model.optimizer.zero_grad()
        for block in (0, 2, 3):
            hook = model.module.blocks[block].up.register_forward_pre_hook(fail)
            with pytest.raises(KeyError, match="here"):
                model(data(rank, number))
            hook.remove()
            x = data(rank, number)
            hook = model.module.blocks[block].register_forward_hook(lambda _m, _a, y: y.register_hook(fail) and None)
            out = model(x)
            hook.remove()
            if number == 0 and block == 3:  # before anything is reduced
                with pytest.raises(KeyError, match="here"):
                    out.square().mean().backward()
        model.optimizer.zero_grad()  # what the backward that stopped had left
        model(data(rank, number)).square().mean().backward()
        model.optimizer.step()
    assert watch.peak <= 2
    watch.stop()
    with model.full_params():
        for name, weight in model.module.state_dict().items():
            assert torch.equal(weight, wanted[name]), name


def test_after_exceptions():
    run_ranks(check_exceptions, 2, backend="gloo")


def check_several_passes(rank, world):
    """no_sync, two forwards before one backward, a backward through the gradient (create_graph)."""
    model, full = sharded(Stack(), "plain"), Stack()
    optimizer = torch.optim.AdamW(full.parameters(), lr=1e-3, eps=1e-5)
    watch = Watch(model)
    for number in range(STEPS):
        model.optimizer.zero_grad()
        optimizer.zero_grad()
        with model.no_sync():
            model(data(rank, number)).square().mean().backward()
            assert watch.num_whole() == 0
        (model(data(rank, number + 10)) * model(data(rank, number + 20))).mean().backward()
        assert watch.num_whole() == 0 and watch.peak == 2
        everyone = [torch.cat([data(r, number + n) for r in range(world)]) for n in (0, 10, 20)]
        full(everyone[0]).square().mean().backward()
        (full(everyone[1]) * full(everyone[2])).mean().backward()
        wanted = {n: p.grad for n, p in full.named_parameters()}
        torch.testing.assert_close(model.full_gradients(), wanted, **CLOSE)
        model.optimizer.step()
        optimizer.step()
    model.optimizer.zero_grad()
    optimizer.zero_grad()
    for net, x in ((model, data(rank, 0)), (full, torch.cat([data(r, 0) for r in range(world)]))):
        x.requires_grad_()
        loss = net(x).square().sum()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        slope.square().mean().backward()
    wanted = {n: p.grad for n, p in full.named_parameters() if p.grad is not None}
    torch.testing.assert_close(model.full_gradients(), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model(data(rank, 0))
    assert watch.num_whole() == 0


def test_several_passes():
    run_ranks(check_several_passes, 2, backend="gloo")


def check_compiled(rank, world):
    """The wrapper, or the units by themselves."""
    _, wanted, _ = train(rank, world, "plain")
    for inner in (True, False):
        model = sharded(Stack(), "plain")
        if inner:
            for block in model.module.blocks:
                block.compile(backend="eager")
        compiled = model if inner else torch.compile(model, backend="eager")
        for number in range(STEPS):
            model.optimizer.zero_grad()
            compiled(data(rank, number)).square().mean().backward()
            model.optimizer.step()
        with model.full_params():
            for name, weight in model.module.state_dict().items():
                torch.testing.assert_close(weight, wanted[name], **CLOSE)


def test_compiled():
    run_ranks(check_compiled, 2, backend="gloo")


def test_order():
    order = Order()
    a, b, c, d = "abcd"
    assert order.next is None
    for unit in (a, b, c):
        order.follow(unit)
        assert order.next is None, "nothing is known yet"
    order.begin()
    assert order.next == a
    order.follow(a)
    assert order.next == b
    order.follow(c)  # b was left out
    assert order.next is None
    order.begin()
    assert order.last == [a, c]
    order.follow(d)  # new
    assert order.next == a
    order.follow(a)
    assert order.next == c
    order.begin([b, a])
    assert order.next == b
    order.begin()
    assert order.last == [b, a], "an empty pass teaches nothing"
