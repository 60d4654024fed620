"""determinism="layout" with dropout on: logits, loss and every gradient have the same bits on 1, 2, 4 and 8 ranks."""

import pytest
import torch
from ops.layout_cases import check_all_worlds
from torch import nn

import pypar
from pypar.tensor_parallel import gather_full_grads

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 53, (2, 16), generator=torch.Generator().manual_seed(5))
SIZES = {"vocab_size": 53, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 32}
GPT2 |= {"attn_pdrop": 0.2, "embd_pdrop": 0.1, "resid_pdrop": 0.3}
LLAMA = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 8}
LLAMA |= {"num_key_value_heads": 8, "attention_dropout": 0.3}
MODELS = {  # name: (model type, settings, attention, type of the weights)
    "gpt2": ("gpt2", GPT2, "eager", torch.float32),
    "gpt2, sdpa": ("gpt2", GPT2, "sdpa", torch.float32),
    "gpt2, bfloat16": ("gpt2", GPT2, "sdpa", torch.bfloat16),
    "llama": ("llama", LLAMA, "eager", torch.float32),
    "llama, 16 heads on 8, sdpa": ("llama", {**LLAMA, "num_attention_heads": 16}, "sdpa", torch.float32),
}


def build(name):
    kind, settings, attention, dtype = MODELS[name]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings})
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()


def two_steps(model, rank):
    """Each draws other masks: {(name, None): what every rank has}."""
    torch.manual_seed(100 + rank)  # the numbers of rank 0 count
    found = {}
    for step in range(2):
        model.zero_grad()
        out = model(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        found |= {(f"logits {step}", None): out.logits.detach(), (f"loss {step}", None): out.loss.detach()}
        found |= {(f"gradient of {n}, {step}", None): g for n, g in gather_full_grads(model).items()}
    assert not torch.equal(found["logits 0", None], found["logits 1", None]), "nothing was dropped"
    return found


class Inside(nn.Module):
    """Features that are dropped out between a column layer and a row layer, where a rank has a part of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down, self.p = nn.Linear(32, 64), nn.Linear(64, 32), nn.Dropout(0.4)

    def forward(self, x):
        return self.down(self.p(torch.relu(self.up(x))))


def inside(rank, group):
    model = pypar.tensor_parallel(Inside(), group, {"up": "colwise", "down": "rowwise"}, determinism="layout")
    torch.manual_seed(200 + rank)
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    found = {("y", None): y.detach(), ("dx", None): x.grad}
    return found | {(f"gradient of {n}", None): g for n, g in gather_full_grads(model).items()}


def models(rank, world, group):
    found = {n: two_steps(pypar.tensor_parallel(build(n), group, determinism="layout"), rank) for n in MODELS}
    return found | {"inside": inside(rank, group)}


def test_models_with_dropout_have_the_same_bits_on_1_2_4_and_8_ranks():
    check_all_worlds(models)
