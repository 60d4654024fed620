"""Reduces buckets while backward goes on, in the same order on every rank."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pypar import symmetric
from pypar.backend import uncompiled
from pypar.gradients.buckets import Bucket, Slot, assign

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Reducer:
    """Owns the buckets. `sync` says whether the next backward reduces or only accumulates (no_sync)."""

    what = "pypar.DataParallel"  # in messages

    def __init__(
        self,
        named_params: Sequence[tuple[str, torch.nn.Parameter]],
        group: dist.ProcessGroup,
        first_bytes: int,
        bucket_bytes: int,
        find_unused: bool,
        static_graph: bool,
    ):
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.first_bytes, self.bucket_bytes = first_bytes, bucket_bytes
        self.find_unused, self.static_graph = find_unused, static_graph
        self.slots = [Slot(index, name, param) for index, (name, param) in enumerate(named_params)]
        self.sync = True
        self.num_active: int | None = None  # ranks that still have inputs, where join() divides by that
        self.comm_hook: tuple[Any, Callable] | None = None
        self.learning = True  # until the first reduction: the order of readiness, and of a static graph the firings
        self.order: list[Slot] = []
        self.queued = False
        self.partial = False  # a backward within a backward ended before every gradient was there
        self.next = 0  # the bucket to launch next
        self.used_anywhere: list[bool] = []  # in the last reduction, by slot
        # pypar averages in one pass, in place, with one rounding from float32.
        self.native = symmetric.backend_name(group, self.slots[0].param.device) == "pypar"
        self.place(list(reversed(self.slots)))
        this = weakref.ref(self)  # so that nothing but the wrapper keeps the reducer and its hooks alive
        for slot in self.slots:
            slot.node.register_hook(_hook(this, slot.index))

    def place(self, order: Sequence[Slot]) -> None:
        plan = assign(order, self.first_bytes, self.bucket_bytes)
        self.buckets = [Bucket(n, n == len(plan) - 1, slots, self.group) for n, slots in enumerate(plan)]

    # -- during backward -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Has finish called at the end of this backward."""
        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.at_end)

    def begin_at(self, output: torch.Tensor) -> None:
        """Has begin called when a backward reaches `output`: by the outermost one, if checkpoints are reentrant."""
        this = weakref.ref(self)

        def hook(_grad: torch.Tensor) -> None:
            reducer = this()
            if reducer is not None and reducer.sync:
                reducer.begin()

        output.register_hook(hook)

    def arrived(self, slot: Slot) -> None:
        """The gradient of a parameter is complete, as far as this backward goes."""
        grad = slot.param.grad
        if grad is None:
            if not self.sync:
                return  # an undefined gradient: nothing to keep
            slot.view.zero_()
            slot.param.grad = slot.view
        elif not slot.is_home(grad):
            if grad.requires_grad:
                warnings.warn(
                    f"{self.what} averages gradients, not what create_graph=True makes of them: the second "
                    "derivative through param.grad stays local; use torch.autograd.grad for it",
                    stacklevel=2,
                )
            with torch.no_grad():
                slot.take(grad)
        slot.used = True
        if not self.sync:
            return
        self.begin()
        slot.fires += 1
        if self.learning and slot.fires == 1:
            self.order.append(slot)
        if self.learning and self.static_graph:
            return
        if slot.fires == slot.expected and slot.bucket is not None:
            slot.bucket.pending -= 1
            if slot.bucket.pending == 0:
                self.launch_ready()
        else:
            self._fired_too_often(slot)

    def launch_ready(self) -> None:
        while self.next < len(self.buckets) and self.buckets[self.next].pending == 0:
            with torch.no_grad():
                self.fill(self.buckets[self.next])
                self.launch(self.buckets[self.next])
            self.next += 1

    def fill(self, bucket: Bucket) -> None:
        """Contributes, for parameters that got no gradient in this backward, what param.grad holds, or zero."""
        for slot in bucket.slots:
            if slot.fires == 0:
                grad = slot.param.grad
                if grad is None:
                    slot.view.zero_()
                elif not slot.is_home(grad):
                    slot.take(grad)

    def launch(self, bucket: Bucket) -> None:
        if self.comm_hook is not None:
            state, hook = self.comm_hook
            bucket.work = hook(state, bucket)
            if not isinstance(bucket.work, torch._C.Future):
                raise TypeError(
                    "pypar.DataParallel: a communication hook returns a torch.futures.Future of one tensor, but "
                    f"'{getattr(hook, '__qualname__', hook)}' returned {type(bucket.work).__name__}"
                )
        elif self.world_size > 1:
            if self.native and self.num_active is None:
                op, tensor = dist.ReduceOp.AVG, bucket.flat
            else:
                op, tensor = dist.ReduceOp.SUM, bucket.flat
                if bucket.flat.dtype in LOW_PRECISION and not self.native:
                    # Other backends round after every addition.
                    tensor = bucket.scratch = bucket.flat.float()
            bucket.work = dist.all_reduce(tensor, op=op, group=self.group, async_op=True)

    def wait(self, bucket: Bucket) -> None:
        work, bucket.work = bucket.work, None
        scratch, bucket.scratch = bucket.scratch, None
        if work is None:
            return
        try:
            result = work.wait()
        except Exception as error:
            error.add_note(
                f"{self.what}, rank {self.rank} of {self.world_size}: reducing bucket {bucket.index() + 1} of "
                f"{len(self.buckets)}, {bucket.flat.numel()} x {bucket.flat.dtype}, gradients of {bucket.label}"
            )
            raise
        if self.comm_hook is not None:
            tensor = result[0] if isinstance(result, (list, tuple)) else result
            if tensor.data_ptr() != bucket.flat.data_ptr():
                bucket.flat.copy_(tensor.view_as(bucket.flat))
        elif scratch is not None:
            bucket.flat.copy_(scratch.div_(self.num_active or self.world_size))
        elif self.num_active is not None or not self.native:
            bucket.flat.div_(self.num_active or self.world_size)

    # -- at its end ------------------------------------------------------------------------------------------------

    def at_end(self) -> None:
        self.queued = False
        complete = self.next == len(self.buckets)
        if not complete and torch._C._current_autograd_node() is not None:
            self.partial = True  # the end of a reentrant checkpoint: the outer backward goes on
            return
        if not complete and not any(slot.fires for slot in self.slots):
            return  # torch.autograd.grad, which accumulates nothing
        try:
            if not complete:
                self.close()
            with torch.no_grad():
                self.reduce_and_learn()
        finally:
            self.reset()

    def close(self) -> None:
        """Launches the buckets that wait for gradients which will not come."""
        if not (self.learning if self.static_graph else self.find_unused):
            self._unfinished(self.missing())
        for bucket in self.buckets[self.next :]:
            bucket.pending = 0
        self.launch_ready()

    def missing(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.bucket is not None and slot.fires != slot.expected]

    def reduce_and_learn(self, joined: bool = False) -> None:
        used = None
        if self.find_unused or (self.learning and self.static_graph):
            used = torch.tensor([int(slot.used) for slot in self.slots], dtype=torch.int32)
            used = used.to(self.slots[0].param.device)
            self.add_up(used)
        for bucket in self.buckets:
            self.wait(bucket)
        used_anywhere = [True] * len(self.slots) if used is None else used.bool().tolist()
        self.used_anywhere = used_anywhere
        if not joined and (self.find_unused or self.static_graph):
            for slot in self.slots:
                if slot.bucket is not None and slot.param.grad is None and used_anywhere[slot.index]:
                    slot.param.grad = slot.view
        if self.learning:
            self.learn(used_anywhere)

    def add_up(self, counts: torch.Tensor) -> None:
        """Over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(counts, group=self.group)

    def learn(self, used_anywhere: Sequence[bool]) -> None:
        """Orders the buckets by the readiness that rank 0 saw; a static graph also leaves out what no rank used."""
        self.learning = False
        present = [slot for bucket in self.buckets for slot in bucket.slots]
        seen = {slot.index for slot in self.order}
        order = self.order + [slot for slot in present if slot.index not in seen]
        if self.world_size > 1:
            indices = torch.tensor([s.index for s in order], dtype=torch.int64, device=present[0].param.device)
            dist.broadcast(indices, group=self.group, group_src=0)
            order = [self.slots[n] for n in indices.tolist()]
        if self.static_graph:
            for slot in self.slots:
                slot.expected = slot.fires
                if not used_anywhere[slot.index]:
                    slot.bucket = None
            order = [slot for slot in order if used_anywhere[slot.index]]
        plan = assign(order, self.first_bytes, self.bucket_bytes)
        if [{s.index for s in slots} for slots in plan] != [{s.index for s in b.slots} for b in self.buckets]:
            self.place(order)
        self.order = []

    def reset(self) -> None:
        self.next, self.partial = 0, False
        for slot in self.slots:
            slot.fires, slot.used = 0, False
        for bucket in self.buckets:
            bucket.work = bucket.scratch = None
            # A slot that a static graph uses on other ranks only has nothing to wait for.
            bucket.pending = sum(slot.expected > 0 for slot in bucket.slots)

    @torch.no_grad()
    def reduce_now(self, buckets: Sequence[Any], ends: bool = True) -> None:
        """Reduces, outside of a backward, what param.grad holds by now. ends: nothing more comes in this step; each
        bucket was there once at least. Collective."""
        for bucket in buckets:
            for slot in bucket.slots:
                slot.used = slot.used or slot.param.grad is not None
            self.fill(bucket)
            self.launch(bucket)
            if not ends:
                self.wait(bucket)
        if ends:
            self.reduce_and_learn()
            self.reset()

    def shadow(self) -> None:
        """Takes part in a reduction of the other ranks with zeros: this rank has no inputs left (join)."""
        with torch.no_grad():
            for bucket in self.buckets:
                bucket.flat.zero_()
                self.launch(bucket)
            self.reduce_and_learn(joined=True)
        self.reset()

    # -- what can go wrong -----------------------------------------------------------------------------------------

    @uncompiled
    def check_idle(self) -> None:
        """Called before a forward pass: the backward before it must have come to its end, on the same parameters."""
        for slot in self.slots:
            # Autograd forgets the hooks of a parameter whose data is replaced by another type's.
            if slot.param.dtype != slot.view.dtype or slot.param.device != slot.view.device:
                raise RuntimeError(
                    f"{self.what}, rank {self.rank}: '{slot.name}' was {slot.view.dtype} on {slot.view.device} "
                    f"when it was wrapped and is {slot.param.dtype} on {slot.param.device}; convert the module first, "
                    "then wrap it"
                )
        if not (self.queued or self.partial) or torch._C._current_graph_task_id() != -1:
            return
        launched, missing, partial = self.next, self.missing(), self.partial
        self.queued = False
        self.reset()
        if launched or partial:  # else this rank is in step with the others, and the next backward starts afresh
            raise RuntimeError(
                f"{self.what}, rank {self.rank}: the previous backward pass did not reach its end (it raised, "
                f"or ran in parts): {launched} of {len(self.buckets)} buckets were reduced, {len(missing)} gradients "
                f"did not arrive{_names(missing)}. The ranks may be out of step: restart the job, or, if activation "
                "checkpointing is on, use checkpoint(..., use_reentrant=False) or static_graph=True"
            )

    def _unfinished(self, missing: Sequence[Slot]) -> None:
        if self.static_graph:
            raise RuntimeError(
                f"{self.what}, rank {self.rank}: static_graph=True, but {len(missing)} parameters that the "
                f"first iteration used got no gradient{_names(missing)}; use find_unused_parameters=True instead"
            )
        raise RuntimeError(
            f"{self.what}, rank {self.rank}: {len(missing)} of {len(self.slots)} parameters got no gradient in "
            f"this backward{_names(missing)}. Every rank waits for them: pass find_unused_parameters=True, or freeze "
            "them (requires_grad=False) before wrapping, or make the loss depend on them"
        )

    def _fired_too_often(self, slot: Slot) -> None:
        if slot.fires < slot.expected:
            return
        if self.static_graph:
            raise RuntimeError(
                f"{self.what}, rank {self.rank}: static_graph=True, but '{slot.name}' got gradient number "
                f"{slot.fires} of this backward where the first iteration had {slot.expected}; use static_graph=False"
            )
        raise RuntimeError(
            f"{self.what}, rank {self.rank}: '{slot.name}' got a second gradient in one backward, after it was "
            "counted as complete. This happens when one layer lies in several reentrant checkpoints: use "
            "checkpoint(..., use_reentrant=False) or static_graph=True"
        )


def _hook(this: weakref.ref[Reducer], index: int) -> Callable[[Any, Any], None]:
    def hook(_inputs: Any, _outputs: Any) -> None:
        reducer = this()
        if reducer is not None:
            reducer.arrived(reducer.slots[index])

    return hook


def _names(slots: Sequence[Slot], limit: int = 10) -> str:
    if not slots:
        return ""
    more = f" and {len(slots) - limit} more" if len(slots) > limit else ""
    return ": " + ", ".join(f"'{slot.name}'" for slot in slots[:limit]) + more
