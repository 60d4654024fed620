"""Gradients of a unit, reduced to shards while backward goes on with the units before it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pypar import ops, symmetric
from pypar.gradients.buckets import Slot
from pypar.gradients.reducer import Reducer
from pypar.ops.gpu.reach import reachable
from pypar.ops.gpu.run import cuda_kernels
from pypar.zero.flat import FlatParameters

MEMORIES = 3  # of units' gradients at a time, at stages 2 and 3: one that fills up, one that is reduced, one to spare


class UnitBucket:
    """The gradients of one unit: full ones while backward makes them, this rank's shard of their mean afterwards."""

    def __init__(self, index: int, flat: FlatParameters, slots: Sequence[Slot]):
        self._index, self.parameters, self.slots = index, flat, list(slots)
        self.pending = len(self.slots)
        self.work: Any = None
        self.memory: torch.Tensor | None = None
        self.flat: torch.Tensor | None = None  # [numel] of `memory`: this rank's gradients
        begin, end = flat.layout.shard(flat.rank)
        # What zero_scatter takes is summed and kept in float32.
        self.is_wide = flat.dtype in (torch.float32, torch.bfloat16, torch.float16)
        dtype = torch.float32 if self.is_wide else flat.dtype
        self.unscaled = torch.zeros(end - begin, dtype=dtype, device=flat.device)
        self.factor = 1.0  # of `unscaled`
        self.squares: torch.Tensor | None = None  # the sum of the shard's, where it is known
        self.has_shard = False  # since zero_grad
        self.sum: torch.Tensor | None = None  # on its way: of the full gradients, or of the replicas' shards
        self.sums_shard = False
        self.adds = False  # to what the shard holds
        self.is_due = False  # to be reduced at the end of backward

    @property
    def shard(self) -> torch.Tensor:
        """This rank's part of the mean gradient, clipped where it was. zero_step applies the factor in the pass that it
        makes anyway; here it costs one."""
        if self.factor != 1.0:
            self.unscaled.mul_(self.factor)
            self.factor = 1.0
        return self.unscaled

    def scale(self, factor: float) -> None:
        self.factor *= factor
        self.squares = None if self.squares is None else self.squares * factor**2

    def index(self) -> int:
        return self._index

    @property
    def label(self) -> str:
        return f"unit '{self.parameters.unit or 'root'}'"

    def take(self, memory: torch.Tensor) -> None:
        """Uses `memory` for the full gradients."""
        self.memory, self.flat = memory, memory[: self.parameters.layout.numel]
        for begin, end in self.parameters.layout.gaps():  # reduced too, and may hold another unit's gradients
            self.flat[begin:end].zero_()
        for slot, view in zip(self.slots, self.parameters.views(self.flat), strict=True):
            slot.bucket, slot.view, slot.ptr = self, view, view.data_ptr()  # type: ignore[assignment]

    def drop(self) -> torch.Tensor:
        """The memory, for another unit."""
        memory, self.memory, self.flat = self.memory, None, None
        assert memory is not None
        for slot in self.slots:
            slot.param.grad = None
            slot.view, slot.ptr = memory[:0], 0
        return memory


class ShardReducer(Reducer):
    """keeps_full: the full gradients stay in param.grad (stage 1); else they live for the time of a unit's backward.
    replicas: the ranks that hold the same shards as this one, if there are others."""

    what = "pypar.Zero"
    buckets: list[UnitBucket]  # type: ignore[assignment]

    def __init__(
        self,
        flats: Sequence[FlatParameters],
        group: dist.ProcessGroup,
        keeps_full: bool,
        find_unused: bool,
        replicas: dist.ProcessGroup | None = None,
    ):
        self.flats, self.keeps_full, self.replicas = list(flats), keeps_full, replicas
        self.num_ranks = dist.get_world_size(group) * (1 if replicas is None else dist.get_world_size(replicas))
        self.memories: dict[torch.dtype, list[torch.Tensor]] = {}
        self.has_gradient: set[int] = set()  # indices of the slots that got one on some rank, since zero_grad
        named = [(n, p) for flat in flats for n, p in zip(flat.names, flat.parameters, strict=True)]
        super().__init__(named, group, 0, 0, find_unused, static_graph=False)
        device = self.slots[0].param.device
        self.in_place = symmetric.shares_memory(group, device)
        # On a GPU: where the kernel reaches the peers' gradients. Elsewhere a sum of copies is less traffic.
        self.scatters = device.type == "cpu" or (cuda_kernels("zero_scatter") is not None and reachable(group, device))
        if not keeps_full:
            this = weakref.ref(self)
            for slot in self.slots:
                slot.prepare = _prepare(this)

    def place(self, order: Sequence[Slot]) -> None:
        """Units in the reverse of the order of registration, which is about the order in which they fill up."""
        by_param = {id(slot.param): slot for slot in self.slots}
        self.buckets = [
            UnitBucket(n, flat, [by_param[id(p)] for p in flat.parameters])
            for n, flat in enumerate(reversed(self.flats))
        ]
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.bucket = bucket  # type: ignore[assignment]
                slot.view = torch.empty(0, dtype=bucket.parameters.dtype, device=bucket.parameters.device)
        if self.keeps_full:
            for bucket in self.buckets:
                bucket.take(self._memory(bucket.parameters, bucket.parameters.layout.numel))
        else:
            largest: dict[torch.dtype, FlatParameters] = {}
            for flat in self.flats:
                if flat.dtype not in largest or flat.layout.numel > largest[flat.dtype].layout.numel:
                    largest[flat.dtype] = flat
            for dtype, flat in largest.items():
                count = min(MEMORIES, sum(f.dtype == dtype for f in self.flats))
                self.memories[dtype] = [self._memory(flat, flat.layout.numel) for _ in range(count)]
        self.pooled = {memory.data_ptr() for memories in self.memories.values() for memory in memories}

    def _memory(self, flat: FlatParameters, numel: int) -> torch.Tensor:
        return symmetric.empty(numel, flat.dtype, self.group, flat.device)

    def acquire(self, bucket: UnitBucket) -> None:
        free = self.memories[bucket.parameters.dtype]
        if not free:
            dtype = bucket.parameters.dtype
            holders = (b for b in self.buckets if b.work is not None and b.flat is not None)
            oldest = next((b for b in holders if b.parameters.dtype == dtype), None)
            if oldest is None:  # they all hold gradients, and wait for a unit before them that this rank does not use
                flat = bucket.parameters
                return bucket.take(torch.empty(flat.layout.numel, dtype=flat.dtype, device=flat.device))
            self.wait(oldest)
        bucket.take(free.pop(0))

    def prepare(self, slot: Slot) -> bool:
        """Before a gradient is produced in its slot: no, where it only adds up in an ordinary param.grad."""
        if self.sync and slot.bucket is not None and slot.bucket.flat is None:
            self.acquire(slot.bucket)  # type: ignore[arg-type]
        return self.sync

    # -- during backward -------------------------------------------------------------------------------------------

    def arrived(self, slot: Slot) -> None:
        if not self.keeps_full:
            if not self.sync:
                slot.used = True
                return  # adds up in an ordinary param.grad, until a backward that reduces
            self.prepare(slot)
        super().arrived(slot)

    def fill(self, bucket: Any) -> None:
        if bucket.flat is None:
            self.acquire(bucket)
        super().fill(bucket)

    def launch(self, bucket: Any) -> None:
        # What stays is summed in one go at the end, so that a rank that is late in one unit and early in the next holds
        # up nobody. A sum of copies travels while backward goes on, and is started here.
        bucket.is_due = self.keeps_full and bucket.is_wide and self.in_place
        if not bucket.is_due:
            self.start(bucket)

    def start(self, bucket: UnitBucket) -> None:
        flat, tensor = bucket.parameters, bucket.flat
        assert tensor is not None
        adds = bucket.has_shard and not self.keeps_full
        if bucket.is_wide and self.scatters:
            part = bucket.shard if self.replicas is None else torch.empty_like(bucket.shard)
            bucket.squares = ops.zero_scatter(
                part,
                tensor,
                flat.layout.shard_sizes(),
                self.group,
                scale=1 / self.num_ranks,
                accumulate=adds and self.replicas is None,
            )
            self.done(bucket)
            if self.replicas is not None:
                bucket.adds, bucket.sum, bucket.sums_shard = adds, part, True
                bucket.work = dist.all_reduce(part, group=self.replicas, async_op=True)
            return
        bucket.adds, bucket.sum, bucket.sums_shard = adds, tensor.clone(), False  # this rank's own stay what they are
        bucket.work = dist.all_reduce(bucket.sum, group=self.group, async_op=True)

    def wait(self, bucket: Any) -> None:
        if bucket.is_due:
            bucket.is_due = False
            self.start(bucket)
        work, bucket.work = bucket.work, None
        total, bucket.sum = bucket.sum, None
        if work is None:
            return
        try:
            work.wait()
            if not bucket.sums_shard:
                begin, end = bucket.parameters.layout.shard(self.rank)
                total = total[begin:end]
                if self.replicas is not None:
                    dist.all_reduce(total, group=self.replicas)
                total.div_(self.num_ranks)
        except Exception as error:
            error.add_note(
                f"pypar.Zero, rank {self.rank} of {self.world_size}: reducing the gradients of {bucket.label}, "
                f"{bucket.parameters.layout.numel} x {bucket.parameters.dtype}"
            )
            raise
        bucket.shard.copy_(bucket.shard + total if bucket.adds else total)
        bucket.squares = None
        if not bucket.sums_shard:
            self.done(bucket)

    def done(self, bucket: UnitBucket) -> None:
        """Its shard is there; the memory of its full gradients can go."""
        bucket.has_shard = True
        if not self.keeps_full:
            memory = bucket.drop()
            if memory.data_ptr() in self.pooled:
                self.memories[bucket.parameters.dtype].append(memory)

    def reset(self) -> None:
        super().reset()
        for bucket in self.buckets:
            bucket.is_due = False

    def add_up(self, counts: torch.Tensor) -> None:
        super().add_up(counts)
        if self.replicas is not None:
            dist.all_reduce(counts, group=self.replicas)

    def reduce_and_learn(self, joined: bool = False) -> None:
        super().reduce_and_learn(joined=joined or not self.keeps_full)
        self.has_gradient |= {i for i, used in enumerate(self.used_anywhere) if used}

    def learn(self, used_anywhere: Sequence[bool]) -> None:
        self.learning, self.order = False, []  # units stay as they are

    def zero_grad(self) -> None:
        self.has_gradient = set()
        for bucket in self.buckets:
            bucket.has_shard, bucket.factor = False, 1.0
            for slot in bucket.slots:
                slot.param.grad = None


def _prepare(this: weakref.ref[ShardReducer]) -> Callable[[Slot], bool]:
    def prepare(slot: Slot) -> bool:
        reducer = this()
        return reducer is not None and reducer.prepare(slot)

    return prepare
