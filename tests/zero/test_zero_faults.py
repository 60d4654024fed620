"""A rank that dies within a step; modules that can't be wrapped; what happens to a module behind ZeRO's back."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from zero.test_zero_parity import OPTIMIZERS, Model, batch, groups_of, loss_of

import pypar
from pypar.testing import run_ranks


def build(stage, full=None, **settings):
    full = Model() if full is None else full
    return pypar.Zero(full, stage=stage, optimizer=torch.optim.AdamW, lr=1e-3, **settings)


def step(model, rank, number=0):
    model.optimizer.zero_grad()
    loss_of(model, batch(dist.get_world_size(), number)[rank * 4 : rank * 4 + 4]).backward()
    model.optimizer.step()


def killed(rank, world, stage, when):
    model = build(stage)
    step(model, rank)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1 and when == "between reduce and publish":
        model.optimizer.publish = die
    elif rank == 1:  # with some units reduced
        model.module.embed.weight.register_hook(die)
    with pytest.raises(pypar.PeerError, match="rank 1"):
        for number in range(1, 100):
            step(model, rank, number)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("when", ["between reduce and publish", "in backward"])
def test_a_rank_that_is_killed_ends_the_others(stage, when):
    *_, failures = run_ranks(killed, 3, stage, when, expect_failure=True)
    assert list(failures) == [1], failures


def check_what_cannot_be_wrapped(rank, world):
    def refused(match, full, **settings):
        with pytest.raises(ValueError, match=match):
            pypar.Zero(full, stage=2, **settings)

    other = OPTIMIZERS["AdamW"](nn.Linear(3, 4).parameters())
    refused(r"a parameter of shape \[4, 3\] that is none of Model's", Model(), optimizer=other)
    refused("'weight' is not initialized", nn.LazyLinear(3))
    refused("'0' makes sparse gradients", nn.Sequential(nn.Embedding(3, 3, sparse=True), nn.Linear(3, 3)))
    shapes = (
        r"parameter 0 is 'weight' torch.float32 \[3, 4\] trained on rank 0, 'weight' torch.float32 \[3, 5\] trained"
    )
    refused(f"the ranks hold different modules: {shapes} on rank 1", nn.Linear(4 + rank, 3))
    frozen = nn.Linear(3, 3)
    frozen.bias.requires_grad_(rank == 0)
    refused(r"'bias' torch.float32 \[3\] trained on rank 0, 'bias' torch.float32 \[3\] frozen on rank 1", frozen)
    for stage in (0, 4, "3", None):
        with pytest.raises(ValueError, match=r"stage=.*; there are 1 \(optimizer\), 2 \(gradients\), 3 \(parameters\)"):
            pypar.Zero(Model(), stage=stage)
    for kind, settings in ((torch.optim.LBFGS, {}), (torch.optim.Adafactor, {}), (torch.optim.Muon, {})):
        matrix = nn.Linear(4, 4, bias=False)
        with pytest.raises(
            ValueError, match=f"{kind.__name__} is not known to work element by element.*use one of SGD"
        ):
            pypar.Zero(matrix, stage=2, optimizer=kind, **settings)


def test_what_cannot_be_wrapped():
    run_ranks(check_what_cannot_be_wrapped, 2)


def replace(full):
    full.layers[0].up.weight = nn.Parameter(torch.zeros(33, 20))


def add(full):
    full.layers[0].more = nn.Parameter(torch.zeros(2))


def remove(full):
    full.layers[0].up.register_parameter("bias", None)


def assign(full):
    full.layers[0].up.weight.data = torch.zeros(33, 20)


def convert(full):
    full.layers[0].double()


def freeze(full):
    full.layers[0].up.weight.requires_grad_(False)


def unfreeze(full):
    full.layers[1].up.weight.requires_grad_(True)


CHANGES = {
    replace: r"'layers\.0\.up\.weight' is not the parameter that was wrapped",
    add: r"'layers\.0\.more' is not the parameter that was wrapped",
    remove: r"'layers\.0\.up\.bias' is not the parameter that was wrapped",
    assign: r"'layers\.0\.up\.weight' no longer lies where ZeRO keeps it",
    convert: r"'layers\.0\.norm\.weight' .*convert the\s+module",
    freeze: r"'layers\.0\.up\.weight' requires no gradient, and did when the module was wrapped",
    unfreeze: r"'layers\.1\.up\.weight' requires a gradient, and did not when the module was wrapped",
}


def check_changes(rank, world):
    for stage in (1, 3):
        for change, match in CHANGES.items():
            model = build(stage)
            step(model, rank)
            change(model.module)
            with pytest.raises(RuntimeError, match=f"pypar.Zero, rank {rank}: {match}"):
                step(model, rank)
        model = build(stage, Model())
        with pytest.raises(RuntimeError, match="groups can't be added"):
            model.optimizer.add_param_group({"params": groups_of(Model())[0]["params"]})


def test_changes_behind_its_back():
    run_ranks(check_changes, 2)
