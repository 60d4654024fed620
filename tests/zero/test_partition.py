"""Layouts and units: pure."""

import pytest
import torch
from torch import nn

from pypar.zero.partition import lay_out
from pypar.zero.units import units_of


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("item", [2, 4, 8])
def test_layouts(world, item):
    for sizes in ([], [0], [1], [5, 0, 700, 3], [4096] * 5, [33_333, 1, 1, 90_001]):
        layout = lay_out(sizes, world, item)
        assert len(layout.offsets) == len(sizes) and layout.world_size == world
        assert all(offset * item % 64 == 0 for offset in layout.offsets), "cache lines"
        assert all(bound * item % 4096 == 0 for bound in layout.bounds), "pages"
        assert len(set(layout.shard_sizes())) == 1, "gathered without a copy"
        assert layout.numel * item <= sum(-(-s * item // 64) * 64 for s in sizes) + 4096 * world
        owner = torch.full((layout.numel,), -1)
        for rank in range(world):
            begin, end = layout.shard(rank)
            for piece in layout.pieces(rank):
                assert begin <= piece.begin < piece.end <= end
                assert layout.offsets[piece.index] + piece.start == piece.begin
                assert (owner[piece.begin : piece.end] == -1).all(), "nothing twice"
                owner[piece.begin : piece.end] = piece.index
        for index, (offset, size) in enumerate(zip(layout.offsets, layout.sizes, strict=True)):
            assert (owner[offset : offset + size] == index).all(), "every element is somebody's"
        gaps = [i for a, b in layout.gaps() for i in range(a, b)]
        assert torch.equal(owner == -1, torch.isin(torch.arange(layout.numel), torch.tensor(gaps, dtype=torch.int64)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
        self.layers[2][0].weight = self.layers[1][0].weight  # shared between two units
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def names(units):
    return {unit.name: unit.names for unit in units}


def test_units():
    model = Model()
    found = names(units_of(model))
    assert found == {
        "": ["embed.weight", "layers.1.0.weight"],
        "layers.0": [f"layers.0.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias")],
        "layers.1": [f"layers.1.{n}" for n in ("0.bias", "1.weight", "1.bias")],
        "layers.2": [f"layers.2.{n}" for n in ("0.bias", "1.weight", "1.bias")],
    }
    by_class = names(units_of(model, [nn.Linear]))
    assert "layers.0.0" in by_class and "layers.0" not in by_class
    assert names(units_of(model, ["layers.1", "Embedding"])).keys() == {"", "layers.1"}  # tied: the root's
    assert names(units_of(model, lambda m: m is model.layers[0])).keys() == {"", "layers.0"}
    every = [n for unit in units_of(model, [nn.Sequential, nn.Linear]) for n in unit.names]
    assert sorted(every) == sorted(n for n, _ in model.named_parameters())
    in_a_row = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert names(units_of(in_a_row)).keys() == {"0", "2"}
    with pytest.raises(ValueError, match="no module of Model is 'Conv2d'"):
        units_of(model, ["Conv2d"])
    with pytest.raises(ValueError, match="units='block'"):
        units_of(model, "block")
