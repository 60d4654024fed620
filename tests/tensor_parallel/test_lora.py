"""LoRA of peft on parallel layers against one process: logits, loss, adapter gradients, adapters after 3 steps."""

import warnings

import pytest
import torch

import pypar
from pypar.tensor_parallel import cut_adapters, gather_full_grads, gather_full_state
from pypar.testing import run_ranks

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32, "vocab_size": 53, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]
MODELS = {  # name: (model type, settings, adapted modules, settings of LoRA)
    "llama": ("llama", {"num_key_value_heads": 2}, ALL, {"lora_bias": False}),
    "llama, 1 kv head, biases": (
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        ["k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        {"lora_bias": True, "use_rslora": True},
    ),
    "llama, embedding": ("llama", {}, ["embed_tokens", "q_proj"], {}),
    "gpt2": ("gpt2", GPT2, ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
}
IDS = torch.randint(3, 53, (2, 25), generator=torch.Generator().manual_seed(5))


def base(name):
    kind, settings, *_ = MODELS[name]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **({**SIZES, **settings} if kind != "gpt2" else settings))
    )
    return model.train()


def adapted(model, name, dropout=0.0):
    _, _, modules, settings = MODELS[name]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=modules, lora_dropout=dropout, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Conv1D, which pypar's layer in its place isn't by type
        return peft.get_peft_model(model, config)


def full_model(name, dropout=0.0):
    """With adapters that aren't zero, as trained ones aren't."""
    model = adapted(base(name), name, dropout)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def steps(model, grads_of, weights_of):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)
    first = None
    for _ in range(3):
        out = model(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        if first is None:
            first = {"logits": out.logits.detach().clone(), "loss": out.loss.detach().clone()}
            first |= {f"gradient of {n}": g.clone() for n, g in grads_of(model).items()}
        optimizer.step()
        optimizer.zero_grad()
    return first | {f"3 steps: {n}": w.detach().clone() for n, w in weights_of(model).items()}


def parallel(name, order, dropout=0.0, **settings):
    if order == "adapted, then cut":
        return pypar.tensor_parallel(full_model(name, dropout), **settings)
    torch.manual_seed(torch.distributed.get_rank())  # adapters that differ between ranks, if one let them
    model = cut_adapters(adapted(pypar.tensor_parallel(base(name), **settings), name, dropout))
    whole = [p for n, p in model.named_parameters() if n.endswith("lora_B.default.weight")]
    assert whole and all((p == 0).all() for p in whole)
    model.load_state_dict(full_model(name, dropout).state_dict())
    return model


def replicated_are_equal(model):
    for n, p in model.named_parameters():
        if p.requires_grad:
            every = pypar.ops.all_gather(p.detach()[None].contiguous()) if _is_whole(n, model) else p[None]
            assert torch.equal(every, every[:1].expand_as(every)), n


def _is_whole(name, model):
    parent, _, leaf = name.rpartition(".")
    return leaf not in getattr(model.get_submodule(parent), "_pypar_shards", {})


def check(rank, world, name, sequence):
    full = full_model(name)
    wanted = steps(
        full, lambda m: {n: p.grad for n, p in m.named_parameters() if p.requires_grad}, lambda m: m.state_dict()
    )
    for order in ("adapted, then cut", "cut, then adapted"):
        model = parallel(name, order, sequence_parallel=sequence)
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        found = steps(model, gather_full_grads, gather_full_state)
        assert found.keys() == wanted.keys(), (order, found.keys() ^ wanted.keys())
        for n, tensor in wanted.items():
            torch.testing.assert_close(
                found[n], tensor, **CLOSE, msg=lambda m, n=n, o=order: f"{name}, {sequence}, {o}: {n}: {m}"
            )
        assert frozen
        for n, p in model.named_parameters():
            if n in frozen:
                assert torch.equal(p, frozen[n]) and p.grad is None, n
        replicated_are_equal(model)
        model.eval()
        with torch.no_grad():
            before = model(input_ids=IDS, use_cache=False).logits
            if name != "llama, embedding":  # whose adapter is full, and the embedding is not
                model.merge_adapter()
                torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, before, **CLOSE)
                model.unmerge_adapter()
            with model.disable_adapter():
                alone = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(alone, base(name).eval()(input_ids=IDS, use_cache=False).logits, **CLOSE)


def check_all(rank, world):
    for name in MODELS:
        check(rank, world, name, False)
    for name in ("llama, 1 kv head, biases", "gpt2"):
        check(rank, world, name, True)
    check_errors(rank, world)


def test_parity():
    run_ranks(check_all, 2)


def check_dropout(rank, world):
    results = {}
    for name in ("llama", "gpt2"):
        for settings in ({}, {"sequence_parallel": True}):
            for order in ("adapted, then cut", "cut, then adapted"):
                model = parallel(name, order, 0.3, **settings)
                torch.manual_seed(7 + rank)
                results[name, order, str(settings)] = [
                    (loss.item(), sum(g.double().norm().item() for g in gather_full_grads(model).values()))
                    for loss in (backward(model) for _ in range(2))
                ]
    return results


def backward(model):
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss


def test_dropout_of_adapters():
    (wanted,) = run_ranks(check_dropout, 1)
    for found in run_ranks(check_dropout, 2):
        for key, numbers in wanted.items():
            torch.testing.assert_close(found[key], numbers, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def check_errors(rank, world):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    model = peft.get_peft_model(base("llama"), config)
    with pytest.raises(ValueError, match=r"q_proj: DoraLinearVariant on a parallel layer needs weights that no rank"):
        pypar.tensor_parallel(model)
    model = adapted(base("llama"), "llama")
    before = str(model)
    with pytest.raises(ValueError, match="names no module"):
        pypar.tensor_parallel(model, plan={"layers.*.nothing": "colwise"})
    assert str(model) == before, "nothing is changed"
