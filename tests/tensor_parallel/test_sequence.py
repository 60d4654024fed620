"""Sequence parallel and the parallel loss: what is gathered when, what is saved, what runs without it, errors."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.utils._python_dispatch import TorchDispatchMode

import pypar
from pypar.tensor_parallel import gather_full_grads
from pypar.testing import run_ranks, stalls

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
D, HEADS, VOCAB = 24, 6, 29


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        B, S, _ = x.shape
        q, k, v = (p(x).view(B, S, -1, D // HEADS).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(B, S, -1))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 50), nn.Linear(50, D)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((D,), 0.7))
        self.norm1, self.attention = nn.LayerNorm(D), Attention()
        self.norm2, self.mlp = nn.LayerNorm(D), MLP()

    def forward(self, x):
        x = x + self.scale * self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.checkpointed = None
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.05 * torch.randn_like(p))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            if self.checkpointed is None:
                x = layer(x)
            else:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.checkpointed)
        return self.head(self.norm(x))


PLAN = {
    "embed": "embedding_rowwise",
    "layers.*.attention.[qkv]": "colwise",
    "layers.*.attention.o": "rowwise",
    "layers.*.mlp.up": "colwise",
    "layers.*.mlp.down": "rowwise",
    "head": "colwise_gather_output",
}


def ids_of(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(4))


def step(model, ids, loss=None):
    model.zero_grad()
    logits = model(ids[:, :-1])
    value = (loss or nn.CrossEntropyLoss())(logits.flatten(0, 1), ids[:, 1:].flatten())
    value.backward()
    return value.detach()


def plain(model):
    return {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def same_step(full, model, ids, loss=None):
    torch.testing.assert_close(step(model, ids, loss), step(full, ids), **CLOSE)
    found, wanted = gather_full_grads(model), plain(full)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


class Calls(TorchDispatchMode):
    """The names of pypar's ops that run."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pypar":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def parallel(model=None, **settings):
    return pypar.tensor_parallel(model or Model(), plan=PLAN, sequence_parallel=True, **settings)


def check_values(rank, world):
    for shape in ((2, 26), (1, 60), (5, 12)):  # 50, 59 and 55 rows
        same_step(Model(), parallel(), ids_of(*shape))
    model = parallel()
    for shape in ((2, 26), (3, 30), (2, 26)):
        same_step(Model(), model, ids_of(*shape))
    same_step(Model(tied=True), parallel(Model(tied=True)), ids_of(2, 26))
    same_step(Model(), copy.deepcopy(model), ids_of(2, 26))
    full, frozen = Model(), parallel()
    for each in (full, frozen):
        for layer in each.layers:
            layer.norm1.requires_grad_(False)
            layer.attention.q.requires_grad_(False)
            layer.attention.o.bias.requires_grad_(False)
    same_step(full, frozen, ids_of(2, 26))
    with torch.no_grad():
        torch.testing.assert_close(model(ids_of(2, 40)), Model()(ids_of(2, 40)), **CLOSE)


def check_traffic(rank, world):
    """Per layer two gathers and two scatters forward; q, k and v share theirs, from the first forward on."""
    model, ids = parallel(), ids_of(2, 26)
    with Calls() as calls:
        logits = model(ids)
    layer = ["all_gather_matmul", "matmul_reduce_scatter"] * 2
    assert calls.names == ["all_reduce", *layer * 2, "all_gather", "all_gather"], calls.names
    with Calls() as calls:
        logits.sum().backward()
    # dx of all columns together; the rows' side gathers dy once for dx and dw; one sum for all norms and biases.
    layer = ["all_gather_matmul_both", "all_gather_matmul_dw", "matmul_reduce_scatter"] * 2
    assert sorted(calls.names) == sorted([*layer * 2, "all_reduce", "all_reduce_", "all_gather"]), calls.names


class OtherInputs(Attention):
    """Whose keys and values come of another tensor."""

    def forward(self, x):
        other = torch.tanh(x)
        B, S, _ = x.shape
        q, k, v = (p(t).view(B, S, -1, D // HEADS).transpose(1, 2)
                   for p, t in ((self.q, x), (self.k, other), (self.v, other)))  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(B, S, -1))


def check_other_inputs(rank, world):
    """Layers that do not read the same tensor are computed together in vain once, and rightly all the same."""

    def build():
        model = Model()
        for layer in model.layers:
            layer.attention = seeded_other()
        return model

    full, model = build(), parallel(build())
    for _ in range(2):
        same_step(full, model, ids_of(2, 26))
    with Calls() as calls:
        model(ids_of(2, 26))
    assert calls.names.count("all_gather_matmul") == 4


def seeded_other():
    torch.manual_seed(9)
    return OtherInputs()


def check_memory(rank, world):
    """What a layer saves for backward: rows of norms and of what the columns read, of which the rest is local."""

    def saved(model):
        total = {}

        def pack(t):
            if t.numel():
                total[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(ids_of(2, 120))
        return sum(size for at, size in total.items() if at not in weights), y

    without, _ = saved(pypar.tensor_parallel(Model(), plan=PLAN))
    with_rows, _ = saved(parallel())
    assert with_rows < 0.8 * without, (with_rows, without)


def check_recomputed(rank, world):
    for reentrant in (False, True):
        full, model = Model(), parallel()
        full.checkpointed = model.checkpointed = reentrant
        for shape in ((2, 26), (2, 26), (3, 30)):
            same_step(full, model, ids_of(*shape))
    # Another forward, with rows of its own, between a forward and its backward.
    model = parallel()
    model.checkpointed = False
    step(model, ids_of(2, 26))
    wanted = gather_full_grads(model)
    model.zero_grad()
    ids = ids_of(2, 26)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    with torch.no_grad():
        model(ids_of(4, 30))
        model(ids_of(1, 2))
    loss.backward()
    torch.testing.assert_close(gather_full_grads(model), wanted)


def check_few_rows(rank, world):
    """A forward of few tokens is as without: no rows are taken."""
    model = parallel()
    with Calls() as calls:
        y = model(ids_of(2, 5))
    assert "matmul_all_reduce" in calls.names and "matmul_reduce_scatter" not in calls.names
    torch.testing.assert_close(y, Model()(ids_of(2, 5)), **CLOSE)
    same_step(Model(), model, ids_of(2, 5))


def check_autocast(rank, world):
    full, model, ids = Model(), parallel(), ids_of(2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = full(ids), model(ids)
    assert found.dtype == wanted.dtype == torch.bfloat16
    exact = Model()(ids)
    error = (wanted - exact).abs().max()
    assert (found - exact).abs().max() <= 2 * error + 1e-3
    found.float().sum().backward()


def check_torch_plan(rank, world):
    """A plan written for torch's parallelize_module, with its own styles."""
    whole, rows = Replicate(), Shard(1)
    model = pypar.tensor_parallel(
        Model(),
        plan={
            "embed": RowwiseParallel(input_layouts=whole, output_layouts=rows),
            "layers.*.norm[12]": SequenceParallel(),
            "layers.*.attention": PrepareModuleInput(input_layouts=(rows,), desired_input_layouts=(whole,)),
            "layers.*.attention.[qkv]": ColwiseParallel(),
            "layers.*.attention.o": RowwiseParallel(output_layouts=rows),
            "layers.*.mlp": PrepareModuleInput(input_layouts=(rows,), desired_input_layouts=(whole,)),
            "layers.*.mlp.up": ColwiseParallel(),
            "layers.*.mlp.down": RowwiseParallel(output_layouts=rows),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=rows, output_layouts=whole),
        },
    )
    with Calls() as calls:
        model(ids_of(2, 30))
    assert calls.names.count("matmul_reduce_scatter") == 4
    same_step(Model(), model, ids_of(2, 26))


def check_loss(rank, world):
    for settings in ({}, {"reduction": "sum"}, {"ignore_index": 3, "label_smoothing": 0.1}):
        loss = nn.CrossEntropyLoss(**settings)
        full, x, target = Model().head, torch.randn(7, D), torch.randint(VOCAB, (7,))
        torch.distributed.broadcast(x, 0)
        torch.distributed.broadcast(target, 0)
        layer = pypar.ColumnParallelLinear.from_linear(full)
        cut = pypar.VocabParallelCrossEntropy.from_loss(loss, sizes=layer.cut.sizes())
        found, wanted = cut(layer(x), target), loss(full(x), target)
        torch.testing.assert_close(found, wanted, **CLOSE)
        torch.testing.assert_close(cut(layer(x)[0], target[0]), loss(full(x)[0], target[0]), **CLOSE)
        (3 * found).backward()
        (3 * wanted).backward()
        torch.testing.assert_close(gather_full_grads(layer)["weight"], full.weight.grad, **CLOSE)
    assert torch.isnan(cut(layer(x), torch.full((7,), 3))), "no target counts: nan, as torch gives"
    model = parallel(loss_parallel=True)
    sizes = model.head.cut.sizes()
    assert model(ids_of(2, 26)).shape[-1] == sizes[rank]
    same_step(Model(), model, ids_of(2, 26), pypar.VocabParallelCrossEntropy(sizes=sizes))
    with pytest.raises(ValueError, match="takes no weights of classes"):
        pypar.VocabParallelCrossEntropy.from_loss(nn.CrossEntropyLoss(torch.ones(3)))
    with pytest.raises(ValueError, match="reduction='none'"):
        pypar.VocabParallelCrossEntropy(reduction="none")
    with pytest.raises(ValueError, match=r"input \(2, 3, 4\) and target \(2, 3\)"):
        cut(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="the plan cuts no output layer of Model"):
        pypar.tensor_parallel(Model(), plan={"layers.*.mlp.up": "colwise"}, loss_parallel=True)


def check_stalls(rank, world):
    """The same bits whatever the timing, on every rank where they are the same tensor."""
    ids = ids_of(4, 40)

    def bits(seed, sequence_parallel):
        model = pypar.tensor_parallel(Model(), plan=PLAN, sequence_parallel=sequence_parallel, loss_parallel=True)
        loss = pypar.VocabParallelCrossEntropy(sizes=model.head.cut.sizes())
        with stalls(seed) if seed else contextlib.nullcontext():
            found = [step(model, ids, loss) for _ in range(3)]
        return [*found, *(p.grad for p in model.parameters())]

    for sequence_parallel in (False, True):
        wanted = bits(0, sequence_parallel)
        for seed in (1, 2, 3):
            found = bits(seed + 10 * rank, sequence_parallel)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), seed
        everyone = pypar.ops.all_gather(torch.stack(wanted[:3])[None])
        assert all(torch.equal(row, everyone[0]) for row in everyone)


class Bare(nn.Module):
    """Attention in the layer itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))


class NoGather(Model):
    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Between(Model):
    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)[:, 1:]
        return self.head(self.norm(x))


class Pooled(Layer):
    def forward(self, x):
        return super().forward(x).mean(1, keepdim=True)


def check_errors(rank, world):
    with pytest.raises(ValueError, match=r"layers\.0\.[qkv] stands in its layer"):
        pypar.tensor_parallel(Bare(), plan={"layers.*.[qkv]": "colwise"}, sequence_parallel=True)
    with pytest.raises(RuntimeError, match="the model: nothing gathered the rows"):
        parallel(NoGather())(ids_of(2, 27))  # as many rows on every rank
    with pytest.raises(RuntimeError, match=r"layers\.1 got .* what the model does between its layers"):
        parallel(Between())(ids_of(2, 26))
    model = Model()
    model.layers[1] = Pooled()
    with pytest.raises(RuntimeError, match=r"layers\.1 gave \(1, 1, 24\), but this rank's rows are"):
        parallel(model)(ids_of(2, 26))


def check(rank, world):
    check_values(rank, world)
    check_traffic(rank, world)
    check_other_inputs(rank, world)
    check_memory(rank, world)
    check_recomputed(rank, world)
    check_few_rows(rank, world)
    check_autocast(rank, world)
    check_torch_plan(rank, world)
    check_loss(rank, world)
    check_stalls(rank, world)
    check_errors(rank, world)


@pytest.mark.parametrize("world", [2, 3])
def test_sequence_parallel(world):
    run_ranks(check, world)
