"""The layers by themselves against torch's on one process: values, gradients, uneven shares, state dict, errors."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pypar
from pypar.tensor_parallel import gather_full_grads, gather_full_state
from pypar.testing import run_ranks

F32 = {"rtol": 1e-5, "atol": 1e-6}


def seeded(make):
    torch.manual_seed(3)
    return make()


def backward(layer, x, factor):
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    (y * factor).sum().backward()
    return y.detach(), x.grad


def same_grads(parallel, full):
    found = gather_full_grads(parallel)
    wanted = {n: p.grad for n, p in full.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, **F32, msg=lambda m, n=name: f"{n}: {m}")


def check_column(rank, world):
    for out, cut in ((12, {}), (7, {}), (1, {}), (12, {"unit": 4}), (5, {"sizes": [5] + [0] * (world - 1)})):
        for bias in (True, False):
            full = seeded(lambda bias=bias, out=out: nn.Linear(6, out, bias=bias))
            x, factor = torch.randn(2, 3, 6), torch.randn(2, 3, out)
            y, dx = backward(full, x, factor)
            for gathered in (True, False):
                layer = pypar.ColumnParallelLinear.from_linear(full, gather_output=gathered, **cut)
                sizes = layer.cut.sizes()
                assert layer.weight.shape == (sizes[rank], 6)
                start = sum(sizes[:rank])
                mine = slice(start, start + sizes[rank])
                found, found_dx = backward(layer, x, factor if gathered else factor[..., mine])
                torch.testing.assert_close(found, y if gathered else y[..., mine], **F32)
                torch.testing.assert_close(found_dx, dx, **F32)
                same_grads(layer, full)


def check_row(rank, world):
    for inner, cut in ((12, {}), (7, {}), (1, {}), (12, {"unit": 4}), (5, {"sizes": [0] * (world - 1) + [5]})):
        for bias in (True, False):
            full = seeded(lambda bias=bias, inner=inner: nn.Linear(inner, 6, bias=bias))
            x, factor = torch.randn(2, 3, inner), torch.randn(2, 3, 6)
            y, dx = backward(full, x, factor)
            for split in (True, False):
                layer = pypar.RowParallelLinear.from_linear(full, split_input=split, **cut)
                mine = slice(sum(layer.cut.sizes()[:rank]), sum(layer.cut.sizes()[: rank + 1]))
                found, found_dx = backward(layer, x if split else x[..., mine], factor)
                torch.testing.assert_close(found, y, **F32)
                torch.testing.assert_close(found_dx, dx if split else dx[..., mine], **F32)
                same_grads(layer, full)


def check_embedding(rank, world):
    for num, padding, cut in ((11, None, {}), (11, 0, {}), (11, 10, {}), (2, 1, {}), (12, 3, {"unit": 4})):
        full = seeded(lambda num=num, padding=padding: nn.Embedding(num, 5, padding_idx=padding))
        ids, factor = torch.randint(num, (4, 6)), torch.randn(4, 6, 5)
        y, _ = backward(full, ids, factor)
        layer = pypar.VocabParallelEmbedding.from_embedding(full, **cut)
        found, _ = backward(layer, ids, factor)
        assert torch.equal(found, y), "a lookup is exact"
        same_grads(layer, full)
    if layer.weight.shape[0]:
        with pytest.raises(IndexError):
            layer(torch.tensor([12]))


def check_construction(rank, world):
    for parallel, plain in (
        (lambda: pypar.ColumnParallelLinear(6, 7), lambda: nn.Linear(6, 7)),
        (lambda: pypar.RowParallelLinear(7, 6, False), lambda: nn.Linear(7, 6, False)),
        (lambda: pypar.VocabParallelEmbedding(11, 5, padding_idx=2), lambda: nn.Embedding(11, 5, padding_idx=2)),
    ):
        layer, full = seeded(parallel), seeded(plain)
        found, wanted = gather_full_state(layer), full.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted), "initial weights don't depend on the ranks"
        other = {n: torch.randn_like(t) for n, t in wanted.items()}
        layer.load_state_dict(other)
        assert all(torch.equal(t, other[n]) for n, t in gather_full_state(layer).items())
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))  # the shard itself
        assert all(torch.equal(t, other[n]) for n, t in gather_full_state(layer).items())
        with pytest.raises(
            RuntimeError, match=rf"weight is \(50, 50\) in the state dict; rank {rank} of {world} takes"
        ):
            layer.load_state_dict({**other, "weight": torch.zeros(50, 50)})
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            twin.load_state_dict(wanted)
            assert all(torch.equal(t, wanted[n]) for n, t in gather_full_state(twin).items())


def check_made_on_meta(rank, world):
    """Materialised later, by drawing or by loading: the full layer's numbers."""
    for parallel, plain in (
        (lambda: pypar.ColumnParallelLinear(6, 7), lambda: nn.Linear(6, 7)),
        (lambda: pypar.RowParallelLinear(7, 6), lambda: nn.Linear(7, 6)),
        (lambda: pypar.VocabParallelEmbedding(11, 5, padding_idx=2), lambda: nn.Embedding(11, 5, padding_idx=2)),
    ):
        with torch.device("meta"):
            layer = parallel()
        assert layer.weight.is_meta
        full = seeded(plain)
        seeded(layer.to_empty(device="cpu").reset_parameters)
        assert all(torch.equal(t, full.state_dict()[n]) for n, t in gather_full_state(layer).items())
    with torch.device("meta"):
        model = pypar.tensor_parallel(TwoLayers(), plan=TWO_LAYERS).to_empty(device="cpu")
    full = seeded(TwoLayers)
    model.load_state_dict(full.state_dict())
    assert all(torch.equal(t, full.state_dict()[n]) for n, t in gather_full_state(model).items())
    seeded(lambda: [m.reset_parameters() for m in (model.embed, model.up, model.down)])
    assert all(torch.equal(t, full.state_dict()[n]) for n, t in gather_full_state(model).items())


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 5), nn.Linear(5, 9), nn.Linear(9, 5)


TWO_LAYERS = {"embed": "embedding_rowwise", "up": "colwise", "down": "rowwise"}


def check_frozen_and_half(rank, world):
    full = seeded(lambda: nn.Linear(6, 7))
    full.weight.requires_grad_(False)
    for layer in (
        pypar.ColumnParallelLinear.from_linear(full, gather_output=True),
        pypar.RowParallelLinear.from_linear(full, split_input=True),
    ):
        layer(torch.randn(2, 6)).sum().backward()
        assert layer.weight.grad is None and layer.bias.grad is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(2, 6)).dtype == torch.bfloat16


def check_errors(rank, world):
    linear = nn.Linear(6, 7)
    with pytest.raises(ValueError, match=r"sizes \[1\] don't cut out_features = 7"):
        pypar.ColumnParallelLinear(6, 7, sizes=[1])
    with pytest.raises(ValueError, match="in_features = 6 isn't made of whole units of 4"):
        pypar.RowParallelLinear.from_linear(linear, unit=4)
    with pytest.raises(ValueError, match=r"takes an nn\.Linear"):
        pypar.ColumnParallelLinear.from_linear(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="that isn't cut yet"):
        pypar.RowParallelLinear.from_linear(pypar.ColumnParallelLinear.from_linear(linear))
    with pytest.raises(ValueError, match=r"max_norm=1\.0"):
        pypar.VocabParallelEmbedding(11, 5, max_norm=1.0)
    with pytest.raises(
        ValueError,
        match=f"the input's last dim is 17, but this rank holds {[3, 2, 2][rank]}"
        if world == 3
        else "the input's last dim is 17, but this rank holds",
    ):
        pypar.RowParallelLinear(7, 6)(torch.randn(2, 17))


def check(rank, world):
    torch.manual_seed(0)
    check_column(rank, world)
    check_row(rank, world)
    check_embedding(rank, world)
    check_construction(rank, world)
    check_made_on_meta(rank, world)
    check_frozen_and_half(rank, world)
    check_errors(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_layers(world):
    run_ranks(check, world)
