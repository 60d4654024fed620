"""The built-in models, as arguments of transformers' config classes; sizes for CPU ranks."""

from __future__ import annotations

from typing import Any

# Parameters with the byte vocabulary of 257: llama-tiny 2.3 M, llama-small 25.5 M, gpt2-tiny 2.0 M.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-tiny": {
        "model_type": "llama",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
    "llama-small": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "gpt2-tiny": {
        "model_type": "gpt2",
        "n_embd": 192,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 1024,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
