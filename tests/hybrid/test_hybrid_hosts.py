"""Plans over ranks of several hosts; PYPAR_NODE_ID makes several of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid.hybrid_common import differences, init_on_hosts, make_batches, make_model
from hybrid.test_hybrid_checkpoint import _differences as differences_of
from hybrid.test_hybrid_checkpoint import _load_each as load_each
from hybrid.test_hybrid_checkpoint import _save_each as save_each

from pypar import backend
from pypar.hybrid import Plan
from pypar.testing import run_ranks
from pypar.verify.steps import Run, Settings, alone, together

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
SETTINGS = Settings(accumulate=2, clip=0.5)


def _train(rank: int, world: int, hosts: str, store: str, plan: str, kind: str, model: dict[str, Any]) -> Run:
    init_on_hosts(rank, world, hosts, store)
    return together(make_model(kind, **model), Plan.parse(plan), make_batches(6, 7, tokens=50), SETTINGS)


def _check(folder: Path, hosts: str, plan: str, kind: str, model: dict[str, Any]) -> None:
    found = run_ranks(_train, len(hosts), hosts, str(folder / "store"), plan, kind, model, backend="none")[0]
    wanted = alone(make_model(kind, **model), make_batches(6, 7, tokens=50), SETTINGS)
    assert not (wrong := differences(found, wanted)), "\n".join(wrong[:20])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "llama", "gpt2"])
@pytest.mark.parametrize(
    ("hosts", "plan", "model"),
    [
        ("aabb", "dp=2 tp=2 zero=3", {"tied": True}),
        ("aabb", "dp=2 tp=2 zero=3 sequence_parallel=false recompute=true", {"frozen": True}),
        ("abcd", "dp=2 tp=2 zero=3", {"heads": 3}),
    ],
)
def test_tensor_parallel_within_a_host_and_zero_3_between(tmp_path, hosts, plan, kind, model):
    _check(tmp_path, hosts, plan, kind, model)


@pytest.mark.slow
def test_with_a_pipeline_as_well(tmp_path):
    _check(tmp_path, "aabbaabb", "pp=2 dp=2 tp=2 zero=3 micro_batches=2", "llama", {"layers": 3})


def _save_and_load(rank: int, world: int, hosts: str, folder: str, plan: str, elsewhere: str) -> tuple[Any, Any]:
    init_on_hosts(rank, world, hosts, f"{folder}/store")
    saved = save_each(rank, world, folder, [plan], "llama")
    return saved, load_each(rank, world, folder, [(plan, [plan, elsewhere])], "llama")


def test_checkpoints_from_and_to_one_host(tmp_path):
    between, within = "dp=2 tp=2 zero=3 micro_batches=2", "dp=4 zero=1"
    ((there, losses),) = run_ranks(save_each, 4, str(tmp_path), [within], "llama")[0]
    ((here, also),), found = run_ranks(_save_and_load, 4, "aabb", str(tmp_path), between, within, backend="none")[0]
    found += run_ranks(load_each, 4, str(tmp_path), [(within, [between])], "llama")[0]
    for (plan, source, state, next_losses), wanted in zip(found, (here, there, here), strict=True):
        assert not differences_of(state, wanted), f"{plan} from {source}"
        torch.testing.assert_close(next_losses, losses if wanted is there else also, rtol=1e-5, atol=1e-6)
