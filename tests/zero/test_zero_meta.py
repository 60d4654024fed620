"""Parameters created on meta: the weights of one process, whatever the number of ranks, a unit in memory at a time."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from zero.test_zero_parity import OPTIMIZERS, Model, batch, groups_of, loss_of
from zero.test_zero_state_dicts import differing

import pypar
from pypar.testing import run_ranks
from pypar.zero.materialize import Materializer
from pypar.zero.units import units_of

INNER = (nn.Linear, nn.Embedding, nn.LayerNorm)


class Drawn(Model):
    """Model with a buffer, and a parameter of the root's own, both of which reset_parameters sets."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(4), persistent=False)

    def reset_parameters(self):
        self.scale.fill_(1.3)
        self.table.copy_(torch.rand(4))


def scaled(module):
    """A block draws over what its layers drew."""
    if isinstance(module, INNER):
        module.reset_parameters()
    elif isinstance(module, Drawn):
        module.reset_parameters()
        module.embed.weight.mul_(0.5)
    elif hasattr(module, "down"):
        nn.init.normal_(module.down.weight, std=0.01)


def on_meta(model_class=Drawn):
    with torch.device("meta"):
        return model_class()


def reset(module):
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def alone(init):
    """In one process, as torch does it: a tied weight is drawn twice, and the second time counts."""
    model = on_meta()
    model.to_empty(device="cpu")
    model.head.weight = model.embed.weight
    torch.manual_seed(11)
    with torch.no_grad():
        model.apply(init)
    return model


class DrawsItself(Drawn):
    """As Hugging Face's models do: by a function of the root, which comes before reset_parameters."""

    def _init_weights(self, module):
        if isinstance(module, INNER):
            nn.init.constant_(module.weight, 0.25)
        elif isinstance(module, Drawn):
            module.scale.fill_(2.0)
            module.table.fill_(3.0)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class DrawsAllAtOnce(Drawn):
    def _init_weights(self):
        raise AssertionError("takes no module, so that it is not a function of one")


@pytest.mark.parametrize(("model_class", "init"), [(DrawsItself, None), (DrawsAllAtOnce, reset)])
def test_the_models_own_function_draws_if_it_takes_a_module(model_class, init):
    found, wanted = on_meta(model_class), on_meta(model_class).to_empty(device="cpu")
    wanted.head.weight = wanted.embed.weight
    for model, draw in ((found, None), (wanted, init or wanted._init_weights)):
        torch.manual_seed(11)
        with torch.no_grad():
            list(Materializer(model, []).run(units_of(model))) if draw is None else model.apply(draw)
    for name, value in (*wanted.named_parameters(), *wanted.named_buffers()):
        assert torch.equal(found.get_parameter(name) if "table" not in name else found.table, value), name


def check_weights(rank, world):
    for name, init in (("reset_parameters", reset), (None, reset), (scaled, scaled)):
        wanted = alone(init)
        for stage, dtype in ((1, None), (2, None), (3, None), (2, torch.bfloat16), (3, torch.bfloat16)):
            full = on_meta()
            torch.manual_seed(11 if rank == 0 else 100 + rank)
            optimizer = OPTIMIZERS["AdamW"](groups_of(full))
            model = pypar.Zero(full, stage=stage, optimizer=optimizer, init=name, param_dtype=dtype)
            assert full.head.weight is full.embed.weight and not full.layers[1].up.weight.requires_grad
            assert not any(t.is_meta for t in (*full.parameters(), *full.buffers()))
            torch.testing.assert_close(full.table, wanted.table, rtol=0, atol=0)
            state = model.full_state_dict()
            exact = {n: p.detach() for n, p in wanted.state_dict().items()}
            for n, found in state["model"].items():
                assert torch.equal(found, exact[n].to(found.dtype)), (n, stage, dtype)
            for n, each in state["optimizer"]["state"].items():
                assert dtype is None or torch.equal(each["master"], exact[n]), "masters keep every digit"
            if dtype is None:
                plain = alone(init)
                again = pypar.Zero(plain, stage=stage, optimizer=OPTIMIZERS["AdamW"](groups_of(plain)))
                for each in (model, again):
                    loss_of(each, batch(world, 0)[rank * 4 : rank * 4 + 4]).backward()
                    each.optimizer.step()
                assert not differing(model.full_state_dict(), again.full_state_dict())


@pytest.mark.parametrize(("world", "backend"), [(2, "pypar"), (3, "pypar"), (2, "gloo"), (1, "pypar")])
def test_weights_are_those_of_one_process(world, backend):
    run_ranks(check_weights, world, backend=backend)


class Buffered(Model):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.ones(3))


def check_state_dict(rank, world):
    given = Buffered().state_dict()
    del given["head.weight"]  # tied: one name will do
    for stage in (1, 3):
        model = pypar.Zero(on_meta(Buffered), stage=stage, init=given if rank == 0 else {})
        assert not differing(model.full_state_dict()["model"], Buffered().state_dict())
        real = Buffered()
        with torch.no_grad():
            real.scale.fill_(7.0)
        model = pypar.Zero(real, stage=stage, init=given)
        assert not differing(model.full_state_dict()["model"], Buffered().state_dict())


@pytest.mark.parametrize("backend", ["pypar", "gloo"])
def test_from_a_state_dict(backend):
    run_ranks(check_state_dict, 2, backend=backend)


def check_part_is_there(rank, world):
    """Modules that hold nothing on meta keep their values."""
    full = on_meta()
    full.layers[0] = Model().layers[0]
    model = pypar.Zero(full, stage=2)
    state = model.full_state_dict()["model"]
    wanted = Model().state_dict()
    assert torch.equal(state["layers.0.up.weight"], wanted["layers.0.up.weight"])
    assert not torch.equal(state["layers.2.up.weight"], wanted["layers.2.up.weight"])


def test_what_is_there_stays():
    run_ranks(check_part_is_there, 2)


class Outside(Drawn):
    """Changes at the root what another unit holds."""

    def reset_parameters(self):
        super().reset_parameters()
        self.layers[0].up.weight.zero_()


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1500, 1500, bias=False) for _ in range(12))


def failing(module):
    raise OSError("no such file")


def check_wrong(rank, world):
    def refused(match, model, **settings):
        with pytest.raises(ValueError, match=match):
            pypar.Zero(model, stage=3, **settings)

    refused(r"'layers\.0' \(Rows\) has parameters or buffers on meta and no reset_parameters", on_meta(Bare))
    refused("Model has parameters or buffers on meta and no reset_parameters", on_meta(Model))
    refused("init='xavier'; give 'reset_parameters', a function", on_meta(), init="xavier")
    refused("init= leaves 'layers.0.norm.weight' unset", on_meta(), init=lambda m: None)
    refused(r"init raised OSError\('no such file'\)", on_meta(), init=failing)
    refused("init= is for parameters on the meta device, and none is", Model(), init=reset)
    given = Buffered().state_dict()
    refused(
        "the state dict of init= has no 'scale'",
        on_meta(Buffered),
        init={n: t for n, t in given.items() if n != "scale"},
    )
    shapes = r"'scale' is \[1\] in the state dict of init=, \[\] in the module"
    refused(shapes, on_meta(Buffered), init=given | {"scale": torch.zeros(1)})
    refused("init= leaves 'table' unset", on_meta(), init=Drawn().state_dict())
    refused(r"init= changes 'layers\.0\.up\.weight' at a module outside of its unit", on_meta(Outside))
    dist.barrier()


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Rows()])


def test_wrong_input():
    run_ranks(check_wrong, 2)


def private_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def check_memory(rank, world, shares):
    """Of 12 units of 9 MB: while one is made, there are the shards of those before it, and no other."""
    unit, slack = 1500 * 1500 * 4, 8 * 2**20
    before, seen = private_bytes(), []

    def watched(module):
        if isinstance(module, nn.Linear):
            module.reset_parameters()
            seen.append(private_bytes() - before)

    with torch.device("meta"):
        full = Wide()
    pypar.Zero(full, stage=3, init=watched, optimizer=torch.optim.SGD, lr=0.1)
    assert len(seen) == (12 if rank == 0 else 0)
    for number, grown in enumerate(seen):
        shards = 0 if shares else number * unit / world
        assert grown < shards + unit + slack, (number, grown / 2**20)


@pytest.mark.parametrize("backend", ["pypar", "gloo"])
def test_a_unit_in_memory_at_a_time(backend):
    run_ranks(check_memory, 2, backend == "pypar", backend=backend)
