"""Dropout that is the same whatever the number of ranks (docs/design/0007-keyed-dropout.md).

The mask is a function of (seed of this forward, site, index in the full tensor). A function mode that is active during
the model's forward replaces every dropout by `pypar.ops.keyed_dropout`; hooks on the modules tell it the site, and
whether a tensor is full or which part of it this rank has.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from pypar.ops import keyed_dropout
from pypar.tensor_parallel.cut import Cut
from pypar.tensor_parallel.heads import Heads
from pypar.tensor_parallel.seed import fork_generator, forward_seed
from pypar.tensor_parallel.shards import Place

Layout = tuple[int, int, list[int]]  # dim, its full size, the ranges of it that x has: start, stop, ...


@dataclass(frozen=True)
class Rows:
    """Full tensors are, for the time being, rows [start, stop) of `full` (batch and sequence, flattened) in dim -2."""

    full: int
    start: int
    stop: int


class Inner:
    """In one module, from its column layers to its row layer: tensors are this rank's heads or features."""

    def __init__(self, place: Place):
        self.place = place
        self.heads: Heads | None = None
        self.cuts: list[Cut] = []
        self.inside = False

    def enter(self, *_: Any) -> None:
        self.inside = True

    def leave(self, *_: Any) -> None:
        self.inside = False

    def layout(self, x: torch.Tensor, where: str) -> Layout:
        heads, rank = self.heads, self.place.rank
        if heads is not None and x.dim() >= 4 and x.shape[-3] == heads.q[rank][1] - heads.q[rank][0]:
            return x.dim() - 3, heads.num, list(heads.q[rank])  # attention probabilities [B, H_r, S, S]
        for cut in self.cuts:
            if x.shape[-1] == cut.sizes()[rank]:
                return x.dim() - 1, cut.full, [i for r in cut.ranges[rank] for i in r]
        raise ValueError(
            f"{where}: dropout on a tensor of shape {tuple(x.shape)} between column and row layers; rank {rank} of "
            f"{self.place.world_size} has {[c.sizes()[rank] for c in self.cuts]} features and "
            f"{heads.q[rank] if heads else 'no'} heads there, so which part of the full tensor it is can't be told. "
            "Drop out [batch, heads, queries, keys] or [..., features], or do it after the row layer"
        )


class Site:
    """The hooks of one module: which it is, and what its tensors are parts of."""

    def __init__(self, dropouts: Dropouts, name: str, inner: Inner | None, is_owner: bool):
        self.dropouts, self.name, self.inner, self.is_owner = dropouts, name, inner, is_owner
        self.repeated = False  # called more than once by its caller

    def enter(self, module: nn.Module, _args: Any) -> None:
        self.dropouts.enter(self, module.training)

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.dropouts.leave(self)


class _Frame:
    """One call of a module. repeat: counts calls by the same caller, 0 for the first; calls: dropouts so far."""

    def __init__(self, site: Site, above: _Frame | None):
        self.site, self.above, self.calls = site, above, 0
        self.counts: dict[str, int] = {}
        self.repeat = 0
        if above is not None:
            number = above.counts.get(site.name, 0)
            above.counts[site.name] = number + 1
            self.repeat = above.repeat * 4093 + number


@torch.compiler.assume_constant_result
def _site_number(name: str, repeat: int, call: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name} {repeat} {call}".encode(), digest_size=8).digest(), signed=True)


class Dropouts:
    """The state of the forward that is going on in one model; empty between forwards.

    rows: set by what cuts the hidden states by rows (sequence parallel), None while they are full.
    """

    def __init__(self, place: Place):
        self.place = place
        self.rows: Rows | None = None
        self.watched: list[tuple[Any, str]] = []  # where probabilities are
        self.always = False  # a probability is somewhere in the code
        self.seed: torch.Tensor | None = None
        self._top: _Frame | None = None
        self._mode: _KeyedMode | None = None
        self._restore: torch.Tensor | None = None

    def armed(self) -> bool:
        return self.always or any(_number(getattr(owner, name, 0)) > 0 for owner, name in self.watched)

    def enter(self, site: Site, training: bool) -> None:
        if self._top is None:
            if not training or not self.armed():
                return
            self._begin(site)
        self._top = _Frame(site, self._top)
        if self._top.repeat:
            site.repeated = True
        if site.is_owner and site.inner is not None:
            site.inner.inside = False

    def leave(self, site: Site) -> None:
        if self._top is None or self._top.site is not site:
            return
        self._top = self._top.above
        if self._top is None:
            self._end()

    def _begin(self, site: Site) -> None:
        group_name = self.place.group_name
        if torch.compiler.is_compiling():
            self.seed = torch.ops.pypar.forward_seed(group_name)
        else:
            seed, is_again = forward_seed(group_name)
            if is_again and site.repeated:
                raise RuntimeError(
                    f"{site.name} is called several times in a forward, so that in its activation checkpoint it can't "
                    "be told which call's dropout to do again: put the checkpoint around what calls it"
                )
            self._restore = None if is_again else fork_generator(seed)
            self.seed = torch.tensor(seed, dtype=torch.int64)
        self._mode = _KeyedMode(self)
        self._mode.__enter__()

    def _end(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
        if self._restore is not None:
            torch.default_generator.set_state(self._restore)
        self._mode = self._restore = self.seed = None

    def _layout(self, x: torch.Tensor) -> Layout:
        assert self._top is not None
        inner = self._top.site.inner
        if self.place.world_size > 1 and inner is not None and inner.inside:
            return inner.layout(x, self._top.site.name)
        rows = self.rows
        if rows is not None and x.dim() >= 2 and x.shape[-2] == rows.stop - rows.start:
            return x.dim() - 2, rows.full, [rows.start, rows.stop]
        return 0, x.shape[0], [0, x.shape[0]]

    def is_cut(self) -> bool:
        """Tensors at this point may be parts."""
        assert self._top is not None
        inner = self._top.site.inner
        return self.place.world_size > 1 and (self.rows is not None or (inner is not None and inner.inside))

    def drop(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """The dropout of this point of the forward."""
        frame = self._top
        assert frame is not None and self.seed is not None
        frame.calls += 1
        number = _site_number(frame.site.name, frame.repeat, frame.calls)
        return keyed_dropout(x, self.seed, number, p, *self._layout(x))

    @property
    def where(self) -> str:
        return self._top.site.name if self._top is not None else ""


class _KeyedMode(TorchFunctionMode):
    def __init__(self, dropouts: Dropouts):
        super().__init__()
        self.dropouts = dropouts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout or func is torch.dropout or func is torch.dropout_:
            return _dropout(self.dropouts, func, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(self.dropouts, *args, **kwargs)
        if func in _OF_CHANNELS:
            _refuse_parts(self.dropouts, func, *args, **kwargs)
        return func(*args, **kwargs)


def _dropout(
    dropouts: Dropouts, func: Any, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False,
    train: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    inplace = inplace or func is torch.dropout_
    training = training if train is None else train
    if not training or p == 0 or not input.is_floating_point():
        return F.dropout(input, p, training, inplace)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    y = dropouts.drop(input, p)
    return input.copy_(y) if inplace else y


def _attention(
    dropouts: Dropouts,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's scaled_dot_product_attention; where it drops out, written out, with the probabilities in memory (as
    torch's own does on CPU). Half types are float32 inside, as there."""
    if dropout_p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    dtype = query.dtype
    q, k, v = (t if dtype == torch.float64 else t.float() for t in (query, key, value))
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if is_causal:
        causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    nothing = (scores == -torch.inf).all(-1, keepdim=True)  # a query that may see no key gets zeros
    probabilities = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return (dropouts.drop(probabilities, dropout_p) @ v).to(dtype)


_OF_CHANNELS: set[Callable] = {
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
}


def _refuse_parts(
    dropouts: Dropouts, func: Any, input: torch.Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> None:
    """On full tensors these are the same on all ranks, since the generators are, during the forward."""
    if training and p > 0 and dropouts.is_cut():
        raise ValueError(
            f"{dropouts.where}: {func.__name__} on a part of a tensor would differ from one process's; use dropout"
        )


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0


def _watch(dropouts: Dropouts, module: nn.Module) -> None:
    """Where this module's probabilities are: attributes with "drop" in their name, its own or its config's."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        dropouts.watched.append((module, "p"))
        return
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    named = [n for n in (code.co_names if code is not None else ()) if "drop" in n]
    config = getattr(module, "config", None)
    own: list[tuple[Any, str]] = [
        (module, n) for n, v in vars(module).items() if "drop" in n and isinstance(v, (int, float))
    ]
    own += [(config, n) for n in named if isinstance(getattr(config, n, None), (int, float))]
    dropouts.watched += own
    if named and not own and not any(isinstance(getattr(module, n, None), nn.Module) for n in named):
        dropouts.always = True  # F.dropout with a probability that is written there


def key_dropouts(root: nn.Module, inner: dict[str, Inner], place: Place) -> Dropouts:
    """Makes every dropout in `root` keyed. inner: of the modules that have column and row layers, by name."""
    dropouts = Dropouts(place)
    modules = list(root.named_modules())
    for name, module in modules:
        _watch(dropouts, module)
        is_leaf = not module._modules and type(module).__module__.startswith(("torch.nn.", "pypar."))
        if is_leaf and not isinstance(module, nn.modules.dropout._DropoutNd):
            continue  # nothing in there drops out; or its caller's name does for a site
        above, found = name, inner.get(name)
        while found is None and above:
            above = above.rpartition(".")[0]
            found = inner.get(above)
        site = Site(dropouts, name, found, name in inner)
        if hasattr(type(module), "gradient_checkpointing"):
            module.__dict__["_pypar_site"] = site
            module.__class__ = _checkpointed_class(type(module))  # type: ignore[arg-type]
        else:
            module.register_forward_pre_hook(site.enter, prepend=True)
            module.register_forward_hook(site.leave, always_call=True)
    return dropouts


@functools.cache
def _checkpointed_class(base: type[nn.Module]) -> type[nn.Module]:
    """For Hugging Face's layers, which checkpoint their forward without its hooks, and do so with a subclass's too."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        site: Site = self._pypar_site
        site.enter(self, args)
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            site.leave(self, args, None)

    names = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), names)
