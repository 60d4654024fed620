"""A module whose parameters are not here gives and takes no state dict, rather than an empty one."""

from __future__ import annotations

from typing import Any

from torch import nn

from pypar.zero.flat import FlatParameters


def refuse_state_dicts(module: nn.Module, flats: list[FlatParameters]) -> None:
    """From now on, while `flats`, the module's, aren't whole. The errors are RuntimeErrors."""

    def where() -> str:
        unit = f"unit '{flats[0].unit}'" if flats[0].unit else "the root unit"
        return "" if all(flat.is_full for flat in flats) else f"the values of {unit} are not on this rank"

    def give(_module: nn.Module, *_: Any) -> None:
        if where():
            raise RuntimeError(
                f"pypar.Zero: state_dict(), while {where()}; use full_state_dict() or sharded_state_dict() of the "
                "wrapper, or call it within full_params()"
            )

    def take(_module: nn.Module, *_: Any) -> None:
        if where():
            raise RuntimeError(
                f"pypar.Zero: load_state_dict(), while {where()}; use the wrapper's load_state_dict() or "
                "load_full_state_dict()"
            )

    module.register_state_dict_pre_hook(give)
    module.register_load_state_dict_pre_hook(take)
