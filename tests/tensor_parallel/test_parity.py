"""Tiny Hugging Face models on 2, 3 and 4 ranks against one process: logits, loss, gradients, weights after 3 steps."""

import traceback

import pytest
import torch

import pypar
from pypar.tensor_parallel import gather_full_grads, gather_full_state
from pypar.tensor_parallel.shards import shards_of
from pypar.testing import run_ranks

transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 32,
    "vocab_size": 53,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
OPT = {"ffn_dim": 34, "word_embed_proj_dim": 24, "dropout": 0.0}
FALCON = {"alibi": False, "ffn_hidden_size": 34}

# name: (model type, settings). kv heads: 3 of 6 are cut whole; 2 and 1 are fewer than 3 ranks.
MODELS = {
    "llama": ("llama", {"num_key_value_heads": 3}),
    "llama, tied, biases, 2 kv heads": (
        "llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, 5 heads, 1 kv head": (
        "llama",
        {"hidden_size": 25, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 4},
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 4, "head_dim": 4}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": ("gemma2", {"num_key_value_heads": 3, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4}),
    "phi3": ("phi3", {"num_key_value_heads": 3}),
    "phi3, cut on heads": ("phi3", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "opt": ("opt", OPT),
    "falcon, old": ("falcon", {**FALCON, "multi_query": False, "new_decoder_architecture": False, "bias": True}),
    "falcon, multi query": ("falcon", {**FALCON, "multi_query": True, "new_decoder_architecture": False}),
    "falcon, new": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, alibi": ("falcon", {**FALCON, "alibi": True, "multi_query": True, "new_decoder_architecture": False}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 6, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "mixtral": ("mixtral", {"num_key_value_heads": 3, "num_local_experts": 4, "output_router_logits": True}),
    "cohere": ("cohere", {"num_key_value_heads": 3}),
    "cohere, norms of heads": ("cohere", {"num_key_value_heads": 2, "use_qk_norm": True}),
}

# Phi-3's own plan gathers what the fused projections give; this one keeps the heads where they are.
PLANS = {
    "phi3, cut on heads": {
        "layers.*.self_attn.qkv_proj": "colwise_qkv",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_up_proj": "packed_colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "lm_head": "colwise_gather_output",
    }
}


def build(name):
    kind, settings = MODELS[name]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **({**SIZES, **settings} if settings is not GPT2 else settings))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms start at 0 and 1, where an error of theirs would not show
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def steps(model, grads_of, weights_of):
    """What is compared: of the first step logits, loss and gradients, then the weights after 3 steps."""
    ids = torch.randint(3, 53, (2, 25), generator=torch.Generator().manual_seed(5))  # rows that 3 ranks don't divide
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    first = None
    for _ in range(3):
        optimizer.zero_grad()
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        if first is None:
            first = {"logits": out.logits.detach().clone(), "loss": out.loss.detach().clone()}
            first |= {f"gradient of {n}": g.clone() for n, g in grads_of(model).items()}
        optimizer.step()
    return first | {f"3 steps: {n}": w.detach().clone() for n, w in weights_of(model).items()}


def plain_grads(model):
    return {
        n: p.grad if p.grad is not None else torch.zeros_like(p)
        for n, p in model.named_parameters(remove_duplicate=False)
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    wrong = []
    for name, tensor in wanted.items():
        try:
            torch.testing.assert_close(found[name], tensor, **CLOSE)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, f"{len(wrong)} of {len(wanted)} differ:\n" + "\n".join(wrong[:5])


def replicated_are_equal(model):
    """A parameter that stays whole has the same gradient on every rank."""
    cut = {id(m._parameters[n]) for m in model.modules() for n in shards_of(m)}
    whole = [p.grad.flatten() for p in model.parameters() if id(p) not in cut and p.grad is not None]
    assert whole
    mine = torch.cat(whole)
    everyone = pypar.ops.all_gather(mine[None])
    torch.testing.assert_close(everyone, mine[None].expand_as(everyone), rtol=1e-6, atol=1e-7)


def check(rank, world, names, sequence_parallel):
    failed = []
    for name in names:
        try:
            check_model(name, sequence_parallel)
        except Exception:  # the same on every rank, so that the next model can go on
            failed.append(f"{name} on {world} ranks: {traceback.format_exc()}")
    assert not failed, "\n".join(failed)


def check_model(name, sequence_parallel):
    full = build(name)
    wanted = steps(full, plain_grads, lambda m: m.state_dict())
    plan = PLANS.get(name, "auto")
    model = pypar.tensor_parallel(build(name), plan=plan, sequence_parallel=sequence_parallel)
    held = sum(p.numel() for p in model.parameters())
    assert held < 0.8 * sum(p.numel() for p in full.parameters()), "hardly anything was cut"
    assert_same(steps(model, gather_full_grads, gather_full_state), wanted)
    replicated_are_equal(model)
    again = pypar.tensor_parallel(build(name), plan=plan)
    again.load_state_dict(full.state_dict())  # a full checkpoint
    assert_same(gather_full_state(again), full.state_dict())


GROUPS = [list(MODELS)[i : i + 6] for i in range(0, len(MODELS), 6)]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_parity(world, sequence_parallel, names):
    run_ranks(check, world, names, sequence_parallel)
