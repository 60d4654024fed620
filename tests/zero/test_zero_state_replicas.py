"""State dicts and parameters on meta where shards have replicas, and where hosts share copies."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from zero.test_zero_meta import alone, on_meta, reset
from zero.test_zero_parity import OPTIMIZERS, Model, batch, groups_of, loss_of
from zero.test_zero_state_dicts import build, differing, everything
from zero.test_zero_state_dicts import train as train_share

import pypar
from pypar import backend
from pypar.testing import run_ranks


def start(rank, world, folder, nodes):
    os.environ["PYPAR_NODE_ID"] = nodes[rank]
    dist.init_process_group("pypar", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)


def step(model, rank, world, number):
    loss_of(model, batch(world, number)[rank * 4 : rank * 4 + 4]).backward()
    model.optimizer.step()
    model.optimizer.zero_grad()


def check_replicas(rank, world, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def made(stage, full=None, **settings):
        full = Model() if full is None else full
        return pypar.Zero(full, mesh, stage=stage, optimizer=OPTIMIZERS["AdamW"](groups_of(full)), **settings)

    wanted = alone(reset)
    for stage in (2, 3):
        full = on_meta()
        torch.manual_seed(11 if rank == 0 else 100 + rank)
        assert not differing(made(stage, full).full_state_dict()["model"], dict(wanted.state_dict()))
    model = made(2)
    for number in range(2):
        step(model, rank, world, number)
    model.save_sharded(folder / "saved")
    saved = everything(model)
    others = made(3), made(3)
    others[0].load_sharded(folder / "saved")
    others[1].load_full_state_dict(saved if rank % 2 == 1 else None, src=1)
    step(model, rank, world, 2)
    for other in others:
        step(other, rank, world, 2)
        assert not differing(everything(other), everything(model))


@pytest.mark.parametrize("backend_name", ["pypar", "gloo"])
def test_replicas(tmp_path, backend_name):
    run_ranks(check_replicas, 4, tmp_path, backend=backend_name)


def check_hosts(rank, world, folder):
    start(rank, world, folder, "aabb")
    wanted = alone(reset)
    for stage in (2, 3):
        full = on_meta()
        torch.manual_seed(11 if rank == 0 else 100 + rank)
        model = pypar.Zero(full, stage=stage)
        assert not differing(model.full_state_dict()["model"], dict(wanted.state_dict()))
    model = build(2)
    train_share(model, rank, world, (0, 1))
    model.save_sharded(folder / "saved")
    saved = everything(model)
    others = build(3), build(3, param_dtype=torch.float32)
    others[0].load_sharded(folder / "saved")
    others[1].load_full_state_dict(saved if rank == 3 else None, src=3)
    train_share(model, rank, world, (2, 3))
    for other in others:
        assert not differing(everything(other), saved)
        train_share(other, rank, world, (2, 3))
        assert not differing(everything(other), everything(model))


@pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
def test_hosts(tmp_path):
    run_ranks(check_hosts, 4, tmp_path, backend="none")
