"""Optimizer states in a memory-mapped file: the same bits, as many bytes as asked for, nothing left behind."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from zero.test_zero_parity import OPTIMIZERS, Model, groups_of
from zero.test_zero_state_dicts import differing, everything, train

import pypar
from pypar.testing import run_ranks
from pypar.zero.offload import StateFile

PAGE = 4096


def build(stage, optimizer="AdamW", **settings):
    full = Model(width=64, vocab=200)
    return pypar.Zero(full, stage=stage, optimizer=OPTIMIZERS[optimizer](groups_of(full)), **settings)


def in_file(tensor, path):
    """Whether a tensor's memory is a mapping of that file."""
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= at < last:
            return str(path) in line
    return False


def states_of(model):
    """(elements, path is the file's) of every state with dims, and of the masters."""
    file = model.optimizer.offload.file.path
    states = [v for s in model.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
    masters = [flat.master for flat in model._flats if flat.master is not flat.own and flat.parameters[0].requires_grad]
    return [(t.numel(), in_file(t, file)) for t in states + masters]


def check(rank, world, folder):
    for optimizer, dtype, ratio in (
        ("AdamW", None, 1.0),
        ("AdamW", torch.bfloat16, 0.5),
        ("AdamW amsgrad", None, 0.5),
        ("SGD", torch.bfloat16, 1.0),
        ("Adagrad", None, 0.5),
        ("AdamW", torch.bfloat16, 0.0),
    ):
        for stage in (1, 3):
            plain = build(stage, optimizer, param_dtype=dtype)
            mapped = build(stage, optimizer, param_dtype=dtype, offload=folder, offload_ratio=ratio)
            assert not list(folder.iterdir()), "without a name"
            for model in (plain, mapped):
                train(model, rank, world, (0, 1, 2))
            assert not differing(everything(mapped), everything(plain)), (optimizer, stage)
            sizes = states_of(mapped)
            share = sum(n for n, is_in in sizes if is_in) / sum(n for n, _ in sizes)
            assert ratio - 0.25 < share <= ratio, (optimizer, share)
            if ratio == 1:
                wanted = 4 * sum(n for n, _ in sizes)
                assert wanted <= mapped.optimizer.offload.file.bytes < wanted + 64 * len(sizes) + 2 * PAGE
    # What was loaded is in the file as well, and goes on with the same bits.
    plain.save_sharded(folder / "saved")
    for stage in (2, 3):
        again = build(stage, param_dtype=torch.bfloat16, offload=folder / "states")
        again.load_sharded(folder / "saved")
        assert all(is_in for _, is_in in states_of(again))
        own = again.optimizer.state_dict()
        full = again.full_state_dict()
        train(again, rank, world, (3,))
        last = everything(again)
        again.load_full_state_dict(full)
        again.optimizer.load_state_dict(own)
        assert all(is_in for _, is_in in states_of(again))
        train(again, rank, world, (3,))
        assert not differing(everything(again), last)


def test_the_same_bits(tmp_path):
    run_ranks(check, 2, tmp_path)


def check_kept(rank, world, folder):
    path = folder / "states"
    model = build(2, offload=path, offload_keep=True)
    total = sum(p.numel() for group in model.optimizer.param_groups for p in group["params"])
    assert 8 * total <= os.path.getsize(f"{path}.{rank}") < 8 * total + 64 * 40 + PAGE, "reserved before the first step"
    train(model, rank, world, (0,))
    some = next(iter(model.optimizer.state.values()))["exp_avg"]
    os.sync()
    assert some.numpy().tobytes() in Path(f"{path}.{rank}").read_bytes()
    with pytest.raises(FileExistsError, match=rf"cannot create {path}\.{rank}"):
        build(2, offload=path)


def test_a_file_that_is_kept(tmp_path):
    run_ranks(check_kept, 2, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["states.0", "states.1"]


def check_wrong(rank, world, folder):
    with pytest.raises(ValueError, match=r"offload_ratio=1\.5; it is a share, 0 to 1"):
        build(2, offload=folder, offload_ratio=1.5)
    with pytest.raises(
        FileNotFoundError, match=rf"pypar\.Zero: offload: cannot create {folder}/no/x\.\d: No such file"
    ):
        build(2, offload=folder / "no" / "x")
    with pytest.raises(OSError, match=r"pypar\.Zero: offload: cannot create /proc/x\.\d"):
        build(2, offload="/proc/x")
    limit, take = resource.getrlimit(resource.RLIMIT_FSIZE), StateFile.take

    def take_little(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, limit[1]))
        try:
            return take(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    if rank == 1:  # its disk alone is full
        StateFile.take = take_little
    with pytest.raises(OSError, match=rf"no room for \d+ more bytes in {folder}/full\.1: File too large") as raised:
        build(2, offload=folder / "full")
    assert raised.value.errno == errno.EFBIG
    dist.barrier()
    assert not list(folder.iterdir())


def test_wrong_input(tmp_path):
    run_ranks(check_wrong, 2, tmp_path)
