"""The seed of a forward: agreed by the ranks, drawn from torch's default generator, found again by a recomputation."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import is_fake

from pypar.ops.library import LIBRARY

# The upper bits of a seed of ours, which tell a recomputation (activation checkpointing restores the generator of the
# forward) from a module that is called by itself: 48 bits are random.
_BITS = 48
_OURS = 0x5059 << _BITS


def is_ours(seed: int) -> bool:
    return seed >> _BITS << _BITS == _OURS


def forward_seed(group_name: str) -> tuple[int, bool]:
    """The seed, and whether it is that of a forward which is run again.

    Every rank draws one number from torch's default generator, and rank 0's counts: torch.get_rng_state between two
    steps says how the run goes on.
    """
    current = torch.default_generator.initial_seed()
    if is_ours(current):
        return current, True
    drawn = torch.randint(1 << _BITS, (1,), dtype=torch.int64)
    drawn = torch.ops.pypar.broadcast(drawn, 0, group_name)
    return _OURS | (0 if is_fake(drawn) else int(drawn)), False  # fake: pypar.estimate, where there are no values


def fork_generator(seed: int) -> torch.Tensor:
    """During the forward torch's default generator is seeded with `seed`: so ranks agree on whatever else is random,
    and a recomputation finds the seed. Returns the state to put back."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    return state


def _forward_seed(group_name: str) -> torch.Tensor:
    return torch.tensor(forward_seed(group_name)[0], dtype=torch.int64)


# For compiled code, where reading the generator must happen in each run. The tag: never twice for one call.
LIBRARY.define("forward_seed(str group_name) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
LIBRARY.impl("forward_seed", _forward_seed, "CompositeExplicitAutograd")
torch.library.register_fake("pypar::forward_seed", lambda group_name: torch.empty((), dtype=torch.int64), lib=LIBRARY)
