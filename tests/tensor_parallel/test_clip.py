"""The norm and the optimizer state of a cut model are those of the full one."""

import math

import pytest
import torch

import pypar
from pypar.tensor_parallel import (
    check_plan,
    clip_grad_norm_,
    gather_full_grads,
    gather_full_optimizer_state,
    load_full_optimizer_state,
)
from pypar.tensor_parallel.cut import Cut
from pypar.testing import run_ranks

transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def build():
    """6 query heads over 2 key and value heads, which 3 ranks hold as copies; tied; biases that stay whole."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=34,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    return transformers.AutoModelForCausalLM.from_config(config).train()


def backward(model):
    ids = torch.randint(3, 53, (2, 9), generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def full_grads(model):
    return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}


def check_norms(rank, world):
    full, model = build(), pypar.tensor_parallel(build())
    for norm_type in (2.0, 1.0, math.inf):
        for share in (0.5, 2.0):  # below the norm, above it
            backward(full)
            backward(model)
            norm = torch.nn.utils.get_total_norm([p.grad for p in full.parameters()], norm_type).item()
            wanted = torch.nn.utils.clip_grad_norm_(full.parameters(), share * norm, norm_type)
            found = clip_grad_norm_(model, share * norm, norm_type)
            torch.testing.assert_close(found, wanted, **CLOSE)
            everyone = pypar.ops.all_gather(found[None])
            assert torch.equal(everyone, everyone[:1].expand(world)), "the ranks differ"
            for name, grad in full_grads(full).items():
                torch.testing.assert_close(gather_full_grads(model)[name], grad, **CLOSE)
    backward(model)
    if rank == world - 1:  # a shard of one rank alone
        model.get_parameter("model.layers.0.mlp.up_proj.weight").grad[0, 0] = math.nan
    with pytest.raises(RuntimeError, match=r"the norm of order 2\.0 of the gradients is nan"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="norm_type must be above 0, got 0"):
        clip_grad_norm_(model, 1.0, 0)


def check_optimizer_state(rank, world):
    def make(module):
        return module, torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e-5, fused=True)

    def steps(module, optimizer):
        for _ in range(2):
            backward(module)
            optimizer.step()

    full, its_optimizer = make(build())
    model, optimizer = make(pypar.tensor_parallel(build()))
    steps(full, its_optimizer)
    steps(model, optimizer)
    gathered = gather_full_optimizer_state(model, optimizer)
    wanted = {name: its_optimizer.state[p] for name, p in full.named_parameters()}
    assert gathered.keys() == wanted.keys()
    for name, state in wanted.items():
        assert gathered[name].keys() == state.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(gathered[name][key], tensor, **CLOSE, msg=f"{key} of {name}")

    again, another = make(pypar.tensor_parallel(build()))
    load_full_optimizer_state(again, another, gathered)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        for key, tensor in optimizer.state[p].items():
            assert torch.equal(another.state[q][key], tensor), f"{key} of {name}"
    with pytest.raises(ValueError, match="optimizer state for absent, which is no parameter of LlamaForCausalLM"):
        load_full_optimizer_state(again, another, {"absent": {}})
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"exp_avg of .*up_proj.weight is \(3, 24\), the full parameter is \(34, 24\)"):
        load_full_optimizer_state(again, another, {name: {"exp_avg": torch.zeros(3, 24)}})


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("check", [check_norms, check_optimizer_state])
def test_as_the_full_model(check, world):
    run_ranks(check, world)


def test_without_shards_it_is_torchs():
    one, other = build(), build()
    backward(one)
    backward(other)
    assert torch.equal(clip_grad_norm_(one, 0.1), torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_every_index_is_held_first_by_one_rank():
    cut = Cut(6, (((0, 4),), ((2, 5),), ((4, 6), (0, 1))))
    assert [cut.first_held(rank) for rank in range(3)] == [[0, 1, 2, 3], [2], [1]]


def test_a_plan_is_checked_without_ranks_or_weights():
    with torch.device("meta"):
        module = build()
    check_plan(module, 6)
    with pytest.raises(ValueError, match="has 6 heads, too few for 7 ranks of tensor parallel: use tp = 1 to 6"):
        check_plan(module, 7)
    assert module.model.layers[0].mlp.up_proj.weight.shape == (34, 24), "nothing is changed"
