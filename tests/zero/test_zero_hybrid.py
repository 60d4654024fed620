"""Hybrid sharding: 4 ranks as 2 replicas of 2 shards against one process."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from zero.test_zero_parity import (
    CLOSE,
    OPTIMIZERS,
    Doubles,
    Model,
    WithUnused,
    assert_same,
    batch,
    loss_of,
    train_alone,
    train_sharded,
)

import pypar
from pypar import backend, symmetric
from pypar.testing import run_ranks

ADAMW = OPTIMIZERS["AdamW"]


def mesh_of_four():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def check_parity(rank, world, gathers):
    mesh = mesh_of_four()
    by_groups = {"group": mesh.get_group("shard"), "replicate_group": mesh.get_group("replicate")}
    for stage in (1, 2, 3):
        alone = train_alone(world, ADAMW, clip=0.3)
        for groups in ({"group": mesh}, by_groups):
            found = train_sharded(rank, world, stage, ADAMW, clip=0.3, **groups)
            assert_same(found, alone)
            everyone = [torch.empty_like(w) for w in (torch.cat([w.flatten() for w in found[3].values()]),) * world]
            dist.all_gather(everyone, torch.cat([w.flatten() for w in found[3].values()]))
            assert all(torch.equal(w, everyone[0]) for w in everyone), "replicas differ"
        for accumulate, make in ((1, WithUnused), (3, Model), (2, Doubles)):
            found = train_sharded(
                rank,
                world,
                stage,
                ADAMW,
                model_class=make,
                accumulate=accumulate,
                group=mesh,
                find_unused_parameters=make is WithUnused,
            )
            assert_same(found, train_alone(world, ADAMW, model_class=make, accumulate=accumulate))
    model = pypar.Zero(Model(), mesh, lr=1e-3)
    assert len(model._gatherer.units) == (4 if gathers else 0)
    held = sum(p.numel() for group in model.optimizer.param_groups for p in group["params"])
    everyone = torch.tensor(held)
    dist.all_reduce(everyone)
    assert everyone == 2 * sum(p.numel() for p in Model().parameters() if p.requires_grad)
    for number in range(2):  # two backward passes that both reduce, without zero_grad between them: they add up
        loss_of(model, batch(world, number)[rank * 4 : rank * 4 + 4]).backward()
    full = Model()
    for number in range(2):
        loss_of(full, batch(world, number)).backward()
    wanted = {n: p.grad for n, p in full.named_parameters() if p.grad is not None}
    torch.testing.assert_close(model.full_gradients(), wanted, **CLOSE)


@pytest.mark.parametrize("backend_name", ["pypar", "gloo"])
def test_parity(backend_name):
    run_ranks(check_parity, 4, backend_name == "gloo", backend=backend_name)


def check_hosts(rank, world, folder):
    os.environ["PYPAR_NODE_ID"] = "aabb"[rank]
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("pypar", store=store, rank=rank, world_size=world)
    mesh = mesh_of_four()
    assert symmetric.shares_memory(mesh.get_group("shard")) and not symmetric.shares_memory(mesh.get_group("replicate"))
    assert_same(train_sharded(rank, world, 3, ADAMW, clip=0.3, group=mesh), train_alone(world, ADAMW, clip=0.3))


@pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
def test_a_replica_on_each_host(tmp_path):
    run_ranks(check_hosts, 4, str(tmp_path), backend="none")


def check_skipped(rank, world):
    """A gradient that is not finite on one rank of one replica skips the step of all."""
    for stage in (1, 2, 3):
        model = pypar.Zero(Model(), mesh_of_four(), stage=stage, lr=1e-3)
        for number, bad in ((0, False), (1, True), (2, False)):
            model.optimizer.zero_grad()
            loss = loss_of(model, batch(world, number)[rank * 4 : rank * 4 + 4])
            (loss * (float("nan") if bad and rank == 3 else 1.0)).backward()
            norm = torch.tensor(model.optimizer.clip_grad_norm_(1.0))
            everyone = [torch.empty(()) for _ in range(world)]
            dist.all_gather(everyone, norm)
            assert all(torch.equal(n, norm) or bad for n in everyone) and norm.isfinite() == (not bad)
            model.optimizer.step()
            assert model.optimizer.num_skipped == int(number > 0)


def test_a_gradient_that_is_not_finite_skips_the_step_of_every_replica():
    run_ranks(check_skipped, 4)


def check_wrong(rank, world):
    mesh = mesh_of_four()
    shard, replicate = mesh.get_group("shard"), mesh.get_group("replicate")
    with pytest.raises(ValueError, match="beside a DeviceMesh"):
        pypar.Zero(Model(), mesh, replicate_group=replicate)
    with pytest.raises(ValueError, match="replicate_group= without group="):
        pypar.Zero(Model(), replicate_group=replicate)
    with pytest.raises(ValueError, match=rf"have ranks \[{rank // 2 * 2}, {rank // 2 * 2 + 1}\] in common"):
        pypar.Zero(Model(), shard, replicate_group=shard)
    cube = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"a DeviceMesh of shape \(2, 1, 2\)"):
        pypar.Zero(Model(), cube)
    assert pypar.Zero(Model(), cube["a", "c"]).world_size == 2
    assert pypar.Zero(Model(), cube["b", "c"]).replicate_group is None
    assert pypar.Zero(Model(), mesh["shard"]).world_size == 2


def test_wrong_groups():
    run_ranks(check_wrong, 4)
