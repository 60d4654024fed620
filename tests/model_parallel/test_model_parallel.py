"""ModelParallel against the plain module, on CPU devices that can't be mixed: loss, every gradient, every weight."""

import pytest
import torch
from model_parallel.cpu_devices import cpu_devices, host
from pipeline_parallel.pipeline_common import SETTINGS, batches, build, loss_of, next_token_loss, reference

import pypar
from pypar.pipeline_parallel.batch import causal_loss
from pypar.testing import run_ranks

STEPS, SIZE = 3, 6
ALL = ["own", "own tied", "llama", "llama tied", "gpt2", "gpt2 tied"]
THREE = dict.fromkeys(["cpu:0", "cpu:1", "cpu:2"])
# Blocks that are cut inside: attention here, mlp there, so that both sides of a residual connection meet.
INSIDE = {
    "own": {"": "cpu:0", "blocks.*.up": "cpu:1", "blocks.3": "cpu:2", "position": "cpu:1", "norm": "cpu:2"},
    "llama": {
        "": "cpu:0",
        "model.layers.*.mlp": "cpu:1",
        "model.layers.2.*attn.k_proj": "cpu:2",
        "*.rotary_emb": "cpu:1",
    },
    "gpt2": {"": "cpu:0", "transformer.h.*.mlp": "cpu:1", "transformer.h.4": "cpu:2", "*.ln_f": "cpu:1"},
}


def close(found, want, what=""):
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6, msg=lambda m: f"{what}: {m}")


def train(name, device_map):
    model = pypar.ModelParallel(build(name), device_map)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    losses = []
    for batch in batches(name, STEPS, SIZE):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def check(model, losses, expected):
    want_losses, want_grads, want_state = expected
    close(torch.tensor(losses), torch.tensor(want_losses))
    for n, p in model.module.named_parameters(remove_duplicate=False):
        close(host(p.grad), want_grads[n], f"gradient of {n}")
    state = model.state_dict()
    assert list(state) == list(want_state)
    for n, t in state.items():
        close(host(t), want_state[n], n)


@pytest.mark.parametrize("name", ALL)
def test_parity_on_three_devices(name):
    expected = reference(name, STEPS, SIZE)
    with cpu_devices(3):
        model, losses = train(name, THREE)
        assert set(model.device_map.values()) == set(THREE)
        for n, t in [*model.module.named_parameters(), *model.module.named_buffers()]:
            assert str(t.device) == model.placement.tensors[n], n
        check(model, losses, expected)


@pytest.mark.parametrize("name", INSIDE)
def test_parity_with_blocks_that_are_cut(name):
    expected = reference(name, STEPS, SIZE)
    with cpu_devices(3):
        model, losses = train(name, INSIDE[name])
        assert set(model.placement.tensors.values()) == set(THREE)
        check(model, losses, expected)
        again = pypar.ModelParallel(build(name), model.device_map)  # what it says is what it takes
        assert again.placement.tensors == model.placement.tensors


def test_the_devices_of_these_tests_cant_be_mixed():
    with cpu_devices(2):
        a, b = torch.ones(2, device="cpu:0"), torch.ones(2, device="cpu:1")
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            a + b
        model = build("own")
        model.head.to(torch.device("cpu", 1))
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            model(batches("own", 1, 2)[0][0].to("cpu:0"))


def test_every_value_moves_once_per_device():
    tokens = batches("own", 1, SIZE)[0][0]
    with cpu_devices(3):
        model = pypar.ModelParallel(build("own"), {"": "cpu:0", "blocks.[3-5]": "cpu:1", "blocks.6": "cpu:2"})
        model(tokens)
        activation, scale, logits = tokens.numel() * 16 * 4, tokens.numel() * 4, tokens.numel() * 61 * 4
        assert model.traffic == {
            ("cpu", "cpu:0"): (2, tokens.numel() * 8 + scale),  # tokens; scale, which the code outside computes
            ("cpu:0", "cpu:1"): (1, activation),
            ("cpu", "cpu:1"): (1, scale),  # for three blocks
            ("cpu:1", "cpu:2"): (1, activation),
            ("cpu", "cpu:2"): (1, scale),
            ("cpu:2", "cpu:0"): (1, activation),
            ("cpu:0", "cpu"): (1, logits),
        }


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    batch = batches("llama", 1, SIZE)[0]
    plain = build("llama")
    loss_of(plain, batch).backward()
    with cpu_devices(3):
        inner = build("llama")
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model = pypar.ModelParallel(inner, THREE if reentrant else INSIDE["llama"])
        model.train()
        loss_of(model, batch).backward()
        for (n, p), want in zip(inner.named_parameters(), plain.parameters(), strict=True):
            close(host(p.grad), want.grad, n)


def test_generation_and_inference_mode():
    inputs = {k: v[:, :5] for k, v in batches("llama", 1, 3)[0].items() if k != "labels"}
    plain = build("llama").eval()
    want = plain.generate(**inputs, max_new_tokens=5, do_sample=False)
    with cpu_devices(3), torch.no_grad():
        model = pypar.ModelParallel(build("llama"), THREE).eval()
        assert torch.equal(host(model.generate(**inputs, max_new_tokens=5, do_sample=False)), want)
        assert model.config is model.module.config
    with torch.inference_mode():
        model = pypar.ModelParallel(build("llama"), THREE).eval()
        close(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("name", ["own tied", "llama"])
def test_train_step(name):
    (batch,) = batches(name, 1, SIZE)
    plain = build(name)
    want = loss_of(plain, batch)
    want.backward()

    def mean_loss(output, targets):
        total, count = next_token_loss(output, targets)
        return total / count

    for loss_fn in [None] if isinstance(batch, dict) else [next_token_loss, mean_loss]:
        model = pypar.ModelParallel(build(name), {"": "cpu:0"})
        close(model.train_step(batch, loss_fn), want.detach())
        for (n, p), expected in zip(model.module.named_parameters(), plain.parameters(), strict=True):
            close(p.grad, expected.grad, n)


# -- one device per rank -------------------------------------------------------------------------------------------


def on_ranks(rank, world, name, device_map):
    torch.set_num_threads(1)
    model = pypar.ModelParallel(build(name), device_map, group=torch.distributed.group.WORLD)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    losses = []
    for batch in batches(name, STEPS, SIZE):
        optimizer.zero_grad()
        loss_fn = None if isinstance(batch, dict) else lambda output, targets: next_token_loss(output, targets)
        losses.append(model.train_step(batch, loss_fn).item())
        optimizer.step()
    (batch,) = batches(name, 1, 2)
    if isinstance(batch, dict):
        output, targets = model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"]
    else:
        output, targets = model(batch[0]), batch[1]
    loss = float(causal_loss(output, targets))
    count = sum(p.numel() for p in model.parameters())
    return losses, model.full_gradients(), model.full_state_dict(), model.table(), loss, count


@pytest.mark.parametrize(
    ("name", "device_map"),
    [
        ("own tied", "auto"),
        ("llama", {"": 1, "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.[0-4]": "rank:0"}),
        ("gpt2 tied", {0: "40KiB", 1: None}),
    ],
)
def test_parity_on_two_ranks(name, device_map):
    want_losses, want_grads, want_state = reference(name, STEPS, SIZE)
    by_rank = run_ranks(on_ranks, 2, name, device_map)
    losses, grads, state, table, loss, count = by_rank[0]
    assert by_rank[1][0] == losses and by_rank[1][4] == loss and by_rank[1][3] == table
    close(torch.tensor(losses), torch.tensor(want_losses))
    assert set(grads) == set(want_grads) and set(state) == set(want_state)
    for n, want in want_grads.items():
        close(grads[n], want, f"gradient of {n}")
    for n, want in want_state.items():
        close(state[n], want, n)
    total = sum(p.numel() for p in build(name).parameters())
    assert count < total and by_rank[1][-1] < total
    if name == "llama":
        assert "model.layers.0 ... model.layers.4" in table.splitlines()[1]
    if name.startswith("gpt2"):
        assert 4 * count <= 40 * 1024
