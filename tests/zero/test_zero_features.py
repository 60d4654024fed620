"""ZeRO's features: what is kept when, half types, skipped steps, state under another number of ranks, wrong input."""

import copy
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from zero.test_zero_parity import OPTIMIZERS, Model, batch, groups_of, loss_of

import pypar
from pypar.testing import run_ranks
from pypar.zero.freed import FreedParameter

ADAMW = OPTIMIZERS["AdamW"]


def sharded(stage, **settings):
    return pypar.Zero(Model(), stage=stage, optimizer=torch.optim.AdamW, lr=1e-3, eps=1e-5, **settings)


def step(model, rank, number=0):
    model.optimizer.zero_grad()
    loss = loss_of(model, batch(dist.get_world_size(), number)[rank * 4 : rank * 4 + 4])
    loss.backward()
    model.optimizer.step()
    return loss.detach()


def check_kept(rank, world, shares):
    for stage in (1, 2, 3):
        model = sharded(stage)
        loss = loss_of(model, batch(world, 0)[rank * 4 : rank * 4 + 4])
        inner = model.module.layers[0].up.weight
        goes = stage == 3 and not shares
        assert isinstance(inner, FreedParameter) == goes, "freed after its forward"
        loss.backward()
        assert (inner.grad is None) == (stage > 1), "full gradients are kept at stage 1 alone"
        assert isinstance(model.module.embed.weight, FreedParameter) == goes
        held = sum(p.numel() for group in model.optimizer.param_groups for p in group["params"])
        total = sum(p.numel() for p in Model().parameters() if p.requires_grad)
        everyone = torch.tensor(held)
        dist.all_reduce(everyone)
        assert everyone == total and held < total
        model.optimizer.step()
        with model.full_params():
            assert model.module.layers[0].up.weight.shape == (33, 20)
            for p in model.module.parameters():
                p.zero_() if not p.requires_grad else p.data.zero_()
        assert float(loss_of(model, batch(world, 1))) == pytest.approx(torch.log(torch.tensor(37.0)).item(), rel=1e-5)


@pytest.mark.parametrize("backend", ["pypar", "gloo"])
def test_what_is_kept(backend):
    run_ranks(check_kept, 2, backend == "pypar", backend=backend)


def check_one_copy(rank, world):
    """The ranks' parameters are the same memory: what one writes, the others read."""
    model = sharded(3)
    weight = model.module.layers[0].down.weight
    dist.barrier()
    if rank == 1:
        weight.data[0, 0] = 42.0
    dist.barrier()
    assert weight[0, 0] == 42.0


def test_one_copy_of_the_parameters():
    run_ranks(check_one_copy, 3)


def check_half(rank, world):
    """Master weights go where float32 training goes; the parameters are those, rounded."""
    results = []
    for stage in (1, 2, 3):
        model = sharded(stage, param_dtype=torch.bfloat16)
        assert model.module.embed.weight.dtype == torch.bfloat16
        losses = [step(model, rank, n).float() for n in range(6)]
        with model.full_params():
            weights = {n: p.clone() for n, p in model.module.named_parameters()}
        for flat in model._flats:
            assert torch.equal(flat.own, flat.master.to(torch.bfloat16))
        results.append((torch.stack(losses), weights))
        exact = sharded(stage)
        wanted = torch.stack([step(exact, rank, n) for n in range(6)])
        torch.testing.assert_close(results[-1][0], wanted, rtol=0.03, atol=0.03)
        reduced = [b.shard.dtype for b in model._reducer.buckets]
        assert set(reduced) == {torch.float32}
    for losses, weights in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert all(torch.equal(w, results[0][1][n]) for n, w in weights.items())


def test_half_precision():
    run_ranks(check_half, 2)


def check_skipped(rank, world):
    for stage, bad in ((1, "nan"), (2, "inf"), (3, "nan")):
        model = sharded(stage)
        step(model, rank)
        with model.full_params():
            before = copy.deepcopy(model.module.state_dict())
        model.optimizer.zero_grad()
        loss = loss_of(model, batch(world, 1)[rank * 4 : rank * 4 + 4])
        (loss * (float(bad) if rank == 1 else 1.0)).backward()
        model.optimizer.step()
        assert model.optimizer.num_skipped == 1
        with model.full_params():
            after = model.module.state_dict()
            assert all(torch.equal(after[n], before[n]) for n in before), "nobody stepped"
        step(model, rank, 2)
        assert model.optimizer.num_skipped == 1


def test_a_gradient_that_is_not_finite_skips_the_step_everywhere():
    run_ranks(check_skipped, 2)


def first_half(rank, world, stage):
    model = sharded(stage)
    for number in range(2):
        model.optimizer.zero_grad()
        ids = batch(6, number)
        loss_of(model, ids[rank * 24 // world : (rank + 1) * 24 // world]).backward()
        model.optimizer.step()
    with model.full_params():
        weights = {n: w.clone() for n, w in model.module.state_dict().items()}
    return weights, model.optimizer.full_state()


def second_half(rank, world, stage, weights, state):
    full = Model()
    full.load_state_dict(weights)
    model = pypar.Zero(full, stage=stage, optimizer=torch.optim.AdamW, lr=1e-3, eps=1e-5)
    model.optimizer.load_full_state(state)
    loss_of(model, batch(6, 2)[rank * 24 // world : (rank + 1) * 24 // world]).backward()
    model.optimizer.step()
    with model.full_params():
        return {n: w.clone() for n, w in model.module.state_dict().items()}


def test_state_goes_on_under_another_number_of_ranks_and_stage():
    (weights, state), _ = run_ranks(first_half, 2, 1)
    expected, _ = run_ranks(second_half, 2, 1, weights, state)
    for world, stage in ((3, 2), (1, 3), (2, 3)):
        found = run_ranks(second_half, world, stage, weights, state)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def check_wrong(rank, world):
    with pytest.raises(ValueError, match=r"stage=4; there are 1 \(optimizer\), 2"):
        pypar.Zero(Model(), stage=4)
    with pytest.raises(ValueError, match="LBFGS is not known to work element by element"):
        pypar.Zero(Model(), optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="no parameter of Linear requires a gradient"):
        pypar.Zero(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match=r"param_dtype=torch\.int8"):
        pypar.Zero(Model(), param_dtype=torch.int8)
    full = Model()
    with pytest.raises(ValueError, match="lr belong to an optimizer that is there already"):
        pypar.Zero(full, optimizer=ADAMW(groups_of(full)), lr=1.0)
    model = sharded(2)
    model.module.layers[0].up.weight.data = torch.zeros(33, 20)
    with pytest.raises(RuntimeError, match=r"'layers\.0\.up\.weight' no longer lies where ZeRO keeps it"):
        model(batch(world, 0))


def test_wrong_input():
    run_ranks(check_wrong, 2)


def killed(rank, world, stage):
    model = sharded(stage)
    step(model, rank)
    if rank == 1:  # between its backward and its step
        model.optimizer.zero_grad()
        loss_of(model, batch(world, 1)[4:8]).backward()
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(pypar.PeerError, match="rank 1"):
        for number in range(1, 100):
            step(model, rank, number)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_killed_rank_ends_the_others(stage):
    *_, failures = run_ranks(killed, 3, stage, expect_failure=True)
    assert list(failures) == [1], failures
