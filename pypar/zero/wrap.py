"""Zero: the module that users see."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from pypar.backend import uncompiled
from pypar.gradients.linear import fuse_all
from pypar.zero import checkpoint
from pypar.zero.flat import FlatParameters
from pypar.zero.freed import free, restore
from pypar.zero.gather import Gatherer
from pypar.zero.guards import Watch, check_module, refuse_state_dicts
from pypar.zero.hosts import Hosts
from pypar.zero.materialize import Init, Materializer, Values, needs_memory
from pypar.zero.offload import Offload
from pypar.zero.optimizer import ShardedOptimizer
from pypar.zero.reducer import ShardReducer
from pypar.zero.replicas import groups_of
from pypar.zero.units import Rule, Unit, units_of

BROADCAST_BYTES = 250 * 2**20


class Zero(nn.Module):
    """Data parallel whose ranks share out what they would all hold: ZeRO, stages 1 to 3.

    Every rank feeds its share of the batch, as with DataParallel; gradients are averaged over the ranks. Each rank owns
    a shard of every unit (a transformer block, say), and keeps:

    stage 1   of the optimizer's states its shard
    stage 2   and of the gradients; a unit's full gradients live from its backward to its reduction
    stage 3   and of the parameters

    Where the ranks share memory (one host, process group "pypar"), the parameters exist once for all of them at every
    stage, so that nothing is gathered, and stage 3 is stage 2. Between hosts a unit is gathered before it computes,
    while the unit before it does, and freed after: at most two are whole at a time, besides the parameters outside of
    any unit. The ranks of a host share one copy, and each brings a part of it, where "pypar" serves the group and hosts
    have equal numbers of ranks. Parameters that are not whole have no values: what needs them raises RuntimeError.

    module      the full model; rank 0's values count
    group       the ranks; default all. Or a DeviceMesh of two dims, (replicate, shard), for hybrid sharding: see there
    replicate_group
                hybrid sharding: the ranks that hold the same shards as this one, one of every sharding group. They add
                their gradients after those were reduced to shards, so that between hosts (replicate) travel 1/N of the
                gradients, N ranks to a host (shard), and no parameters
    optimizer   a class of torch.optim that works element by element, whose settings are the further keyword arguments;
                or an optimizer over the module's parameters, whose class, groups, settings and state are taken over
    param_dtype torch.bfloat16 or float16: parameters, activations and full gradients are of that type, while gradients
                are summed and stepped in float32, on float32 shards of the weights. Floating inputs are cast
    units       see pypar.zero.units.units_of
    init        of parameters and buffers that are on the meta device ("reset_parameters", a function that gets each
                module, or a state dict of full tensors), a unit at a time, so that no rank ever holds the whole module:
                see pypar.zero.materialize.Materializer. Default: the module's _init_weights, else reset_parameters
    find_unused_parameters, fuse_linear_grads
                as DataParallel's
    offload     a folder, or a path to which the rank's number is added: offload_ratio of the optimizer's states and of
                the float32 masters lie there, in a memory-mapped file of each rank; the same results. The file has no
                name while it is used and is gone at the end, unless offload_keep

    model.optimizer has step, zero_grad, clip_grad_norm_, param_groups, state_dict, full_state. After backward,
    param.grad holds this rank's own gradients at stage 1, nothing at stages 2 and 3.
    Raises ValueError for what can't be wrapped; RuntimeError for parameters that were moved behind its back; PeerError.
    Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (2020).
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        stage: int = 3,
        replicate_group: dist.ProcessGroup | None = None,
        optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer = torch.optim.AdamW,
        units: Rule = "auto",
        init: Init | None = None,
        param_dtype: torch.dtype | None = None,
        find_unused_parameters: bool = False,
        fuse_linear_grads: bool = True,
        offload: str | os.PathLike[str] | None = None,
        offload_ratio: float = 1.0,
        offload_keep: bool = False,
        **settings: Any,
    ):
        super().__init__()
        if stage not in (1, 2, 3):
            raise ValueError(f"pypar.Zero: stage={stage!r}; there are 1 (optimizer), 2 (gradients), 3 (parameters)")
        if param_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"pypar.Zero: param_dtype={param_dtype}; give torch.bfloat16, float16, float32 or None")
        group, self.replicate_group = groups_of(group, replicate_group)
        self.module, self.group, self.stage, self.param_dtype = module, group, stage, param_dtype
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.require_backward_grad_sync = True
        make, groups, defaults = _optimizer_of(module, optimizer, settings)
        check_module(module, groups, group)
        trainable = {id(p) for each in groups for p in each["params"]}
        hosts = Hosts.of(group)
        self._gatherer = Gatherer(hosts.settle if hosts is not None else None)
        found, was_meta = units_of(module, units), needs_memory(module)
        flats_of: dict[int, list[FlatParameters]] = {}
        for unit in self._units_with_values(found, was_meta, init):
            flats = list(_flats(unit, group, trainable, stage < 3, param_dtype, hosts))
            flats_of[id(unit)] = flats
            if was_meta:
                for flat in flats:
                    flat.free()
                if hosts is not None:
                    hosts.settle()
        if self.world_size > 1:
            dist.barrier(group=group)  # every shard is in its place
        self._flats = [flat for unit in found for flat in flats_of[id(unit)]]
        for unit in found:
            if not all(flat.stays for flat in flats_of[id(unit)]):
                self._gatherer.add(flats_of[id(unit)], unit.module, stays=unit.module is module)
                refuse_state_dicts(unit.module, flats_of[id(unit)])
        trained = [flat for flat in self._flats if id(flat.parameters[0]) in trainable]
        with _shapes_of_freed(trained):
            self._reducer = ShardReducer(trained, group, stage == 1, find_unused_parameters, self.replicate_group)
        if fuse_linear_grads:
            fuse_all(module, self._reducer.slots)
        self._watch = Watch(module, self.rank)
        file = None if offload is None else Offload(offload, offload_ratio, offload_keep, group)
        if file is not None:
            file.take_masters(trained)
        self.optimizer = ShardedOptimizer(make, groups, trained, self._reducer, defaults, file)
        if isinstance(optimizer, torch.optim.Optimizer) and optimizer.state:
            names = {id(p): n for flat in trained for n, p in zip(flat.names, flat.parameters, strict=True)}
            self.optimizer.load_full_state({names[id(p)]: _tensors(s) for p, s in optimizer.state.items()})
        self._gatherer.finish()

    @uncompiled(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self._reducer.check_idle()
            self._watch.check()
            for flat in self._flats:
                flat.check()
        if self.param_dtype is not None:
            args, kwargs = pytree.tree_map(self._cast, (args, kwargs))
        with self._gatherer.passing():
            output = self.module(*args, **kwargs)
        if torch.is_grad_enabled():
            self._reducer.sync = self.require_backward_grad_sync
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                    self._gatherer.watch(leaf)
                    if self._reducer.sync:
                        self._reducer.begin_at(leaf)
        return output

    def _cast(self, value: Any) -> Any:
        return value.to(self.param_dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes whose forward pass ran in here only add up locally."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    @contextmanager
    def full_params(self) -> Iterator[None]:
        """Within the block every parameter is whole on every rank; what the block changes in place, on every rank
        alike, is kept. Collective.

        Ranks that share memory share the parameters: what they all do there must not depend on what is there (copy_,
        zero_), or one rank of each host does it alone (mul_ on two ranks of a host multiplies twice)."""
        with self._gatherer.keeping():
            yield
        if self.world_size > 1:
            dist.barrier(group=self.group)
        with torch.no_grad():
            for flat in self._flats:
                flat.keep()
        self._free()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block the parameters are there on every rank, for passes that don't go through this module's
        forward. Collective where they come and go."""
        self._watch.check()
        with self._gatherer.keeping():
            yield
        self._free()

    def _free(self) -> None:
        """What is whole, where parameters come and go."""
        self._gatherer.finish()

    def full_state_dict(self, dst: int | None = None) -> dict[str, Any]:
        """{"model": as the plain module's state_dict, "optimizer": {"state": {name: {key: tensor}}, "param_groups"}} of
        full tensors, copies, on every rank, or on rank dst alone, and {} elsewhere. Unit by unit. Collective."""
        return checkpoint.full_state_dict(self, dst)

    def load_full_state_dict(self, state: dict[str, Any] | None, src: int | None = None) -> None:
        """Takes what full_state_dict() gave, under any number of ranks and stage; "optimizer" may be absent.
        Collective.

        src: the rank that has it, from which each unit travels by itself; None: every rank has it.
        Raises ValueError for a name or a shape that isn't the module's."""
        checkpoint.load_full_state_dict(self, state, src)

    def sharded_state_dict(self) -> dict[str, Any]:
        """As full_state_dict, of what this rank holds: pypar.zero.ShardTensor, which torch.distributed.checkpoint saves
        as full tensors in parts. No copies. Collective."""
        return checkpoint.sharded_state_dict(self)

    def save_sharded(self, folder: str | os.PathLike[str]) -> None:
        """sharded_state_dict() through torch.distributed.checkpoint: each rank writes its part. Collective."""
        checkpoint.save_sharded(self, folder)

    def load_sharded(self, folder: str | os.PathLike[str]) -> None:
        """What save_sharded wrote, under any number of ranks and any stage; each rank reads its part. Collective.

        Raises ValueError for a parameter that the checkpoint lacks."""
        checkpoint.load_sharded(self, folder)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """nn.Module's, of full tensors on every rank. Collective."""
        if assign:
            raise ValueError("pypar.Zero: assign=True would take the parameters from where ZeRO keeps them")
        with self.full_params():
            return super().load_state_dict(state_dict, strict)

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """{name of a parameter that got one: the mean gradient over the ranks}, on every rank. Collective."""
        found: dict[str, torch.Tensor] = {}
        index = {slot.name: slot.index for slot in self._reducer.slots}
        for bucket in self._reducer.buckets:
            flat = bucket.parameters
            if bucket.has_shard:
                for name, view in zip(flat.names, flat.views(flat.join(bucket.shard)), strict=True):
                    if index[name] in self._reducer.has_gradient:
                        found[name] = view.clone()
        return found

    def _units_with_values(self, units: list[Unit], is_meta: bool, init: Init | None) -> Iterator[Unit]:
        """Each unit, when its parameters are there, with rank 0's values; on every rank in the same order."""
        if is_meta or isinstance(init, (Mapping, Values)):
            values = init if isinstance(init, Values) else Materializer(self.module, self._groups(), init)
            yield from values.run(units)
            return
        if init is not None:
            raise ValueError("pypar.Zero: init= is for parameters on the meta device, and none is; leave it out")
        self._broadcast_state()
        yield from units

    def _broadcast_state(self) -> None:
        tensors = [t.detach() for t in (*self.module.parameters(), *self.module.buffers())]
        for group in self._groups():
            if tensors:
                dist._broadcast_coalesced(group, tensors, BROADCAST_BYTES, 0)

    def _groups(self) -> list[dist.ProcessGroup]:
        """In which rank 0's values go to every rank: to rank 0 of every sharding group, and on from there."""
        return [g for g in (self.replicate_group, self.group) if g is not None and dist.get_world_size(g) > 1]


def _flats(
    unit: Unit,
    group: dist.ProcessGroup,
    trainable: set[int],
    stays: bool,
    dtype: torch.dtype | None,
    hosts: Hosts | None,
) -> Iterator[FlatParameters]:
    kinds: dict[tuple[torch.dtype, torch.device, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in zip(unit.names, unit.parameters, strict=True):
        kinds.setdefault((parameter.dtype, parameter.device, id(parameter) in trainable), []).append((name, parameter))
    for (given, _, _), named in kinds.items():
        names, parameters = zip(*named, strict=True)
        wanted = dtype if given.is_floating_point else None
        yield FlatParameters(unit.name, names, parameters, group, stays, wanted, hosts)


@contextmanager
def _shapes_of_freed(flats: list[FlatParameters]) -> Iterator[None]:
    """Within the block, freed parameters show their shape, which autograd notes for their gradients."""
    freed = [flat for flat in flats if not flat.is_full]
    for flat in freed:
        for parameter, shape in zip(flat.parameters, flat.shapes, strict=True):
            restore(parameter, torch.zeros((), dtype=flat.dtype, device=flat.device).expand(shape))
    yield
    for flat in freed:
        for name, parameter in zip(flat.names, flat.parameters, strict=True):
            free(parameter, name)


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _optimizer_of(
    module: nn.Module, optimizer: Any, settings: dict[str, Any]
) -> tuple[Callable[..., torch.optim.Optimizer], list[dict[str, Any]], dict[str, Any]]:
    """(class, groups of full parameters, its settings)"""
    if isinstance(optimizer, torch.optim.Optimizer):
        if settings:
            raise ValueError(f"pypar.Zero: {', '.join(settings)} belong to an optimizer that is there already")
        groups = [dict(group) for group in optimizer.param_groups]
        return type(optimizer), groups, {}
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"pypar.Zero: no parameter of {type(module).__name__} requires a gradient; unfreeze one")
    return optimizer, [{"params": trainable}], settings
