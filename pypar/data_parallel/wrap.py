"""DataParallel: the module that users see."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.utils import _pytree as pytree

from pypar.backend import uncompiled
from pypar.gradients.linear import fuse_all
from pypar.gradients.reducer import Reducer

BROADCAST_BYTES = 250 * 2**20  # of the coalesced copies of parameters and buffers


class DataParallel(nn.Module, Joinable):
    """Averages the gradients of `module` over the ranks of `group` while backward computes them.

    The semantics, the bucketing and the state_dict keys ("module.") are those of torch's DistributedDataParallel.
    Every param.grad is a view of a bucket, a flat tensor that with the process group "pypar" lies in symmetric memory
    and is reduced where it lies; the weight gradients of plain nn.Linear layers are computed straight into it.

    module                  with its parameters on one kind of device; parameters are not added or converted afterwards
    group                   the ranks that share the gradients; default all
    bucket_size_mb          a bucket is closed when it has grown to this many MiB
    first_bucket_size_mb    the same for the first one, so that reducing starts early
    static_graph            the same parameters are used, equally often, in every iteration: learned in the first one.
                            Allows unused parameters and reentrant checkpoints at no cost
    find_unused_parameters  parameters may get no gradient in some iterations, on some ranks. They count as zero where
                            another rank uses them, and keep their grad where none does. Costs one small all_reduce
    broadcast_buffers       rank 0's buffers go to all ranks, at the start and before each forward pass
    check_parameters        names, shapes, dtypes and strides are compared over the ranks at the start
    init_sync               rank 0's parameters and buffers go to all ranks at the start
    fuse_linear_grads       False computes the gradients of nn.Linear as elsewhere and copies them into the bucket

    Several backward passes without zero_grad add up, each averaged over the ranks; under no_sync() they add up locally
    until the next one outside it. The forward pass decides: both it and its backward belong inside no_sync().
    Raises ValueError for a module or group that cannot be wrapped; RuntimeError, from backward, when a parameter that
    every rank waits for got no gradient; whatever the process group raises, from backward as well.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup | None = None,
        *,
        bucket_size_mb: float = 25,
        first_bucket_size_mb: float = 1,
        static_graph: bool = False,
        find_unused_parameters: bool = False,
        broadcast_buffers: bool = True,
        check_parameters: bool = True,
        init_sync: bool = True,
        fuse_linear_grads: bool = True,
    ):
        super().__init__()
        Joinable.__init__(self)
        for name, size in (("bucket_size_mb", bucket_size_mb), ("first_bucket_size_mb", first_bucket_size_mb)):
            if not size > 0:
                raise ValueError(f"pypar.DataParallel: {name} must be above 0, got {size}")
        if group is None:
            if not dist.is_initialized():
                raise ValueError("pypar.DataParallel: no process group; call pypar.init() first, or pass group=")
            group = dist.group.WORLD
        assert group is not None
        if dist.get_rank(group) < 0:
            raise ValueError(f"pypar.DataParallel: rank {dist.get_rank()} of the job is not in the given group")
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.module = module
        self.static_graph, self.find_unused_parameters = static_graph, find_unused_parameters
        self.broadcast_buffers = broadcast_buffers
        self._ignored = frozenset(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        named = self._trainable()
        self.device = named[0][1].device
        self.require_backward_grad_sync = True
        self._sync_buffers_next = True
        self._divide_by_initial_world_size = True
        self._has_buffers = any(True for _ in self._named_buffers())
        if check_parameters and self.world_size > 1:
            self._check_same_on_all_ranks()
        if init_sync:
            self._broadcast_state(0)
        first, size = (int(mb * 2**20) for mb in (first_bucket_size_mb, bucket_size_mb))
        self._reducer = Reducer(named, group, first, size, find_unused_parameters, static_graph)
        if fuse_linear_grads:
            fuse_all(module, self._reducer.slots)

    # -- training --------------------------------------------------------------------------------------------------

    @uncompiled(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        grad_enabled = torch.is_grad_enabled()
        if grad_enabled:
            self._reducer.check_idle()
        if self._join_config.enable:
            Join.notify_join_context(self)
        if self.broadcast_buffers and self._has_buffers and self._sync_buffers_next:
            self._broadcast_buffers()
        if self._join_config.enable:
            self._agree_with_joined(is_joined=False)
        self._sync_buffers_next = grad_enabled and self.require_backward_grad_sync
        if grad_enabled:
            self._reducer.sync = self.require_backward_grad_sync
        output = self.module(*args, **kwargs)
        if self._sync_buffers_next and (self.find_unused_parameters or self.static_graph):
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    self._reducer.begin_at(tensor)
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes whose forward pass ran in here only add up locally."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    def register_comm_hook(self, state: Any, hook: Callable[[Any, Any], torch.futures.Future]) -> None:
        """hook(state, bucket) replaces the average; as DistributedDataParallel.register_comm_hook, and its ready-made
        hooks serve. The bucket has GradBucket's methods. The hook divides by the world size itself.
        """
        if not callable(hook):
            raise TypeError(f"pypar.DataParallel: a communication hook is callable, got {type(hook).__name__}")
        if self._reducer.comm_hook is not None:
            raise RuntimeError("pypar.DataParallel: a communication hook is registered already, and there is only one")
        self._reducer.comm_hook = (state, hook)

    def __getstate__(self) -> Any:
        raise TypeError("pypar.DataParallel holds a process group and is not copied or pickled; use its .module")

    # -- uneven inputs ---------------------------------------------------------------------------------------------

    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Join:
        """Context in which ranks may have different numbers of batches; as DistributedDataParallel.join."""
        return Join(
            [self],
            enable,
            throw_on_early_termination,
            divide_by_initial_world_size=divide_by_initial_world_size,
        )

    def join_hook(self, **kwargs: Any) -> JoinHook:
        return _JoinHook(self, kwargs.get("divide_by_initial_world_size", True))

    @property
    def join_device(self) -> torch.device:
        return self.device

    @property
    def join_process_group(self) -> dist.ProcessGroup:
        return self.group

    def _agree_with_joined(self, is_joined: bool) -> bool:
        """Tells all ranks how many of them still have inputs; returns whether those reduce in this iteration."""
        sync = not is_joined and self.require_backward_grad_sync
        counts = torch.tensor([float(sync), float(not is_joined)], device=self.device)
        dist.all_reduce(counts, group=self.group)
        num_syncing, num_active = counts.tolist()
        self._reducer.num_active = None if self._divide_by_initial_world_size else int(num_active)
        return num_syncing > 0

    def _common_rank(self, candidate: bool) -> int:
        """The largest rank that is a candidate."""
        rank = torch.tensor([self.rank if candidate else -1], device=self.device)
        dist.all_reduce(rank, op=dist.ReduceOp.MAX, group=self.group)
        return int(rank.item())

    # -- state that is the same on all ranks -------------------------------------------------------------------------

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.module.named_parameters() if n not in self._ignored)

    def _named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((n, b) for n, b in self.module.named_buffers() if n not in self._ignored)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        named = list(self._named_parameters())
        for name, param in named:
            if isinstance(param, nn.parameter.UninitializedParameter):
                raise ValueError(
                    f"pypar.DataParallel: '{name}' is not initialized; run one forward pass before wrapping the module"
                )
            if param.device.type == "meta":
                raise ValueError(f"pypar.DataParallel: '{name}' is on the meta device; materialize the module first")
        trainable = [(name, param) for name, param in named if param.requires_grad]
        if not trainable:
            raise ValueError(
                f"pypar.DataParallel: none of the {len(named)} parameters of {type(self.module).__name__} requires a "
                "gradient, so there is nothing to average; use the module as it is, or unfreeze a parameter"
            )
        kinds = {param.device.type: name for name, param in reversed(trainable)}
        if len(kinds) > 1:
            found = ", ".join(f"'{name}' on {kind}" for kind, name in sorted(kinds.items()))
            raise ValueError(f"pypar.DataParallel: parameters on one kind of device are needed, found {found}")
        for name, submodule in self.module.named_modules():
            if isinstance(submodule, (nn.Embedding, nn.EmbeddingBag)) and submodule.sparse:
                raise ValueError(
                    f"pypar.DataParallel: '{name}' makes sparse gradients, and only dense ones are averaged; build it "
                    "with sparse=False"
                )
        return trainable

    def _describe(self) -> list[tuple[str, str]]:
        """What must agree, as (what, value)."""
        parameters = [
            (
                f"parameter '{n}'",
                f"{p.dtype} {list(p.shape)} strides {list(p.stride())} requires_grad={p.requires_grad}",
            )
            for n, p in self._named_parameters()
        ]
        buffers = [(f"buffer '{n}'", f"{b.dtype} {list(b.shape)}") for n, b in self._named_buffers()]
        return parameters + (buffers if self.broadcast_buffers else [])

    def _check_same_on_all_ranks(self) -> None:
        mine = self._describe()
        digests: list[Any] = [None] * self.world_size
        dist.all_gather_object(digests, hashlib.sha256(repr(mine).encode()).hexdigest(), group=self.group)
        if len(set(digests)) == 1:
            return
        described: list[Any] = [None] * self.world_size
        dist.all_gather_object(described, mine, group=self.group)
        raise ValueError(
            "pypar.DataParallel: the ranks hold different modules: "
            + _first_difference(described)
            + f"; build the same module on every rank (this is rank {self.rank} of {self.world_size})"
        )

    def _broadcast_state(self, source: int) -> None:
        tensors = [param.detach() for _, param in self._named_parameters()]
        if self.broadcast_buffers:
            tensors += [buffer.detach() for _, buffer in self._named_buffers()]
        self._broadcast(tensors, source)

    def _broadcast_buffers(self) -> None:
        source = self._common_rank(True) if self._join_config.enable else 0
        buffers = [buffer.detach() for _, buffer in self._named_buffers()]
        # A buffer saved for backward still holds what forward saw, as far as the model is concerned.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(buffers)):
            self._broadcast(buffers, source)

    def _broadcast(self, tensors: list[torch.Tensor], source: int) -> None:
        if self.world_size > 1 and tensors:
            dist._broadcast_coalesced(self.group, tensors, BROADCAST_BYTES, source)


class _JoinHook(JoinHook):
    """What a rank without inputs does: the others' collective calls, with zeros."""

    def __init__(self, wrapper: DataParallel, divide_by_initial_world_size: bool):
        self.wrapper = wrapper
        wrapper._divide_by_initial_world_size = divide_by_initial_world_size

    def main_hook(self) -> None:
        wrapper = self.wrapper
        if wrapper.broadcast_buffers and wrapper._has_buffers and wrapper._sync_buffers_next:
            wrapper._broadcast([b.detach() for _, b in wrapper._named_buffers()], wrapper._common_rank(False))
        wrapper._sync_buffers_next = wrapper._agree_with_joined(is_joined=True)
        if wrapper._sync_buffers_next:
            wrapper._reducer.shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        wrapper = self.wrapper
        wrapper._broadcast_state(wrapper._common_rank(is_last_joiner))
        wrapper._reducer.num_active, wrapper._divide_by_initial_world_size = None, True


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in a forward pass's result: in tuples, lists, dicts and dataclasses."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def _first_difference(described: list[list[tuple[str, str]]]) -> str:
    for rank, theirs in enumerate(described):
        for n in range(max(len(theirs), len(described[0]))):
            ours, other = (x[n] if n < len(x) else None for x in (described[0], theirs))
            if ours == other:
                continue
            if ours is not None and other is not None and ours[0] == other[0]:
                return f"{ours[0]} is {ours[1]} on rank 0, {other[1]} on rank {rank}"
            first, second = ("missing" if x is None else f"{x[0]} ({x[1]})" for x in (ours, other))
            return f"number {n} in order of registration is {first} on rank 0, {second} on rank {rank}"
    raise AssertionError("the digests differ, the descriptions do not")
