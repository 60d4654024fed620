"""Runs a schedule: what a rank computes, and what goes to and comes from its neighbours, action by action."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from pypar.pipeline_parallel.batch import Caller, Losses
from pypar.pipeline_parallel.plan import BACKWARD, FORWARD, Link
from pypar.pipeline_parallel.ring import Channel
from pypar.pipeline_parallel.schedule import Action, Schedule
from pypar.pipeline_parallel.stage import Payload, Stages
from pypar.pipeline_parallel.weight_grads import WeightQueue
from pypar.reference.collectives import device_of

Key = tuple[int, int]  # (stage, micro-batch)


@dataclass
class Saved:
    """What a stage keeps of a micro-batch from its forward to its backward."""

    inputs: list[torch.Tensor]  # leaves that require a gradient
    outputs: list[torch.Tensor]  # that gradients will come for
    num_inputs: int  # tensors in the payload from the stage before


class Engine:
    """channels: of the links that begin or end here; messages between two stages of this rank stay in a dict."""

    def __init__(self, stages: Stages, queue: WeightQueue, channels: dict[Link, Channel], copies: bool):
        self.stages, self.queue, self.channels, self.copies = stages, queue, channels, copies
        self.call = Caller(stages.root)
        self.has_targets = self.trains = True
        self.local: dict[tuple[Link, int], Any] = {}
        self.saved: dict[Key, Saved] = {}
        self.outputs: dict[int, Any] = {}

    def run(
        self,
        schedule: Schedule,
        rank: int,
        parts: list[Any],
        losses: Losses | None,
        seed: Callable[[int], int],
        has_targets: bool = True,
        trains: bool = True,
        done: Callable[[int], None] | None = None,
    ) -> None:
        """All of this rank's actions. parts: the micro-batches. losses: None for a forward whose results are then in
        `outputs`. seed(micro_batch): of its forward. has_targets: parts are pairs or dicts, as train_step takes them;
        else what the model takes. trains: with gradients; never without losses. done(stage): when a micro-batch's
        gradients are complete in a stage."""
        self.has_targets, self.trains = has_targets, trains and losses is not None
        self.saved, self.local, self.outputs = {}, {}, {}
        self.queue.clear()
        try:
            for action in schedule.actions[rank]:
                try:
                    self._do(action, parts[action.micro_batch], losses, seed(action.micro_batch))
                except BaseException as error:
                    error.add_note(f"in stage {action.stage} (rank {rank}), {action} of schedule {schedule.name}")
                    raise
                if done is not None and action.kind in "BW":
                    done(action.stage)
            for channel in self.channels.values():
                channel.ring.finish()
        finally:
            self.saved, self.local = {}, {}
            self.queue.clear()

    def _do(self, action: Action, part: Any, losses: Losses | None, seed: int) -> None:
        stage, micro_batch = action.stage, action.micro_batch
        if action.kind == "F":
            self._forward(stage, micro_batch, part, losses, seed)
        elif action.kind == "W":
            self.queue.run((stage, micro_batch))
        else:
            self.queue.defer((stage, micro_batch) if action.kind == "I" else None)
            try:
                self._backward(stage, micro_batch)
            finally:
                self.queue.defer(None)

    # -- messages --------------------------------------------------------------------------------------------------

    def _send(self, link: Link, micro_batch: int, message: Any) -> None:
        if link in self.channels:
            self.channels[link].send(message, micro_batch)
        else:
            detached = [leaf for leaf in pytree.tree_leaves(message) if isinstance(leaf, torch.Tensor)]
            known = {id(leaf): leaf.detach().requires_grad_(leaf.requires_grad) for leaf in detached}
            self.local[link, micro_batch] = pytree.tree_map_only(torch.Tensor, lambda x: known[id(x)], message)

    def _receive(self, link: Link, micro_batch: int) -> Any:
        if link not in self.channels:
            return self.local.pop((link, micro_batch))
        message = self.channels[link].recv(micro_batch)
        if self.copies and link.direction == FORWARD:
            message = pytree.tree_map_only(
                torch.Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), message
            )
        return message

    # -- actions ---------------------------------------------------------------------------------------------------

    def _forward(self, stage: int, micro_batch: int, part: Any, losses: Losses | None, seed: int) -> None:
        payload: Payload = self._receive(Link(stage - 1, FORWARD), micro_batch) if stage > 0 else {}
        received = [leaf for leaf in pytree.tree_leaves(payload) if isinstance(leaf, torch.Tensor)]
        with torch.set_grad_enabled(self.trains):
            result = self.stages.run(stage, payload, lambda: self.call(part, self.has_targets), seed)
            if stage == self.stages.cut.num_stages - 1:
                if losses is None:
                    self.outputs[micro_batch] = result
                    return
                outputs = [losses.add(result, part)]
            else:
                self._send(Link(stage, FORWARD), micro_batch, result)
            if not self.trains:
                return
            if stage < self.stages.cut.num_stages - 1:
                outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                outputs = [leaf for leaf in outputs if leaf.requires_grad]
        inputs = [leaf for leaf in received if leaf.requires_grad]
        self.saved[stage, micro_batch] = Saved(inputs, outputs, len(received))

    def _backward(self, stage: int, micro_batch: int) -> None:
        saved = self.saved.pop((stage, micro_batch))
        if stage == self.stages.cut.num_stages - 1:
            grads: list[Any] = [None]
        else:
            grads = self._receive(Link(stage + 1, BACKWARD), micro_batch)
        pairs = [(y, dy) for y, dy in zip(saved.outputs, grads, strict=True) if dy is not None or y.dim() == 0]
        pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
        if pairs:
            outputs, dys = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, dys)
        if stage > 0:
            self._send(Link(stage, BACKWARD), micro_batch, [x.grad for x in saved.inputs])


def abort(group: dist.ProcessGroup, who: str, error: BaseException) -> None:
    """Ends every other rank's waits in `group`, where pypar serves it: they raise PeerError that says who raised
    what."""
    notes = "; ".join(getattr(error, "__notes__", []))
    reason = f"{who} raised {type(error).__name__}: {error}" + (f" ({notes})" if notes else "")
    served: Any = group._get_backend(device_of(group))
    served = getattr(served, "wrapped_pg", served)
    if hasattr(served, "end"):
        served.end(reason)
