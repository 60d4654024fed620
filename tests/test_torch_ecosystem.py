"""Unmodified torch code on the process group "pypar": the results it has on gloo, and in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pypar import backend
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")

STEPS = 3
Result = dict[str, torch.Tensor]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4))


def batch(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(world * 8, 16, generator=generator), torch.randn(world * 8, 4, generator=generator)


def share(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = batch(world)
    return x[rank * 8 : rank * 8 + 8], y[rank * 8 : rank * 8 + 8]


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def in_one_process(world: int) -> Result:
    model = mlp()
    train(model, *batch(world))
    return {name: p.detach() for name, p in model.named_parameters()}


def ddp(rank: int, world: int) -> Result:
    model = nn.parallel.DistributedDataParallel(mlp(), bucket_cap_mb=0.001)
    train(model, *share(rank, world))
    return {name: p.detach() for name, p in model.module.named_parameters()}


def fsdp2(rank: int, world: int) -> Result:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (world,))
    model = mlp()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, *share(rank, world))
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def tensor_parallel(rank: int, world: int) -> Result:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (world,))
    model = parallelize_module(mlp(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    train(model, *batch(world))
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for name, p in model.named_parameters()
    }


def pipeline(rank: int, world: int) -> Result:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    whole = mlp()
    stages = [nn.Sequential(*whole[:2]), nn.Sequential(*whole[2:])]
    own = stages[rank]
    stage = PipelineStage(own, rank, world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2, eps=1e-5)
    x, y = batch(world)
    for _ in range(STEPS):
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y)
        optimizer.step()
        optimizer.zero_grad()
    first = 0 if rank == 0 else 2
    return {f"{first + int(name[0])}{name[1:]}": p.detach() for name, p in own.named_parameters()}


CASES = {"DDP": ddp, "FSDP2": fsdp2, "DTensor tensor parallel": tensor_parallel, "pipelining": pipeline}


def every_case(rank: int, world: int) -> dict[str, Result]:
    return {name: case(rank, world) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def trained() -> dict[str, list[dict[str, Result]]]:
    return {name: run_ranks(every_case, 2, backend=name) for name in ("pypar", "gloo")}


@pytest.mark.parametrize("case", CASES)
def test_same_weights_as_on_gloo_and_in_one_process(trained, case):
    alone = in_one_process(2)
    seen: set[str] = set()
    for rank in range(2):
        ours, theirs = trained["pypar"][rank][case], trained["gloo"][rank][case]
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(weight, alone[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            seen.add(name)
    assert seen == alone.keys()
