"""Sequence parallel of a Hugging Face model: its own loss, hidden states on demand, generation, checkpointing."""

import pytest
import torch
from tensor_parallel.test_sequence import CLOSE, plain

import pypar
from pypar.tensor_parallel import gather_full_grads
from pypar.testing import run_ranks


def check_hugging_face(rank, world):
    """The model's own loss over the cut vocabulary; all hidden states on demand; generation; checkpointing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=24, intermediate_size=34, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip

    def build():
        torch.manual_seed(3)
        return transformers.LlamaForCausalLM(config)

    full = build()
    ids = torch.randint(3, 53, (2, 25), generator=torch.Generator().manual_seed(5))
    labels = ids.masked_fill(ids < 9, -100)
    model = pypar.tensor_parallel(build(), sequence_parallel=True, loss_parallel=True)
    for settings in ({}, {"num_items_in_batch": 7}):
        found, wanted = (m(input_ids=ids, labels=labels, **settings) for m in (model, full))
        torch.testing.assert_close(found.loss, wanted.loss, **CLOSE)
        assert found.logits.shape[-1] == model.lm_head.cut.sizes()[rank]
    found.loss.backward()
    wanted.loss.backward()
    torch.testing.assert_close(gather_full_grads(model), plain(full), **CLOSE)

    model = pypar.tensor_parallel(build(), sequence_parallel=True)
    found, wanted = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (model, full))
    torch.testing.assert_close(found, wanted, **CLOSE)
    prompt = {"input_ids": ids[:, :24], "attention_mask": torch.ones(2, 24), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**prompt), full.generate(**prompt))
    for each in (model, full):
        each.zero_grad()
        each.train()
        each.gradient_checkpointing_enable()
        each(input_ids=ids, labels=labels).loss.backward()
    torch.testing.assert_close(gather_full_grads(model), plain(full), **CLOSE)


def test_hugging_face():
    run_ranks(check_hugging_face, 2)
