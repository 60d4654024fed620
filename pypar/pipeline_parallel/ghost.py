"""Values that a stage doesn't have: they know their shape, so that code between the blocks runs, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


class Ghost(torch.Tensor):
    """Stands for what a module of an earlier stage returned. Any function of it is a ghost again."""

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device) -> Ghost:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device, requires_grad=False
        )

    def __init__(self, meta: torch.Tensor, device: torch.device):
        self._meta = meta

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Ghost({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        device = next(x.device for x in pytree.tree_leaves((args, kwargs or {})) if isinstance(x, Ghost))

        def to_meta(x: Any) -> Any:
            if isinstance(x, Ghost):
                return x._meta
            if isinstance(x, torch.Tensor):
                return x.to("meta")
            return torch.device("meta") if isinstance(x, torch.device) else x

        out = func(*pytree.tree_map(to_meta, args), **pytree.tree_map(to_meta, kwargs or {}))
        return pytree.tree_map(lambda x: Ghost(x, device) if isinstance(x, torch.Tensor) else x, out)


def ghost_of(x: torch.Tensor, device: torch.device | None = None) -> Ghost:
    return Ghost(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), device or x.device)


def is_ghost(x: Any) -> bool:
    return isinstance(x, Ghost)
