"""Models, batches and comparisons of the tests of plans."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pypar.verify.report import compare
from pypar.verify.steps import Run

VOCAB = 97


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = Mlp(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.head_dim = dim // heads
        # Without a bias of keys, which the softmax does not see: its gradient is noise alone.
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=n != 1) for n in range(3))
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class Gpt(nn.Module):
    """An own language model: no Hugging Face, no plan of its own."""

    def __init__(self, layers: int, dim: int, heads: int, tied: bool, dropout: float, vocab: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.position = nn.Embedding(64, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + self.position(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def make_model(
    kind: str, layers: int = 4, tied: bool = False, heads: int = 4, dropout: float = 0.0, vocab: int = VOCAB,
    frozen: bool = False,
) -> nn.Module:  # fmt: skip
    torch.manual_seed(11)
    model = _make(kind, layers, tied, heads, dropout, vocab)
    if frozen:
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 3 != 2)
    return model


def _make(kind: str, layers: int, tied: bool, heads: int, dropout: float, vocab: int) -> nn.Module:
    if kind == "own":
        return Gpt(layers, 6 * heads, heads, tied, dropout, vocab)
    import transformers

    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=vocab, hidden_size=8 * heads, intermediate_size=44, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
            max_position_embeddings=64, tie_word_embeddings=tied, attention_dropout=dropout,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(
        vocab_size=vocab, n_positions=64, n_embd=8 * heads, n_layer=layers, n_head=heads, tie_word_embeddings=tied,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def init_on_hosts(rank: int, world: int, hosts: Sequence[str], store: str) -> None:
    """The process group of ranks that this machine plays several hosts for. hosts: by rank. store: a file."""
    os.environ["PYPAR_NODE_ID"] = hosts[rank]
    dist.init_process_group(
        "pypar", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )


def make_batches(count: int, samples: int, vocab: int = VOCAB, tokens: int = 12) -> list[dict[str, torch.Tensor]]:
    """Of sequences of which some are padded: their last tokens do not count."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids = torch.randint(vocab, (samples, tokens), generator=generator)
        labels = ids.clone()
        for row in range(samples):
            labels[row, tokens - int(torch.randint(6, (1,), generator=generator)) :] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def differences(found: Run, wanted: Run, rtol: float = 1e-5, atol: float = 1e-6) -> list[str]:
    """What isn't the same, a line each."""
    report = compare("", found, wanted, rtol, atol)
    numbers = [("loss", *each) for each in report.losses] + [("norm", *each) for each in report.norms]
    wrong = [f"{what} of step {step}: {a}, not {b}" for what, step, a, b, ok in numbers if not ok]
    wrong += [f"{r.what} of {r.name}, step {r.step}: off by {r.absolute:.2e} {r.note}" for r in report.rows if not r.ok]
    return wrong + [f"{what} on ranks {ranks}" for what, ranks in report.apart.items()]
