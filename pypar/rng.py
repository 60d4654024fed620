"""The states of all random generators of a rank as JSON values, and back."""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy as np
import torch


def seed_everything(*numbers: int) -> None:
    """Seeds torch, random and numpy from a hash of the numbers."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def capture(device: torch.device) -> dict[str, Any]:
    """The state of this process's generators."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": _pack(torch.get_rng_state()),
        "python": [version, list(words), gauss],
        "numpy": [numpy_state[0], [int(word) for word in numpy_state[1]], *numpy_state[2:]],
    }
    if device.type == "cuda":
        state["cuda"] = _pack(torch.cuda.get_rng_state(device))
    return state


def restore(state: dict[str, Any], device: torch.device) -> None:
    """What `capture` returned, on the same kind of device."""
    torch.set_rng_state(_unpack(state["torch"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_unpack(state["cuda"]), device)


def _pack(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _unpack(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
