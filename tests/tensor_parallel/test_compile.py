"""torch.compile(fullgraph=True) of a parallel MLP and attention block: no graph break, the same numbers; autocast."""

import pytest
import torch
from torch import nn

import pypar
from pypar.tensor_parallel import gather_full_grads
from pypar.testing import run_ranks

transformers = pytest.importorskip("transformers")
from transformers.models.llama import modeling_llama as llama  # noqa: E402

CONFIG = {
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 53,
    "max_position_embeddings": 32,
}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(24, 34), nn.Linear(24, 34, bias=False), nn.Linear(34, 24)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 6, 1, 4  # a copy of the key and value head on each rank
        self.q, self.k, self.v, self.o = nn.Linear(24, 24), nn.Linear(24, 4), nn.Linear(24, 4), nn.Linear(24, 24)

    def forward(self, x):
        b, s, _ = x.shape
        q = self.q(x).view(b, s, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (w(x).view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2) for w in (self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


class LlamaAttention(nn.Module):
    """Hugging Face's, with the positions that its model hands it."""

    def __init__(self):
        super().__init__()
        config = llama.LlamaConfig(**CONFIG)
        config._attn_implementation = "sdpa"
        self.attention, self.rotary = llama.LlamaAttention(config, 0), llama.LlamaRotaryEmbedding(config)

    def forward(self, x):
        positions = torch.arange(x.shape[1])[None]
        return self.attention(x, self.rotary(x, positions), None)[0]


BLOCKS = {
    "MLP": (Mlp, "auto"),
    "attention": (Attention, "auto"),
    "LlamaMLP": (lambda: llama.LlamaMLP(llama.LlamaConfig(**CONFIG)), "auto"),
    "LlamaAttention": (LlamaAttention, "auto"),
}


def build(name):
    torch.manual_seed(3)
    return BLOCKS[name][0]()


def run(module, dtype, grads_of):
    """y, dx and the gradients of two calls: the second one finds a compiled graph."""
    found = []
    for call in range(2):
        module.zero_grad()
        x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(call)).requires_grad_()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            y = module(x)
        assert y.dtype == (dtype or torch.float32)
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *grads_of(module).values()])
    return found


def own_grads(module):
    return {n: p.grad.clone() for n, p in module.named_parameters()}


def same(found, wanted, dtype, what):
    """By element in float32; in bfloat16 by size, since its rounding hides elements that others nearly cancel."""
    for one, other in zip(found, wanted, strict=True):
        for a, b in zip(one, other, strict=True):
            if dtype is None:  # gradients of size 1 to 10; those of the keys' biases are 0 but for rounding
                torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6, msg=lambda m: f"{what}: {m}")
            else:
                off, size = (a.double() - b.double()).norm(), b.double().norm()
                assert a.dtype == b.dtype and off <= 0.02 * size + 0.05, (what, off, size)


def check(rank, world, backend):
    for name, (_, plan) in BLOCKS.items():
        for dtype in (None, torch.bfloat16) if backend == "aot_eager" else (None,):
            module = pypar.tensor_parallel(build(name), plan=plan)
            eager = run(module, dtype, gather_full_grads)
            same(eager, run(build(name), dtype, own_grads), dtype, f"{name} {dtype}")
            torch._dynamo.reset()
            compiled = torch.compile(module, fullgraph=True, backend=backend)
            # Inductor fuses in float32 what eager mode rounds to bfloat16 in between.
            same(
                run(compiled, dtype, lambda _, m=module: gather_full_grads(m)),
                eager,
                dtype,
                f"{name} {dtype} {backend}",
            )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_blocks(backend):
    run_ranks(check, 2, backend)
