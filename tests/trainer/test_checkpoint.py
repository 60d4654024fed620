"""Checkpoints are whole or not there, and damage is named."""

import errno
import os

import pytest
import torch

import pypar
from pypar.testing import run_ranks
from pypar.trainer import checkpoint, state
from pypar.trainer.errors import TrainError


def fill(content: bytes):
    def write(folder):
        (folder / "model.safetensors").write_bytes(content)
        checkpoint.write_state(folder, {"step": 0})

    return write


def save(run, *steps, keep=9):
    for step in steps:
        checkpoint.write(run, step, fill(b"step %d" % step), keep)


def steps_of(run):
    return [checkpoint.step_of(path) for path in checkpoint.all_of(run)]


def test_keeps_the_newest(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert steps_of(tmp_path) == [3, 4]
    assert checkpoint.latest(tmp_path) == checkpoint.folder_of(tmp_path, 4)
    checkpoint.verify(checkpoint.folder_of(tmp_path, 4))


def test_a_resumed_branch_replaces_later_checkpoints(tmp_path):
    save(tmp_path, 5, 10, 15)
    checkpoint.write(tmp_path, 10, fill(b"again"), 9)
    assert steps_of(tmp_path) == [5, 10]
    assert (checkpoint.folder_of(tmp_path, 10) / "model.safetensors").read_bytes() == b"again"


def test_full_disk_leaves_the_previous_one(tmp_path):
    save(tmp_path, 1)

    def full(folder):
        fill(b"half")(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(TrainError, match=r"step 2: No space left on device.*step-00000001, is intact.*--resume") as got:
        checkpoint.write(tmp_path, 2, full, 9)
    assert got.value.exit_code == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    checkpoint.verify(checkpoint.latest(tmp_path))


def test_killed_save_leaves_nothing_that_counts(tmp_path):
    save(tmp_path, 1)
    # Killed while it wrote step 2, and before that between the two renames that replace step 1.
    (tmp_path / "checkpoints" / ".tmp-step-00000002-77").mkdir()
    checkpoint.folder_of(tmp_path, 1).rename(tmp_path / "checkpoints" / ".old-step-00000001")
    assert checkpoint.find("latest", [tmp_path]) == checkpoint.folder_of(tmp_path, 1)
    save(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest"])
def test_damage_is_named_with_the_remedy(tmp_path, damage):
    save(tmp_path, 1, 2, 3)
    path = checkpoint.folder_of(tmp_path, 3)
    file = path / "model.safetensors"
    if damage == "flip":
        file.write_bytes(b"stEp 3")
    elif damage == "cut":
        file.write_bytes(b"step")
    elif damage == "gone":
        file.unlink()
    else:
        file = path / "manifest.json"
        file.write_text("{")
    (checkpoint.folder_of(tmp_path, 2) / "state.json").unlink()
    with pytest.raises(TrainError, match=rf"step-00000003 is corrupt: {file.name}.*--resume .*step-00000001"):
        checkpoint.verify(path)


def test_no_intact_checkpoint_is_left(tmp_path):
    save(tmp_path, 3)
    (checkpoint.folder_of(tmp_path, 3) / "state.json").unlink()
    with pytest.raises(TrainError, match="no earlier one is intact: start a new run"):
        checkpoint.verify(checkpoint.latest(tmp_path))


def test_find(tmp_path):
    with pytest.raises(TrainError, match="no checkpoint in"):
        checkpoint.find("latest", [tmp_path])
    with pytest.raises(TrainError, match="no such folder"):
        checkpoint.find(str(tmp_path / "absent"), [])
    with pytest.raises(TrainError, match="neither a checkpoint nor a run"):
        checkpoint.find(str(tmp_path), [])
    save(tmp_path, 1, 2)
    assert checkpoint.find(str(tmp_path), []) == checkpoint.folder_of(tmp_path, 2)
    assert checkpoint.find(str(checkpoint.folder_of(tmp_path, 1)), []) == checkpoint.folder_of(tmp_path, 1)


class Tied(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, width)
        self.head = torch.nn.Linear(width, 5)
        self.head.weight = self.embedding.weight


def there_and_back(rank, world_size, folder):
    def step(model, optimizer):
        module = model.module
        module.head(module.embedding(torch.arange(5))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def make(module):
        return pypar.parallelize(module, "dp=1", torch.optim.AdamW, lr=0.1, fused=True)

    model, optimizer = make(Tied())
    step(model, optimizer)
    full = state.Full.of(model, optimizer)
    state.save_model(full, {"model_type": "none"}, folder)
    state.save_optimizer(full, folder)
    loaded = Tied()
    state.load_model(loaded, folder)
    again, its_optimizer = make(loaded)
    state.load_optimizer(again, its_optimizer, folder)
    step(model, optimizer)
    step(again, its_optimizer)
    assert loaded.head.weight is loaded.embedding.weight
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_model_and_optimizer_come_back_bit_for_bit(tmp_path):
    run_ranks(there_and_back, 1, tmp_path)
    with pytest.raises(TrainError, match=r"another model: embedding.weight is \(5, 4\) there, \(5, 6\) here"):
        state.load_model(Tied(6), tmp_path)
