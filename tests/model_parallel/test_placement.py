"""The planner: units, budgets, explicit maps, tables. Moves nothing, so that devices need not be here."""

import itertools
import random

import pytest
import torch
from pipeline_parallel.pipeline_common import Own, build, hf_llama
from torch import nn

from pypar.model_parallel import ModelParallel, measure, place
from pypar.model_parallel.devices import budget_of, format_size, is_budget, parse_size
from pypar.placement import contiguous
from pypar.testing import run_ranks

TWO = {"cpu:0": None, "cpu:1": None}


def own(**options):
    torch.manual_seed(3)
    return Own(**options)


def best_by_trying(costs, places, sizes, limits, may_be_empty):
    found = []
    for inner in itertools.combinations_with_replacement(range(len(costs) + 1), places - 1):
        bounds = [0, *inner, len(costs)]
        runs = list(itertools.pairwise(bounds))
        if may_be_empty or all(a < b for a, b in runs):
            over = sum(max(0, sum(sizes[a:b]) - limit) for (a, b), limit in zip(runs, limits, strict=True))
            found.append((over, max(sum(costs[a:b]) for a, b in runs)))
    return min(found)


@pytest.mark.parametrize("may_be_empty", [False, True])
def test_contiguous_finds_the_best_of_all_cuts(may_be_empty):
    draw = random.Random(1)
    for _ in range(60):
        count, places = draw.randint(3, 8), draw.randint(1, 3)
        costs, sizes = ([draw.randint(0, 9) for _ in range(count)] for _ in range(2))
        limits = [draw.randint(0, 30) for _ in range(places)]
        starts, over = contiguous(costs, places, sizes=sizes, limits=limits, may_be_empty=may_be_empty)
        runs = list(itertools.pairwise([*starts, count]))
        assert starts[0] == 0 and all(a <= b if may_be_empty else a < b for a, b in runs)
        dearest = max(sum(costs[a:b]) for a, b in runs)
        assert (over, dearest) == best_by_trying(costs, places, sizes, limits, may_be_empty)


def test_auto_is_even_and_keeps_blocks_whole():
    found = place(own(num_blocks=8), TWO)
    blocks = [found.device_map[f"blocks.{i}"] for i in range(8)]
    assert blocks == sorted(blocks) and set(blocks) == set(TWO)
    costs = [found.cost_on(device) for device in TWO]
    assert max(costs) - min(costs) <= max(unit.cost for unit in found.units)
    assert sum(found.bytes_on(d) for d in TWO) == sum(4 * p.numel() for p in own(num_blocks=8).parameters())


def test_auto_puts_tied_weights_on_one_device():
    found = place(own(tied=True), TWO)
    assert found.tensors["embedding.weight"] == found.tensors["head.weight"]
    assert sum(u.num_bytes for u in found.units) == sum(4 * p.numel() for p in own(tied=True).parameters())
    chain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    chain[4].weight, chain[5].weight, chain[5].bias = chain[0].weight, chain[1].weight, chain[4].bias
    found = place(chain, {f"cpu:{i}": None for i in range(4)})  # 0, 4, 5 and 1 hang together
    assert len({found.tensors[f"{i}.weight"] for i in (0, 1, 4, 5)}) == 1
    assert len({found.tensors[f"{i}.bias"] for i in (0, 1, 4, 5)}) == 1


def test_no_split():
    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def names(no_split):
        model = nn.Sequential(nn.Linear(64, 64), Big())
        return [name for unit in place(model, TWO, no_split=no_split).units for name in unit.names]

    assert names(None) == ["0", "1"]
    assert names([]) == ["0", "1.a", "1.b"]
    assert names(["Big"]) == ["0", "1"]
    assert "model.layers.0" in place(hf_llama(), TWO).device_map
    assert "model.layers.3.self_attn.q_proj" in [n for u in place(hf_llama(), TWO, no_split=[]).units for n in u.names]


def test_budgets():
    block = 4 * sum(p.numel() for p in own().blocks[0].parameters())
    found = place(own(), {"cpu:0": None, "cpu:1": 2 * block + 100})  # a small one behind a large one
    assert [found.tensors[f"blocks.{i}.up.weight"] for i in range(7)].count("cpu:1") <= 2
    assert found.bytes_on("cpu:1") <= 2 * block + 100
    # An accelerator's room is used first, the CPU, though named first, takes the rest.
    found = place(own(), {"cpu": "1GB", "cuda:0": 5 * block})
    assert list(found.budget) == ["cuda:0", "cpu"] and 4 * block - 1 < found.bytes_on("cuda:0") <= 5 * block
    found = place(own(), {"cpu": "1GB", 0: "1GiB"})
    assert found.bytes_on("cpu") == 0 and found.device_map == {"": "cuda:0"}
    with pytest.raises(
        ValueError,
        match=r"doesn't fit: 29\.03 KiB are missing \(cpu:0 1\.00 KiB, .*has 31\.03 KiB, the devices hold 2\.00",
    ):
        place(own(), {"cpu:0": "1KiB", "cpu:1": 1024})
    with pytest.raises(ValueError, match=r"can't be cut to fit: its largest unit 'blocks\.1' has .*no_split=\[\]"):
        place(nn.ModuleDict({"blocks": nn.Sequential(nn.Sequential(nn.Linear(9, 9)), own().blocks[0], nn.Linear(9, 9))})
              , {f"cpu:{i}": block - 1 for i in range(9)})  # fmt: skip
    with pytest.raises(ValueError, match=r"device_map puts .* on cpu:0, which may hold 10 B: .* are missing"):
        place(own(), {"": "cpu:0"}, max_memory={"cpu:0": 10})
    four, one = (place(own(), TWO, copies=n) for n in (4, 1))
    assert sum(u.num_bytes for u in four.units) == 4 * sum(u.num_bytes for u in one.units)


def test_sizes():
    assert [parse_size(s) for s in (7, "7B", "2KB", "2 KiB", "1.5GiB", "3mb")] == [7, 7, 2000, 2048, 3 << 29, 3 * 10**6]
    assert [format_size(n) for n in (12, 2048, 3 << 29)] == ["12 B", "2.00 KiB", "1.50 GiB"]
    for wrong in ("10", "many", -1, 1.5, True):
        with pytest.raises(ValueError, match="memory "):
            parse_size(wrong)
    assert is_budget({0: "10GiB"}) and is_budget({"cpu": 100, "cuda:1": None})
    assert not is_budget({"layers": 0}) and not is_budget({"": "cpu"}) and not is_budget({})
    assert list(budget_of({"cpu": 1, "cuda:0": 2})) == ["cuda:0", "cpu"]


def test_patterns_and_the_last_match():
    found = place(own(), {"": "cpu:0", "blocks.*": "cpu:1", "blocks.2": "cpu:2", "blocks.*.up": "cpu:3", "norm": 4})
    assert found.tensors["embedding.weight"] == "cpu:0" and found.tensors["blocks.1.norm.weight"] == "cpu:1"
    assert found.tensors["blocks.2.down.weight"] == "cpu:2" and found.tensors["blocks.2.up.bias"] == "cpu:3"
    assert found.tensors["norm.bias"] == "cuda:4"
    assert place(own(), found.device_map).tensors == found.tensors
    assert place(own(), "meta").device_map == {"": "meta"}


def test_plans_need_neither_values_nor_devices():
    with torch.device("meta"):
        model = hf_llama()
    found = place(model, {0: "1GiB", 1: None})
    assert set(found.tensors.values()) == {"cuda:0", "cuda:1"} and all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match=r"has no values yet \(it is on 'meta'\)"):
        ModelParallel(model, "cpu")
    shapes = ModelParallel(build("own"), "meta")(torch.zeros(2, 12, dtype=torch.int64))
    assert shapes.shape == (2, 12, 61) and shapes.is_meta


def test_measured_costs():
    model = build("own")
    modes = [m.training for m in model.modules()]
    costs = measure(model, torch.zeros(2, 12, dtype=torch.int64))
    assert modes == [m.training for m in model.modules()] and not any(m._forward_hooks for m in model.modules())
    assert {f"blocks.{i}" for i in range(7)} <= set(costs) and all(cost > 0 for cost in costs.values())
    costs.update({"blocks.0": 1e6})
    found = place(model, TWO, costs=costs)
    assert next(n for n, d in found.device_map.items() if d == "cpu:1") == "blocks.1"
    with pytest.raises(ValueError, match=r"costs: none for 'embedding'"):
        place(model, TWO, costs={"blocks.0": 1.0})


def test_table(caplog):
    with caplog.at_level("INFO", logger="pypar.model_parallel"):
        model = ModelParallel(build("llama"), {"": "cpu:0", "model.layers.[4-6]": "cpu:1", "lm_head": "cpu:1"})
    lines = model.table().splitlines()
    assert model.table() in caplog.text and len(lines) == 3
    assert lines[1].startswith("cpu:0") and "model.layers.0 ... model.layers.3" in lines[1]
    assert "9,040" in lines[2] and lines[2].endswith("model.layers.4 ... model.layers.6, lm_head")
    assert format_size(model.placement.bytes_on("cpu:1")) in lines[2] and "46 %" in lines[2]


@pytest.mark.parametrize(
    ("device_map", "options", "message"),
    [
        ({"": "cpu", "blcoks.3": "cpu"}, {}, r"'blcoks\.3' matches no module of Own; near: \['blocks\.3'"),
        ({"blocks.*": "cpu"}, {}, r"covers 35 of 40 tensors; it has no device for position, embedding\.weight, norm"),
        (
            {"": "cpu", "head": "cpu:1"},
            {},
            r"'head\.weight' and 'embedding\.weight' are one tied tensor.* cpu:1 and on cpu",
        ),
        ({"": "gpu:0"}, {}, "unknown device 'gpu:0'"),
        ({"": 1.5}, {}, r"device 1\.5"),
        ({"": "cuda:77"}, {}, "unknown device 'cuda:77': this machine has the CPU and"),
        ("balanced", {}, "unknown device 'balanced'"),
        ({}, {}, "give 'auto'"),
        (TWO, {"max_memory": {"cpu": 1}}, "leave max_memory out"),
        ("auto", {"max_memory": {}}, "no device in it"),
        ("auto", {"copies": 0}, "copies=0"),
        ("cpu", {"output_device": "nowhere"}, "unknown device 'nowhere'"),
    ],
)
def test_wrong_input(device_map, options, message):
    with pytest.raises(ValueError, match=message):
        ModelParallel(own(tied=True), device_map, **options)


def wrong_on_ranks(rank, world):
    group = torch.distributed.group.WORLD
    front = {"": 1, "embedding": 0, "position": 0}
    for device_map, options, message in [
        ({**front, "blocks.0": 2}, {}, "unknown rank 2: the group has 0 to 1"),
        ({**front, "blocks.0": 0, "blocks.2": 0}, {}, "needs all of them, in this order"),
        (
            {**front, "blocks.0": 0, "blocks.*.up": 1},
            {},
            "'blocks.0' on rank:1 and 'blocks.0' on rank:0|a block lies on",
        ),
        ({0: 100, 1: 100}, {}, "every rank gets a block"),
        ("cpu", {}, "give 'auto'"),
        ("auto", {"no_split": []}, "blocks stay whole"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModelParallel(own(), device_map, group=group, **options)


def test_wrong_input_on_ranks():
    run_ranks(wrong_on_ranks, 2)
