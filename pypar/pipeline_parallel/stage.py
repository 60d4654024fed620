"""The stages of a model on one rank: the model's own forward, of which each stage runs its part."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pypar.pieces import pieces_of
from pypar.pipeline_parallel.ghost import ghost_of, is_ghost
from pypar.placement import Cut, Part

Payload = dict[str, Any]  # name of a module -> what it returned

_BITS = 48
OURS = 0x5050 << _BITS  # the upper bits of a forward's seed, by which a recomputation in backward finds it


class Done(Exception):
    """The stage's last module has run: the rest of the model's forward is another stage's. An Exception, since torch
    calls a module's hooks behind those alone."""


@dataclass
class Pass:
    """One forward of a stage on one micro-batch."""

    stage: int
    payload: Payload  # from the stage before
    like: Any  # what a module of an earlier stage returned, as ghosts; None at stage 0
    made: Payload = field(default_factory=dict)  # for the next stage
    is_done: bool = False

    def end(self) -> NoReturn:
        self.is_done = True
        raise Done


class Stages:
    """Runs the stages `here` of `root`, cut by `cut`, and takes all other parameters out of it.

    Every stage calls the model's own forward with the micro-batch, so that masks, positions and whatever else the
    model computes from its inputs are there. A module of an earlier stage returns what came from there: its output, if
    it is the last one before the cut or named in `carry`, else a ghost. At the first module of a later stage the
    forward ends.
    """

    def __init__(self, root: nn.Module, cut: Cut, here: set[int], carry: Sequence[str] = ()):
        self.root, self.cut, self.here = root, cut, here
        self.parts = {part.name: part for part in cut.parts}
        unknown = [name for name in carry if name not in self.parts]
        if unknown:
            raise ValueError(f"carry: {unknown[0]!r} is no part of the model; they are {', '.join(self.parts)}")
        self.carry = list(carry)
        self.now: Pass | None = None
        for part in cut.parts:
            if part.stage not in here:
                _strip(part.module)
            pieces = pieces_of(part.module) if part.is_block else []
            part.module.forward = self._forward(part, part.module.forward)  # type: ignore[method-assign,assignment]
            for name, piece in pieces:  # so that a block draws the same numbers whether it is cut or not
                piece.forward = _seeded(piece, f"{part.name}.{name}", piece.forward)  # type: ignore[method-assign,assignment]
        for name in dict.fromkeys(part.block for part in cut.parts if part.block):
            block = root.get_submodule(name)
            stages = {part.stage for part in cut.parts if part.block == name}
            block.forward = self._around(name, block, stages, block.forward)  # type: ignore[method-assign,assignment]

    def leaves_behind(self, stage: int) -> list[str]:
        """Modules whose outputs go from `stage` to the next."""
        carried = [name for name in self.carry if self.parts[name].stage <= stage]
        return list(dict.fromkeys([self.cut.boundary[stage], *self.cut.beside.get(stage, ()), *carried]))

    def run(self, stage: int, payload: Payload, call: Callable[[], Any], seed: int) -> Any:
        """What call(), which calls the model, returns at the last stage; else what goes to the next one. payload: from
        the stage before. seed: of everything random in this forward."""
        is_last = stage == self.cut.num_stages - 1
        like = None
        if stage > 0:
            block = self.cut.beside.get(stage - 1, [self.cut.boundary[stage - 1]])[0]
            like = pytree.tree_map_only(torch.Tensor, ghost_of, payload[block])
        self.now = now = Pass(stage, payload, like)
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(OURS | seed)
        try:
            result = call()
        except Done:
            if is_last:
                raise RuntimeError("internal: the last stage met a later one") from None
            result = None
        else:
            if now.is_done:
                raise RuntimeError(f"stage {stage}: the model's forward caught the exception that ends it here")
        finally:
            self.now = None
            torch.default_generator.set_state(state)
        if is_last:
            return result
        missing = [name for name in self.leaves_behind(stage) if name not in now.made and name not in payload]
        if missing:
            raise RuntimeError(
                f"stage {stage}: the model's forward ended without calling '{missing[0]}'; cut it elsewhere (split=)"
            )
        return {name: now.made.get(name, payload.get(name)) for name in self.leaves_behind(stage)}

    def _forward(self, part: Part, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            now = self.now
            if now is None or part.stage == now.stage:
                if part.stage not in self.here:
                    raise RuntimeError(
                        f"'{part.name}' is in stage {part.stage}, which is another rank's; call the Pipeline, not the "
                        "model"
                    )
                return self._own(part, original, now, args, kwargs)
            if part.stage > now.stage:
                now.end()
            if part.name in now.payload:
                return now.payload[part.name]
            if part.is_block:
                return now.like
            like = next(leaf for leaf in pytree.tree_leaves(now.like) if is_ghost(leaf))
            given = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)), None)
            if given is None:
                return like
            # Of an embedding, or of what keeps its input's shape; a block's output may have another, as with
            # sequence parallel.
            rows = given.shape[:-1] if given.is_floating_point() else given.shape
            return ghost_of(torch.empty(*rows, like.shape[-1], dtype=like.dtype, device="meta"), like.device)

        return forward

    def _around(
        self, name: str, block: nn.Module, stages: set[int], original: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Of a block of which several stages have a piece."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            now = self.now
            if now is not None and now.stage < min(stages):
                now.end()
            if now is not None and now.stage > max(stages):
                return now.payload.get(name, now.like)
            out = _with_seed(block, name, original, args, kwargs)
            if now is not None and now.stage < self.cut.num_stages - 1 and name in self.leaves_behind(now.stage):
                now.made[name] = out
            return out

        return forward

    def _own(self, part: Part, original: Callable[..., Any], now: Pass | None, args: Any, kwargs: Any) -> Any:
        if now is None:  # by itself, or computed again for a backward
            return _with_seed(part.module, part.name, original, args, kwargs)
        if any(is_ghost(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            raise RuntimeError(
                f"stage {now.stage}: '{part.name}' reads a value of an earlier stage that isn't sent here. Of the "
                f"earlier modules only {', '.join(now.payload)} came: name the one it comes from in carry=[...], or "
                f"put '{part.name}' and that one into one stage (split=)"
            )
        if part.name in now.made:
            raise RuntimeError(
                f"stage {now.stage}: '{part.name}' runs twice in one forward; a pipeline can't cut there"
            )
        out = _with_seed(part.module, part.name, original, args, kwargs)
        if now.stage < self.cut.num_stages - 1 and part.name in self.leaves_behind(now.stage):
            now.made[part.name] = out
        return out


def _seeded(module: nn.Module, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _with_seed(module, name, original, args, kwargs)


def _with_seed(module: nn.Module, name: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Runs the module with random numbers that depend on the forward and on the module's name alone: not on what ran
    before, nor on the rank. Activation checkpointing restores the generator of the forward, and so finds them again."""
    seed = torch.default_generator.initial_seed()
    if not module.training or seed >> _BITS << _BITS != OURS:
        return original(*args, **kwargs)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=_BITS // 8).digest()
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(OURS | int.from_bytes(digest, "little"))
    try:
        return original(*args, **kwargs)
    finally:
        torch.default_generator.set_state(state)


def _strip(module: nn.Module) -> None:
    """Takes parameters and buffers out of a module that another rank runs."""
    for each in module.modules():
        for table in (each._parameters, each._buffers):
            for name in table:
                table[name] = None
