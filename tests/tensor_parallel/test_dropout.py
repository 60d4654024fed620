"""With dropout on, every element that one process drops is dropped on 2 and 4 ranks, and no other."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pypar
from pypar.tensor_parallel import dropout, gather_full_grads
from pypar.testing import run_ranks

transformers = pytest.importorskip("transformers")

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
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32, "vocab_size": 53, "pad_token_id": 0}
GPT2 |= {"attn_pdrop": 0.2, "embd_pdrop": 0.1, "resid_pdrop": 0.3, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"ffn_dim": 34, "word_embed_proj_dim": 24, "dropout": 0.2, "attention_dropout": 0.1, "layerdrop": 0.3}
MODELS = {  # name: (model type, settings, attention, how many dropouts a forward has)
    "gpt2": ("gpt2", GPT2, "eager", 7),
    "gpt2, sdpa": ("gpt2", GPT2, "sdpa", 7),
    "llama": ("llama", {"num_key_value_heads": 3, "attention_dropout": 0.3}, "sdpa", 2),
    "opt, layers left out at random": ("opt", OPT, "eager", None),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 6, "hidden_dropout": 0.1, "attention_dropout": 0.2}, "eager", 6),
}
IDS = torch.randint(3, 53, (2, 25), generator=torch.Generator().manual_seed(5))


def build(name):
    kind, settings, attention, _ = MODELS[name]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings})
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config).train()


class Record:
    """What each dropout was asked for, and its mask."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(dropout, "keyed_dropout", self)

    def __call__(self, x, seed, number, p, dim=0, full=None, ranges=None):
        y = pypar.ops.keyed_dropout(x, seed, number, p, dim, full, ranges)
        kept = pypar.ops.keyed_dropout(torch.ones_like(x), seed, number, p, dim, full, ranges) != 0
        assert torch.equal(y, torch.where(kept, x * (1 / (1 - p)), 0))
        self.calls.append((int(seed), number, p, dim, ranges or [0, len(x)], kept))
        return y


def steps(model):
    """Losses and sums of gradients of 3 steps, and the generator's next number."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        grads = gather_full_grads(model).values()
        seen += [loss.item(), sum(g.double().norm().item() for g in grads)]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def check_models(rank, world):
    results = {}
    for name in MODELS:
        for sequence in (False, True) if name.startswith(("gpt2, sdpa", "opt")) else (False,):
            with pytest.MonkeyPatch.context() as patch:
                model = pypar.tensor_parallel(build(name), sequence_parallel=sequence)
                record = Record(patch)
                torch.manual_seed(100 + rank)  # rank 0's counts
                results[name, sequence] = steps(model), record.calls
    return results


def test_masks_are_the_same_bits_on_1_2_and_4_ranks():
    (full,) = run_ranks(check_models, 1)
    for world in (2, 4):
        for rank, found in enumerate(run_ranks(check_models, world)):
            for (name, sequence), (numbers, calls) in found.items():
                what = (name, sequence, world, rank)
                wanted_numbers, wanted = full[name, sequence]
                close = {"rtol": 1e-6, "atol": 1e-6}
                torch.testing.assert_close(numbers, wanted_numbers, **close, msg=lambda m, w=what: f"{w} {m}")
                per_forward = MODELS[name][3]
                assert len(calls) == len(wanted) == (3 * per_forward if per_forward else len(wanted)) > 0
                assert len({call[:2] for call in calls}) == len(calls), "each its own mask"
                cut = [same_mask(*pair, what) for pair in zip(calls, wanted, strict=True)]
                assert any(cut), "attention's probabilities are a part"
                assert len(set(cut)) > 1 or name == "llama" or sequence, "and the hidden states are not"


def same_mask(call, wanted, what):
    """The mask of a part is that of the full tensor there; whether it is one."""
    *key, dim, ranges, kept = call
    *wanted_key, _, _, full = wanted
    assert key == wanted_key, what
    held = torch.tensor([i for a, b in zip(ranges[::2], ranges[1::2], strict=True) for i in range(a, b)])
    if kept.dim() < full.dim() or kept.shape[0] < full.shape[0]:  # rows of [B, S, D]
        full = full.reshape(1, -1, full.shape[-1]) if kept.dim() == 3 else full.reshape(-1, full.shape[-1])
    assert torch.equal(kept, full.index_select(dim, held)), (*what, dim, ranges)
    return kept.numel() < full.numel()


def two_forwards(model):
    """Gradients where two forwards wait for their backwards, the first one's last."""
    losses = [model(input_ids=IDS.roll(i, 1), labels=IDS, use_cache=False).loss for i in range(2)]
    for loss in reversed(losses):
        loss.backward()
    return [p.grad for p in model.parameters()]


def check_checkpoints(rank, world):
    for name in ("gpt2", "opt, layers left out at random"):
        for sequence in (False, True):
            model = pypar.tensor_parallel(build(name), sequence_parallel=sequence)
            torch.manual_seed(100 + rank)
            wanted = two_forwards(model)
            for reentrant in (True, False):
                model = pypar.tensor_parallel(build(name), sequence_parallel=sequence)
                model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                torch.manual_seed(100 + rank)
                found = two_forwards(model)
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_activation_checkpoints():
    run_ranks(check_checkpoints, 2)


class Nothing:
    def drop(self, x, p):
        return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_written_out_is_torchs(dtype):
    q, k, v = (torch.randn(2, 4, s, 8, dtype=dtype) for s in (5, 7, 7))
    for kwargs in (
        {},
        {"is_causal": True, "scale": 0.3},
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(-1)},  # the first query sees no key
        {"attn_mask": torch.randn(5, 7).to(dtype)},
        {"enable_gqa": True},
    ):
        heads = 2 if "enable_gqa" in kwargs else 4
        found = dropout._attention(Nothing(), q, k[:, :heads], v[:, :heads], dropout_p=0.5, **kwargs)
        wanted = F.scaled_dot_product_attention(q, k[:, :heads], v[:, :heads], **kwargs)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, wanted, rtol=4 * eps, atol=4 * eps)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 6, 4
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            w(x).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for w in (self.q, self.k, self.v)
        )
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(-1)  # the first query sees nothing
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.25 if self.training else 0.0)
        y = F.dropout(y.transpose(1, 2).flatten(2), 0.1, self.training)
        return F.dropout(self.o(y), 0.2, self.training, inplace=True)


class Mlp(nn.Module):
    def __init__(self, shape=None):
        super().__init__()
        self.up, self.down, self.shape = nn.Linear(24, 34), nn.Linear(34, 24), shape

    def forward(self, x):
        h = torch.relu(self.up(x))
        h = F.dropout(h[..., :1] if self.shape == "cut off" else h, 0.3, self.training)
        h = F.dropout1d(h, 0.3, self.training) if self.shape == "channels" else h
        return torch.dropout(self.down(h), 0.3, self.training)


class Model(nn.Module):
    """A user's own, with its probabilities written in the code, and one MLP that is called twice."""

    def __init__(self, shape=None):
        super().__init__()
        torch.manual_seed(2)
        self.attention, self.mlp, self.noise = Attention(), Mlp(shape), nn.Dropout(0.1)

    def forward(self, x):
        x = self.noise(x + self.attention(x))
        return self.mlp(self.mlp(x) + torch.rand(()))


def interrupt(x):
    raise KeyboardInterrupt


def check_own(rank, world):
    model = pypar.tensor_parallel(Model())
    torch.manual_seed(100 + rank)
    x = torch.linspace(-1, 1, 240).view(2, 5, 24)
    with pytest.MonkeyPatch.context() as patch:
        record = Record(patch)
        first = model(x)
        numbers = [call[1] for call in record.calls]
        assert len(numbers) == 8 and len(set(numbers)) == 8
        state, weights = torch.get_rng_state(), copy.deepcopy(model)
        second = model(x)
        assert not torch.equal(first, second)
        torch.set_rng_state(state)  # a run that goes on
        assert torch.equal(weights(x), second)
        parts = [model.attention(x), model.mlp(x), model.mlp(x)]  # by themselves
        assert not torch.equal(parts[1], parts[2])
    model.eval()
    before = torch.get_rng_state()
    model.attention(x)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn where nothing is dropped"
    with pytest.raises(RuntimeError):
        model.train()(torch.zeros(2, 5, 3))
    torch.manual_seed(100 + rank)
    assert torch.equal(model(x), first), "a forward that failed leaves nothing behind"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "relu", interrupt)
        model(x)
    torch.set_rng_state(state)
    assert torch.equal(model(x), second), "nor does an interrupt"
    if world > 1:
        for shape, match in (
            ("cut off", r"mlp: dropout on a tensor of shape \(2, 5, 1\)"),
            ("channels", "mlp: dropout1d"),
        ):
            with pytest.raises(ValueError, match=match):
                pypar.tensor_parallel(Model(shape))(x)
    if world < 3:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.manual_seed(100 + rank)
        again = compiled(x.clone())
        assert (again == 0).eq(first == 0).all(), "the masks of compiled code are the same"
    return [first.detach(), *(p.detach() for p in parts)]


def test_own_model():
    (full,) = run_ranks(check_own, 1)
    for world in (2, 3):
        for found in run_ranks(check_own, world):
            torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-6)
            assert all(torch.equal(a == 0, b == 0) for a, b in zip(found, full, strict=True))
