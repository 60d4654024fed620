"""Blocks that are cut inside: which can be, where, and that the numbers are those of one process."""

import pytest
import torch
from pipeline_parallel.pipeline_common import MODELS, STEPS, build, check, reference, train
from torch import nn

from pypar.pieces import pieces_of
from pypar.placement import cut
from pypar.testing import run_ranks


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)

    def forward(self, x):
        hidden = self.first(self.norm(x))
        return x + self.second(hidden)


class Twice(Nested):
    def forward(self, x):
        return self.second(self.first(self.norm(self.second(self.first(x)))))


class WithParameter(Nested):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


def test_pieces_are_the_children_in_the_order_of_their_calls():
    assert [name for name, _ in pieces_of(Nested())] == ["norm", "first", "second"]
    assert pieces_of(Twice()) == pieces_of(WithParameter()) == pieces_of(nn.Linear(2, 2)) == []
    for kind in ("llama", "gpt2"):
        block = list(build(kind).modules())
        layer = next(m for m in block if type(m).__name__ in ("LlamaDecoderLayer", "GPT2Block"))
        names = [name for name, _ in pieces_of(layer)]
        assert names[1] in ("self_attn", "attn") and names[3] == "mlp", names


def test_balanced_stages_differ_by_less_than_a_block():
    model = nn.Sequential(*(Nested() for _ in range(5)))  # 5 x 64, halves of 32
    for split, costs in (("auto", [128, 192]), ("balanced", [160, 160]), (["1.second"], [96, 224])):
        found = cut(model, 2, split)
        assert [sum(p.cost for p in found.of_stage(s)) for s in range(2)] == costs, split
    found = cut(model, 2, "balanced")
    assert found.boundary == ["2.first"] and found.beside == {0: ["1", "2.first"]}
    assert [part.name for part in found.of_stage(1)] == ["2.second", "3", "4"]
    assert not cut(model, 5, "balanced").beside, "no gain, no cut inside"


def test_what_is_no_place_to_cut_at():
    model = nn.Sequential(*(Nested() for _ in range(5)))
    with pytest.raises(ValueError, match=r"'2.third' is no block, nor a child of one to cut at; they are 0 ... 4"):
        cut(model, 2, ["2.third"])
    with pytest.raises(ValueError, match=r"give 'auto', 'balanced'"):
        cut(model, 2, "even")
    twice = nn.Sequential(*(Twice() for _ in range(3)))
    assert cut(twice, 2, "balanced").boundary == cut(twice, 2, "auto").boundary


def train_all(rank, world, name, schedules):
    return [train(rank, world, name, schedule, 5, 7, "balanced") for schedule in schedules]


@pytest.mark.parametrize("name", list(MODELS))
def test_cut_inside_it_computes_what_one_process_does(name):
    expected = reference(name, STEPS, 7)
    for found in zip(*run_ranks(train_all, 3, name, ("1f1b", "zbv", "zbh1")), strict=True):
        check(found, expected)
