"""A short text that the model goes on with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()
def generate(
    module: nn.Module,
    prompt: Sequence[int],
    num_tokens: int,
    end: int,
    context: int,
    temperature: float,
    device: torch.device,
    seed: int,
    group: dist.ProcessGroup | None = None,
    full: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    caches: bool = True,
) -> list[int]:
    """Up to num_tokens after the prompt, sampled with a generator of its own; stops at `end`.

    module: a causal LM of transformers, not wrapped, or one in a pipeline. context: longest sequence it takes; what is
    older is forgotten. group: the ranks that hold a part of the module each; a collective call of them, with the same
    result. full: from the logits [V] of a token that the module gives to those of the whole vocabulary. caches: the
    module keeps keys and values.
    """
    was_training = module.training
    module.eval()
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)[-context:] or [end]
    out: list[int] = []
    cache: Any = None
    # transformers 5.24 renamed it.
    names = inspect.signature(type(module).forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    while len(out) < num_tokens:
        if cache is None or len(text) > context:
            text, cache = text[-max(1, context // 2) :] if len(text) > context else text, None
        new = torch.tensor([text if cache is None else text[-1:]], device=device)
        result = module(input_ids=new, **({"use_cache": True, name: cache} if caches else {}))
        cache = result[name] if caches else None
        odds = torch.softmax(full(result.logits[0, -1]).float().cpu() / temperature, dim=-1)
        drawn = torch.multinomial(odds, 1, generator=generator).to(device)
        if group is not None:
            dist.broadcast(drawn, group=group, group_src=0)
        token = int(drawn)
        if token == end:
            break
        out.append(token)
        text.append(token)
    module.train(was_training)
    return out
