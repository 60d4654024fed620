"""determinism="layout" of whole models: logits, loss and every gradient have the same bits on 1, 2, 4 and 8 ranks."""

import pytest
import torch
from ops.layout_cases import check_all_worlds
from torch import nn

import pypar
from pypar.tensor_parallel import gather_full_grads
from pypar.testing import run_ranks

transformers = pytest.importorskip("transformers")

# 32 tokens, so that no activation ends inside torch's vectors: its elementwise functions round the rest differently.
TOKENS = (2, 16)
SIZES = {
    "vocab_size": 53,  # not divided by 8
    "hidden_size": 32,
    "intermediate_size": 44,  # nor this
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": 32,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
# name: (model type, settings, type of the weights); attention is eager unless the name says other
MODELS = {
    "llama": ("llama", {"num_key_value_heads": 8}, torch.float32),
    "llama, sdpa": ("llama", {"num_key_value_heads": 8}, torch.float32),
    "llama, tied, biases, 16 heads on 8": (
        "llama",
        {
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        torch.float32,
    ),
    "llama, bfloat16": ("llama", {"num_key_value_heads": 8}, torch.bfloat16),
    "gpt2": ("gpt2", GPT2, torch.float32),
    "phi3": ("phi3", {"num_key_value_heads": 8}, torch.float32),
}


def build(name):
    kind, settings, dtype = MODELS[name]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings})
    config._attn_implementation = "sdpa" if "sdpa" in name else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).train()


def step(model, autocast=False):
    """{(name, None): what every rank has}; gradients are gathered first."""
    ids = torch.randint(3, 53, TOKENS, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    found = {("logits", None): out.logits.detach(), ("loss", None): out.loss.detach()}
    return found | {(f"gradient of {n}", None): g for n, g in gather_full_grads(model).items()}


def models(rank, world, group):
    found = {n: step(pypar.tensor_parallel(build(n), group, determinism="layout")) for n in MODELS}
    found["llama, autocast"] = step(pypar.tensor_parallel(build("llama"), group, determinism="layout"), autocast=True)
    cut_loss = pypar.tensor_parallel(build("llama"), group, determinism="layout", loss_parallel=True)
    found["llama, loss_parallel"] = step(cut_loss)
    del found["llama, loss_parallel"]["logits", None]  # of the own columns
    return found


def test_models_have_the_same_bits_on_1_2_4_and_8_ranks():
    check_all_worlds(models)


def close_to_one_process(rank, world):
    full = build("llama")
    ids = torch.randint(3, 53, TOKENS, generator=torch.Generator().manual_seed(5))
    out = full(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    wanted = {("logits", None): out.logits.detach(), ("loss", None): out.loss.detach()}
    wanted |= {(f"gradient of {n}", None): p.grad for n, p in full.named_parameters()}
    found = step(pypar.tensor_parallel(build("llama"), determinism="layout"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def layers(rank, world, group):
    """Standing alone, with what the model doesn't have: gathered outputs, split inputs, an input without gradient."""
    found = {}
    torch.manual_seed(2)
    linears = nn.Linear(19, 43), nn.Linear(43, 19)
    x, factor = torch.randn(5, 3, 19), torch.randn(5, 3, 19)
    for needs in (True, False):
        column = pypar.ColumnParallelLinear.from_linear(linears[0], group, gather_output=True, determinism="layout")
        row = pypar.RowParallelLinear.from_linear(linears[1], group, split_input=True, determinism="layout")
        given = x.clone().requires_grad_(needs)
        y = row(column(given))
        (y * factor).sum().backward()
        found[needs] = {("y", None): y.detach()} | ({("dx", None): given.grad} if needs else {})
        for kind, layer in (("column", column), ("row", row)):
            found[needs] |= {(f"{kind} {n}", None): g for n, g in gather_full_grads(layer).items()}
    return found


def test_layers_have_the_same_bits_on_1_2_4_and_8_ranks():
    check_all_worlds(layers)


def refused(rank, world):
    def message(name, settings, plan="auto"):
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(name, **{**SIZES, **settings})
        model = transformers.AutoModelForCausalLM.from_config(config)
        with pytest.raises(ValueError) as error:
            pypar.tensor_parallel(model, plan=plan, determinism="layout")
        assert not any("rank" in repr(m) for m in model.modules()), "changed before it was refused"
        return str(error.value)

    if world == 3:
        assert "3 ranks can't have whole branches" in message("llama", {"num_key_value_heads": 8})
        return
    assert "hold copies of a part" in message("llama", {"num_key_value_heads": 1})
    assert "style 'shared'" in message("qwen3", {"num_key_value_heads": 8, "head_dim": 4})
    odd = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    assert "self_attn.q_proj = 24 is cut [16, 8] over the ranks" in message("llama", odd)
    with pytest.raises(ValueError, match="determinism is 'fast'"):
        pypar.tensor_parallel(build("llama"), determinism="fast")
    with pytest.raises(ValueError, match=r"out_features = 12 is cut \[6, 6\] over the ranks.*cut it \[8, 4\]"):
        pypar.ColumnParallelLinear(6, 12, sizes=[6, 6], determinism="layout")


def various(rank, world):
    refused(rank, world)
    if world == 2:
        close_to_one_process(rank, world)


@pytest.mark.parametrize("world", [2, 3])
def test_values_and_errors(world):
    run_ranks(various, world)
