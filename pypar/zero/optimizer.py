"""The optimizer of a rank's shards: any element-wise one of torch's, on the pieces of parameters that the rank owns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pypar import ops
from pypar.ops.gpu.run import cuda_kernels
from pypar.zero import state
from pypar.zero.flat import FlatParameters
from pypar.zero.offload import Offload
from pypar.zero.reducer import ShardReducer, UnitBucket

ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop")


class OptimizerAround(torch.optim.Optimizer):
    """One whose groups, states and settings are those of `inner`, so that schedulers work. Its own constructor calls
    none of the base class, whose work the inner one's has done."""

    inner: torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults


class ShardedOptimizer(OptimizerAround):
    """What pypar.Zero gives as .optimizer. param_groups are those of the optimizer inside, so that schedulers work;
    its parameters are this rank's pieces, flat.

    step() is collective. A gradient that is not finite on some rank leaves the step out on every rank, and is counted
    in num_skipped.
    """

    def __init__(
        self,
        make: Callable[..., torch.optim.Optimizer],
        groups: Sequence[dict[str, Any]],
        flats: Sequence[FlatParameters],
        reducer: ShardReducer,
        defaults: dict[str, Any],
        offload: Offload | None = None,
    ):
        self.flats, self.reducer = list(flats), reducer
        self.group, self.rank = reducer.group, reducer.rank
        self.num_skipped = 0
        self.agree_in: list[dist.ProcessGroup] = []  # groups, over other axes, that leave the same steps out
        self.names: dict[int, str] = {}  # of each piece's parameter, by id of the piece
        self.places: dict[int, tuple[FlatParameters, int, int, int]] = {}  # flat, begin, end, start, by id of the piece
        named = {id(p): n for flat in flats for n, p in zip(flat.names, flat.parameters, strict=True)}
        self.group_names = [[named[id(p)] for p in group["params"]] for group in groups]  # on all ranks
        pieces = {id(p): piece for bucket in reducer.buckets for p, piece in self._pieces(bucket)}
        if isinstance(make, type):  # before it refuses flat parameters in its own words
            _check_elementwise(make)
        self.inner = make(
            [{**group, "params": [pieces[id(p)] for p in group["params"] if id(p) in pieces]} for group in groups],
            **defaults,
        )
        _check_elementwise(type(self.inner))
        self.offload = offload
        if offload is not None:
            offload.reserve(self, _adam_states if self._is_adam() else lambda group: ())

    def _is_adam(self) -> bool:
        return all(_is_adam(self.inner, group) for group in self.param_groups)

    def _pieces(self, bucket: UnitBucket) -> list[tuple[nn.Parameter, nn.Parameter]]:
        flat = bucket.parameters
        first, _ = flat.layout.shard(flat.rank)
        found = []
        for piece in flat.layout.pieces(flat.rank):
            parameter = nn.Parameter(flat.master[piece.begin - first : piece.end - first])
            self.names[id(parameter)] = flat.names[piece.index]
            self.places[id(parameter)] = (flat, piece.begin - first, piece.end - first, piece.start)
            found.append((flat.parameters[piece.index], parameter))
        return found

    # -- a step ----------------------------------------------------------------------------------------------------

    def _buckets(self) -> list[UnitBucket]:
        return [b for b in self.reducer.buckets if b.has_shard]

    def _norm(self) -> float:
        """Of the mean gradient over all shards; not finite where some gradient is not. Collective."""
        squares = torch.zeros((), dtype=torch.float64)
        for bucket in self._buckets():
            if bucket.squares is not None:
                squares += bucket.squares
                continue
            squares += torch.linalg.vector_norm(bucket.shard).double().square()
        if self.reducer.world_size > 1:
            dist.all_reduce(squares, group=self.group)
        return math.sqrt(float(squares)) if math.isfinite(float(squares)) else math.inf

    def _is_finite(self) -> bool:
        finite = math.isfinite(self._norm())
        for group in self.agree_in:
            count = torch.tensor(0 if finite else 1)
            dist.all_reduce(count, group=group)
            finite = int(count) == 0
        return finite

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scales the gradients so that their norm over all ranks' shards is at most max_norm; returns what it was.
        Collective; the same number on every rank."""
        norm = self._norm()
        factor = max_norm / (norm + 1e-6)
        if factor < 1 and math.isfinite(norm):
            self.scale_grads(factor)
        return norm

    @torch.no_grad()
    def scale_grads(self, factor: float) -> None:
        """Multiplies this rank's gradients by the same factor on every rank: for a norm that is found elsewhere."""
        for bucket in self._buckets():
            bucket.scale(factor)

    def gradients(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(name of a parameter, at which of its elements this rank's part begins, the gradient of the part, flat), of
        every parameter that has a part here and got a gradient on some rank."""
        shards = {id(bucket.parameters): bucket.shard for bucket in self._buckets()}
        index = {slot.name: slot.index for slot in self.reducer.slots}
        for group in self.param_groups:
            for piece in group["params"]:
                name, (flat, begin, end, start) = self.names[id(piece)], self.places[id(piece)]
                if id(flat) in shards and index[name] in self.reducer.has_gradient:
                    yield name, start, shards[id(flat)][begin:end]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._is_finite():  # also a barrier: nobody reads the parameters any more
            self.num_skipped += 1
            return loss
        shards = {id(bucket.parameters): bucket for bucket in self.reducer.buckets}
        index = {slot.name: slot.index for slot in self.reducer.slots}
        is_adam = self._is_adam()
        for group in self.param_groups:
            for piece in group["params"]:
                flat, begin, end, _ = self.places[id(piece)]
                bucket = shards[id(flat)]
                has_gradient = bucket.has_shard and index[self.names[id(piece)]] in self.reducer.has_gradient
                shard = bucket.unscaled if is_adam else bucket.shard
                piece.grad = shard[begin:end] if has_gradient else None
        if is_adam:
            for group in self.param_groups:
                for piece in group["params"]:
                    if piece.grad is not None:
                        flat, begin, end, _ = self.places[id(piece)]
                        low = flat.own[begin:end] if flat.own is not flat.master else None
                        if not self.inner.state[piece] and self.offload is not None:
                            fresh = {name: self.offload.fresh(piece, name) for name in _adam_states(group)}
                            self.inner.state[piece].update(step=torch.zeros(()), **fresh)
                        _adam(piece, self.inner.state[piece], group, shards[id(flat)].factor, low)
        else:
            self.inner.step()
            if self.offload is not None:
                self.offload.adopt(self)
            for flat in self.flats:
                if flat.own is not flat.master:
                    flat.own.copy_(flat.master)
        self.publish()
        return loss

    def publish(self) -> None:
        """Everybody's shards become everybody's parameters."""
        if any(flat.is_shared for flat in self.flats):
            dist.barrier(group=self.group)
        for flat in self.flats:
            flat.publish()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise RuntimeError(
            "pypar.Zero: parameters are shared out when the module is wrapped, and groups can't be added then; give "
            "optimizer= one that has them"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.reducer.zero_grad()

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Of this rank's pieces, as the inner optimizer's; for the same number of ranks and stage."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        if self.offload is not None:
            self.offload.adopt(self)

    def full_state(self, dst: int | None = None) -> dict[str, dict[str, torch.Tensor]]:
        """{name of a parameter: {name of a state: full tensor, in the parameter's shape, or a number}}, on every rank,
        or on rank dst alone, and {} elsewhere. Collective. What differs by parameter but not by element (a step count)
        is a tensor without dims; "master" is the float32 weight of a parameter of a half type."""
        return state.full_state(self, dst)

    def load_full_state(self, full: dict[str, dict[str, torch.Tensor]]) -> None:
        """Takes this rank's pieces of what full_state() gave, under any number of ranks and stage.

        Raises ValueError for a name that is no trained parameter, and for another shape."""
        state.load_full_state(self, full)


def _check_elementwise(kind: type) -> None:
    if kind.__name__ not in ELEMENTWISE:
        raise ValueError(
            f"pypar.Zero: {kind.__name__} is not known to work element by element, so that a rank's part of a "
            f"parameter would be stepped wrongly; use one of {', '.join(ELEMENTWISE)}"
        )


def _is_adam(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether zero_step does what this group asks for, with a kernel."""
    devices = ("cpu", "cuda") if cuda_kernels("zero_step") is not None else ("cpu",)
    return type(optimizer) in (torch.optim.AdamW, torch.optim.Adam) and all(
        piece.dtype == torch.float32 and piece.device.type in devices for piece in group["params"]
    )


def _adam_states(group: dict[str, Any]) -> Sequence[str]:
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))


def _adam(
    piece: nn.Parameter, state: dict[str, Any], group: dict[str, Any], factor: float, low: torch.Tensor | None
) -> None:
    """A step in one pass, with the states of torch's own."""
    if not state:
        state["step"] = torch.zeros(())
        state.update({name: torch.zeros_like(piece) for name in _adam_states(group)})
    state["step"] += 1
    assert piece.grad is not None
    ops.zero_step(
        piece.detach(),
        piece.grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        int(state["step"]),
        lr=float(group["lr"]),
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        max_exp_avg_sq=state.get("max_exp_avg_sq"),
        grad_scale=factor,
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        low=low,
    )
