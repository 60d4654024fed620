"""State dicts, full and sharded: under another number of ranks, another stage, other parameter types; bit for bit under
the same."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from zero.test_zero_parity import OPTIMIZERS, Model, batch, groups_of, loss_of

import pypar
from pypar.testing import run_ranks
from pypar.zero.partition import boxes


class Buffered(Model):
    """With buffers of a state dict and of none, and a parameter that a box of three dims is cut from."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(9, 20, 7) / 10)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("aside", torch.ones(2), persistent=False)

    def forward(self, ids):
        return super().forward(ids) + self.kernel.square().sum()


def build(stage, optimizer="AdamW", **settings):
    full = Buffered()
    return pypar.Zero(full, stage=stage, optimizer=OPTIMIZERS[optimizer](groups_of(full)), **settings)


def train(model, rank, world, steps):
    """The same 6 sequences a step, whatever the number of ranks."""
    for step in steps:
        model.optimizer.zero_grad()
        mine = batch(3, step)[rank * 12 // world : (rank + 1) * 12 // world]
        (loss_of(model, mine) * len(mine) * world / 12).backward()
        model.optimizer.step()


def everything(model):
    return copy.deepcopy(model.full_state_dict())


def differing(found, wanted, path=""):
    """The first path at which two nested states aren't equal bit for bit; "" when they are."""
    if isinstance(wanted, dict):
        if found.keys() != wanted.keys():
            return f"{path}: {sorted(found.keys() ^ wanted.keys())}"
        return next((d for k in wanted if (d := differing(found[k], wanted[k], f"{path}/{k}"))), "")
    same = torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted
    return "" if same else path


def saver(rank, world, stage, folder, dtype):
    """Two steps, saved in each form; and two more, uninterrupted."""
    model = build(stage, param_dtype=dtype)
    train(model, rank, world, (0, 1))
    model.module.seen.fill_(4.0)
    for group in model.optimizer.param_groups:
        group["lr"] *= 0.5
    model.save_sharded(folder)
    saved = everything(model)
    only = model.full_state_dict(dst=1)
    assert only == {} if rank != 1 else not differing(only, saved)
    train(model, rank, world, (2, 3))
    return saved, everything(model)


def loader(rank, world, stage, folder, dtype, saved):
    """From each form: the state that it gives, and that of two steps from there."""
    out = []
    for how in ("sharded", "full", "sent"):
        model = build(stage, param_dtype=dtype)
        train(model, rank, world, (5,))  # something else
        if how == "sharded":
            model.load_sharded(folder)
        elif how == "full":
            model.load_full_state_dict(saved)
        else:
            model.load_full_state_dict(saved if rank == 1 else None, src=1)
        assert torch.equal(model.module.seen, torch.full((3,), 4.0))
        state = everything(model)
        train(model, rank, world, (2, 3))
        out.append((state, everything(model)))
    return out


@pytest.mark.parametrize("backend", ["pypar", "gloo"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded(tmp_path, backend, dtype):
    saved, wanted = run_ranks(saver, 3, 2, tmp_path, dtype, backend=backend)[0]
    assert ("master" in saved["optimizer"]["state"]["embed.weight"]) == (dtype is not None)
    for world, stage in ((3, 2), (2, 3), (3, 3)):
        for state, after in run_ranks(loader, world, stage, tmp_path, dtype, saved, backend=backend)[0]:
            assert not differing(state, saved), differing(state, saved)
            if world == 3:
                assert not differing(after, wanted), differing(after, wanted)
            elif dtype is None:
                for part in ("model", "optimizer"):
                    found, expected = (s[part].get("state", s[part]) for s in (after, wanted))
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if dtype is None:  # what the plain module and torch's own tools read
        plain = Buffered()
        state = {"model": plain.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        assert not differing(dict(plain.state_dict()), saved["model"])
        plain.load_state_dict(saved["model"])


def changes_type(rank, world, folder, saved):
    """A checkpoint of bfloat16 parameters goes on in float32 from the master weights, and the other way round."""
    model = build(3)
    model.load_sharded(folder / "half")
    found = everything(model)["model"]
    for name, state in saved["optimizer"]["state"].items():
        assert torch.equal(found[name], state["master"]), name
    model.save_sharded(folder / "full")
    model = build(1, param_dtype=torch.bfloat16)
    model.load_sharded(folder / "full")
    assert not differing(everything(model), saved)


def test_another_type_of_parameters(tmp_path):
    saved, _ = run_ranks(saver, 3, 2, tmp_path / "half", torch.bfloat16)[0]
    run_ranks(changes_type, 2, tmp_path, saved)


def check_other_optimizers(rank, world, folder):
    for name in ("SGD", "Adagrad", "AdamW amsgrad"):
        model = build(2, name)
        train(model, rank, world, (0, 1))
        model.save_sharded(folder / name)
        again = build(3, name)
        again.load_sharded(folder / name)
        train(model, rank, world, (2,))
        train(again, rank, world, (2,))
        assert not differing(everything(again), everything(model)), name


def test_other_optimizers(tmp_path):
    run_ranks(check_other_optimizers, 2, tmp_path)


def check_state_dict_of_the_wrapper(rank, world, shares):
    model = build(3)
    train(model, rank, world, (0,))
    wanted = everything(model)["model"]
    if shares:
        assert not differing({k.removeprefix("module."): v for k, v in model.state_dict().items()}, wanted)
    else:
        for module in (model, model.module, model.module.layers[1]):
            with pytest.raises(RuntimeError, match=r"state_dict.*full_state_dict\(\).*full_params\(\)"):
                module.state_dict()
        for module in (model.module, model.module.layers[1]):
            with pytest.raises(RuntimeError, match=r"load_full_state_dict"):
                module.load_state_dict({})
    with model.full_params():
        assert not differing(dict(model.module.state_dict()), wanted)
    changed = {f"module.{name}": tensor + 1 for name, tensor in wanted.items()}
    model.load_state_dict(changed)
    found = everything(model)["model"]
    assert not differing(found, {k.removeprefix("module."): v for k, v in changed.items()})


@pytest.mark.parametrize("backend", ["pypar", "gloo"])
def test_state_dict_of_the_wrapper(backend):
    run_ranks(check_state_dict_of_the_wrapper, 2, backend == "pypar", backend=backend)


def check_wrong(rank, world, folder):
    model = build(2)
    train(model, rank, world, (0,))
    good = everything(model)
    for src in (None, 0):
        bad = copy.deepcopy(good)
        del bad["model"]["scale"]
        with pytest.raises(ValueError, match="the state dict has no 'scale'"):
            model.load_full_state_dict(bad, src)
        bad["model"]["scale"] = torch.zeros(2)
        with pytest.raises(ValueError, match=r"'scale' is \[2\] in the state dict, \[\] in the module"):
            model.load_full_state_dict(bad, src)
        bad = copy.deepcopy(good)
        bad["model"]["more"] = torch.zeros(2)
        with pytest.raises(ValueError, match="has 'more', which the module has not"):
            model.load_full_state_dict(bad, src)
    with pytest.raises(ValueError, match=r"exp_avg of 'scale' is \[2\], the parameter \[\]"):
        model.optimizer.load_full_state({"scale": {"exp_avg": torch.zeros(2)}})
    with pytest.raises(ValueError, match="'nowhere', which is no trained parameter"):
        model.optimizer.load_full_state({"nowhere": {"exp_avg": torch.zeros(2)}})
    with pytest.raises(ValueError, match="assign=True"):
        model.load_state_dict({}, assign=True)
    with pytest.raises(NotImplementedError, match=r"full_state_dict\(\) gives ordinary tensors"):
        model.sharded_state_dict()["model"]["embed.weight"] + 1
    model.save_sharded(folder)
    other = pypar.Zero(nn.Linear(3, 3), stage=2)
    with pytest.raises(ValueError, match="has no 'model"):
        other.load_sharded(folder)
    full = Buffered()
    one_group = pypar.Zero(full, stage=2)
    with pytest.raises(ValueError, match=r"parameter groups \(2\) are not those of this optimizer \(1\)"):
        one_group.load_full_state_dict(good)
    dist.barrier()


def test_wrong_state_dicts(tmp_path):
    run_ranks(check_wrong, 2, tmp_path)


def check_state_is_taken_over(rank, world):
    full = Buffered()
    optimizer = OPTIMIZERS["AdamW"](groups_of(full))
    loss_of(full, batch(3, 0)).backward()
    optimizer.step()
    wanted = {n: dict(optimizer.state[p]) for n, p in full.named_parameters() if p in optimizer.state}
    wanted = copy.deepcopy(wanted)
    model = pypar.Zero(full, stage=2, optimizer=optimizer)
    assert not differing(model.optimizer.full_state(), wanted)


def test_the_state_of_an_optimizer_is_taken_over():
    run_ranks(check_state_is_taken_over, 2)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 3, 5), (2, 1, 3, 2), (5, 1)])
def test_boxes_cover_a_range_once(shape):
    whole = torch.arange(int(torch.Size(shape).numel())).view(shape)
    for begin in range(whole.numel() + 1):
        for end in range(begin, whole.numel() + 1):
            found = []
            for offsets, sizes in boxes(shape, begin, end):
                box = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                assert box.shape == sizes and box.is_contiguous()
                found += box.flatten().tolist()
            assert found == list(range(begin, end))
            assert len(list(boxes(shape, begin, end))) <= max(1, 2 * len(shape) - 1)
