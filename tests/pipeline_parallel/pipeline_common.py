"""Models, batches and the reference of the pipeline tests."""

import torch
from torch import nn

from pypar.pipeline_parallel import Pipeline
from pypar.pipeline_parallel.batch import causal_loss

STEPS = 3
VOCAB, WIDTH, SEQ = 61, 16, 12
SETTINGS = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1}


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, scale):
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x))))) * scale


class Own(nn.Module):
    """An embedding, a parameter of its own, a list of blocks, a tied or untied head."""

    def __init__(self, num_blocks=7, tied=False, dropout=0.0, skip=False):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.position = nn.Parameter(torch.randn(SEQ, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.skip = skip

    def get_output_embeddings(self):
        return self.head

    def forward(self, tokens):
        scale = (tokens % 3 + 1).unsqueeze(-1) / 2.0  # computed from the inputs, on every stage
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for index, block in enumerate(self.blocks):
            x = block(x, scale)
            if index == 0:
                first = x
        return self.head(self.norm(x + first if self.skip else x))


def hf_llama(tied=False, num_blocks=7):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=num_blocks, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def hf_gpt2(tied=True, num_blocks=7):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=num_blocks, n_head=4, n_positions=64, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "own": lambda num: Own(num),
    "own tied": lambda num: Own(num, tied=True),
    "llama": lambda num: hf_llama(False, num),
    "llama tied": lambda num: hf_llama(True, num),
    "gpt2": lambda num: hf_gpt2(False, num),
    "gpt2 tied": lambda num: hf_gpt2(True, num),
}


def build(name):
    """deep: enough blocks for two stages on each of 4 ranks."""
    torch.manual_seed(3)
    return MODELS[name.removesuffix(" deep")](9 if name.endswith(" deep") else 7)


def batches(name, steps, size):
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(steps):
        tokens = torch.randint(VOCAB, (size, SEQ), generator=generator)
        if name.startswith("own"):
            found.append((tokens, tokens))
        else:
            mask = torch.ones(size, SEQ, dtype=torch.int64)
            mask[:, -2:] = (torch.arange(size) % 3 > 0).long()[:, None]
            labels = tokens.masked_fill(mask == 0, -100)
            found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def next_token_loss(output, targets):
    """(sum, count)"""
    return causal_loss(output, targets), targets[:, 1:].numel()


def loss_of(model, batch):
    if isinstance(batch, dict):
        output = model(**{k: v for k, v in batch.items() if k != "labels"})
        return causal_loss(output, batch["labels"]) / (batch["labels"][:, 1:] != -100).sum()
    total, count = next_token_loss(model(batch[0]), batch[1])
    return total / count


def reference(name, steps, size):
    """(losses, gradients of the last step, weights after all) of one process."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    losses = []
    for batch in batches(name, steps, size):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False)}, model.state_dict()


def train(rank, world, name, schedule, micro_batches, size, split="auto"):
    pipeline = Pipeline(build(name), schedule=schedule, micro_batches=micro_batches, split=split)
    optimizer = torch.optim.AdamW(pipeline.parameters(), **SETTINGS)
    losses = []
    for batch in batches(name, STEPS, size):
        optimizer.zero_grad()
        losses.append(pipeline.train_step(batch, None if isinstance(batch, dict) else next_token_loss).item())
        optimizer.step()
    return losses, pipeline.full_gradients(), pipeline.full_state_dict()


def check(found, expected):
    losses, grads, state = found[0]
    want_losses, want_grads, want_state = expected
    assert all(f[0] == losses for f in found)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=1e-5, atol=1e-6)
    assert set(grads) == set(want_grads) and set(state) == set(want_state)
    for n, want in want_grads.items():
        torch.testing.assert_close(grads[n], want, rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"gradient of {n}: {m}")
    for n, want in want_state.items():
        torch.testing.assert_close(state[n], want, rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
