"""Plans: what they name, what "auto" chooses, how much travels, what is refused and with which words."""

import logging
import re

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.utils._python_dispatch import TorchDispatchMode

import pypar
from pypar.tensor_parallel import gather_full_grads
from pypar.testing import run_ranks


class Attention(nn.Module):
    """A user's own: it keeps its head counts and views with them."""

    def __init__(self, width, num_heads, num_kv_heads):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, width // num_heads
        self.wq, self.wo = nn.Linear(width, width), nn.Linear(width, width)
        self.wk, self.wv = (nn.Linear(width, num_kv_heads * self.head_dim) for _ in range(2))

    def forward(self, x):
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (w(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2) for w in (self.wk, self.wv))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, width=24, num_heads=6, num_kv_heads=2):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, num_kv_heads)
        self.mlp = nn.ModuleDict(
            {"gate": nn.Linear(width, 34), "up": nn.Linear(width, 34), "down": nn.Linear(34, width)}
        )

    def forward(self, x):
        h = self.norm(x + self.attention(x))
        return h + self.mlp["down"](torch.relu(self.mlp["gate"](h)) * self.mlp["up"](h))


class Model(nn.Module):
    def __init__(self, tied=True, **kwargs):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head = nn.Embedding(19, 24), nn.Linear(24, 19, bias=False)
        self.layers = nn.ModuleList(Block(**kwargs) for _ in range(2))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


NAMES = {
    "layers.*.attention.w[qkv]": "colwise",
    "layers.*.attention.wo": "rowwise",
    "layers.*.mlp.gate": "colwise",
    "layers.*.mlp.up": "colwise",
    "layers.*.mlp.down": "rowwise",
}
HEAD = {"embed": "vocab_parallel_rowwise", "head": "colwise_rep"}
TORCH = {
    "layers.*.attention.w[qkv]": ColwiseParallel(),
    "layers.*.attention.wo": RowwiseParallel(),
    "layers.*.mlp.gate": ColwiseParallel(),
    "layers.*.mlp.up": ColwiseParallel(),
    "layers.*.mlp.down": RowwiseParallel(),
    "embed": RowwiseParallel(input_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
IDS = torch.arange(12).reshape(2, 6)


def run(model):
    y = model(IDS)
    y.square().mean().backward()
    return y.detach()


def check_plans(rank, world):
    for plan in (NAMES, {**NAMES, **HEAD}, {**NAMES, "head": "colwise_rep"}, TORCH, "auto"):
        full = Model()
        wanted = run(full)
        model = pypar.tensor_parallel(Model(), plan=plan)
        torch.testing.assert_close(run(model), wanted, rtol=1e-5, atol=1e-6)
        for name, grad in gather_full_grads(model).items():
            torch.testing.assert_close(grad, dict(full.named_parameters(remove_duplicate=False))[name].grad)
        assert model.head.weight is model.embed.weight
        assert isinstance(model.layers[0].attention.wo, pypar.RowParallelLinear)
        assert isinstance(model.layers[1].mlp["up"], pypar.ColumnParallelLinear)
        if isinstance(plan, dict) and "head" in plan:
            assert model.head.weight.shape[0] < 19, "the vocabulary is cut, in both owners of the weight"


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pypar":
            self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def check_traffic(rank, world):
    """One sum per attention and per MLP forward, one per tensor that column layers read backward."""
    model = pypar.tensor_parallel(Model(num_kv_heads=6), plan=NAMES)
    x = torch.randn(2, 6, 24, requires_grad=True)
    with Count() as count:
        y = model.layers[0](x)
        assert count.calls == ["matmul_all_reduce"] * 2
        y.sum().backward()
    assert count.calls[2:] == ["all_reduce"] * 2
    shared = model.layers[0].mlp["up"].shared_input
    assert shared is model.layers[0].mlp["gate"].shared_input
    assert shared.x is None and shared.copy is None, "no activation outlives the forward"
    with Count() as count, torch.no_grad():
        model.layers[0](x)
    assert count.calls == ["matmul_all_reduce"] * 2


def refused(match, plan, make=Model, **kwargs):
    model = make(**kwargs)
    before = str(model)
    with pytest.raises(ValueError, match=re.escape(match)):
        pypar.tensor_parallel(model, plan=plan)
    assert str(model) == before, "nothing is changed"


def check_errors(rank, world):
    refused(
        "plan['layers.*.attn.wq'] names no module or parameter of Model; it has embed, head, layers.*.norm",
        {"layers.*.attn.wq": "colwise"},
    )
    refused("plan['head']: pypar.tensor_parallel has no style 'colwize'; use one of colwise", {"head": "colwize"})
    refused("plan['head'] is 3: give the name of a style", {"head": 3})
    refused("plan='fast': give 'auto' or {pattern: style}", "fast")
    refused(
        "layers.0.norm is LayerNorm, which style 'row' doesn't fit; it takes an nn.Linear or nn.Embedding",
        {"layers.*.norm": "rowwise"},
    )
    refused("embed is Embedding, which style 'column' doesn't fit; it takes an nn.Linear", {"embed": "colwise"})
    refused("head is Linear, which style 'vocab' doesn't fit; it takes an nn.Embedding", {"head": "embedding_rowwise"})
    refused(
        f"layers.0.attention has 1 heads, too few for {world} ranks of tensor parallel: use tp = 1 to 1",
        NAMES,
        num_heads=1,
        num_kv_heads=1,
    )
    refused(
        "but not wk; query, key and value of one attention are cut together",
        {"layers.*.attention.w[qv]": "colwise", "layers.*.attention.wo": "rowwise"},
    )
    refused("plan='auto' found no attention or MLP in Sequential", "auto", lambda: nn.Sequential(nn.LayerNorm(3)))
    refused("share one weight, but the plan cuts it differently", {"embed": "rowwise", "head": "rowwise"})
    refused(
        "found no list of layers with parts that the plan cuts in Model",
        {"head": "colwise_gather_output", "layers.*.norm": SequenceParallel()},
    )
    refused("from Shard(dim=0) to Shard(dim=-1); it takes", {"head": ColwiseParallel(input_layouts=Shard(0))})
    model = pypar.tensor_parallel(Model(), plan=NAMES)
    with pytest.raises(ValueError, match="is cut already"):
        pypar.tensor_parallel(model, plan=NAMES)
    with pytest.raises(ValueError, match=r"ranks 0 and 1 differ in .*layers\.0\.attention\.wk\.weight"):
        pypar.tensor_parallel(Model(num_kv_heads=6 if rank == 1 else 3), plan=NAMES)


def check_log(rank, world):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log = logging.getLogger("pypar.tensor_parallel")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    pypar.tensor_parallel(Model())
    log.removeHandler(handler)
    assert "plan by names and shapes" in records[0] and "'layers.1.attention.wo': 'row'" in records[0]


def check_compile(rank, world):
    """One graph, and the same numbers."""
    model = pypar.tensor_parallel(Model(num_kv_heads=2 if world == 2 else 1), plan={**NAMES, **HEAD})
    y = run(model)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, y)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)


def check(rank, world):
    check_plans(rank, world)
    check_traffic(rank, world)
    check_errors(rank, world)
    check_log(rank, world)
    check_compile(rank, world)


@pytest.mark.parametrize("world", [2, 3])
def test_plans(world):
    run_ranks(check, world)
