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
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from pypar.ops import keyed_dropout
from pypar.tensor_parallel.cut import Cut
from pypar.tensor_parallel.heads import Heads
from pypar.tensor_parallel.rows import GatheredRows
from pypar.tensor_parallel.seed import fork_generator, forward_seed, is_ours
from pypar.tensor_parallel.sequence import RowsInForce
from pypar.tensor_parallel.shards import Place

Layout = tuple[int, int, list[int]]  # dim, its full size, the ranges of it that x has: start, stop, ...


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
    """The hooks of one module: which it is, and what its tensors are parts of.

    inner: of the nearest module that has column and row layers. force: where ranks have rows of the hidden states.
    """

    def __init__(self, dropouts: Dropouts, name: str, inner: Inner | None = None, force: RowsInForce | None = None):
        self.dropouts, self.name, self.inner, self.force = dropouts, name, inner, force
        self.opens_inner = False  # it is that module
        self.repeated = False  # called more than once by its caller

    def attach(self, module: nn.Module) -> None:
        if hasattr(type(module), "gradient_checkpointing"):
            module.__dict__["_pypar_site"] = self
            module.__class__ = _checkpointed_class(type(module))  # type: ignore[arg-type]
        else:
            module.register_forward_pre_hook(self.enter, prepend=True)
            module.register_forward_hook(self.leave, always_call=True)

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


def _site_number(name: str, repeat: int, call: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name} {repeat} {call}".encode(), digest_size=8).digest(), signed=True)


# All that torch.compiler.assume_constant_result does, but for loading Dynamo here, which takes a second.
_site_number._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Dropouts:
    """The state of the forward that is going on in one model; empty between forwards."""

    def __init__(self, place: Place):
        self.place = place
        self.watched: list[tuple[Any, str]] = []  # where probabilities are
        self.always = False  # a probability is somewhere in the code
        self.seed: torch.Tensor | None = None
        self._top: _Frame | None = None
        self._outer: Site | None = None
        self._mode: _KeyedMode | None = None
        self._restore: torch.Tensor | None = None

    def armed(self) -> bool:
        return self.always or any(_number(getattr(owner, name, 0)) > 0 for owner, name in self.watched)

    def watch(self, module: nn.Module) -> None:
        """Where this module's probabilities are: attributes with such names, its own or its config's."""
        if isinstance(module, nn.modules.dropout._DropoutNd):
            self.watched.append((module, "p"))
            return
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        named = [n for n in (code.co_names if code is not None else ()) if _is_random(n)]
        config = getattr(module, "config", None)
        numbers = [(module, n) for n, v in vars(module).items() if _is_random(n) and isinstance(v, (int, float))]
        self.watched += numbers
        in_config = [(config, n) for n in named if isinstance(getattr(config, n, None), (int, float))]
        self.watched += in_config
        if named and not numbers and not in_config:
            # F.dropout with a probability that is written there, unless the name is that of a child.
            self.always |= not any(isinstance(getattr(module, n, None), nn.Module) for n in named)

    def enter(self, site: Site, training: bool) -> None:
        if not torch.compiler.is_compiling() and self._outer is site:  # an interrupt ended its last forward
            self._end()
        if self._top is None:
            if not training or not self.armed():
                return
            self._begin(site)
        self._top = _Frame(site, self._top)
        if self._top.repeat:
            site.repeated = True
        if site.opens_inner and site.inner is not None:
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
            self._restore, self._outer = None if is_again else fork_generator(seed), site
            self.seed = torch.tensor(seed, dtype=torch.int64)
        self._mode = _KeyedMode(self)
        self._mode.__enter__()

    def _end(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
        if self._restore is not None and is_ours(torch.default_generator.initial_seed()):
            torch.default_generator.set_state(self._restore)  # else somebody has seeded it in the meantime
        self._top = self._outer = self._mode = self._restore = self.seed = None

    def _part(self, x: torch.Tensor) -> Layout | None:
        """Where a part of a tensor lies in the full one; None of a full tensor."""
        assert self._top is not None
        site = self._top.site
        if self.place.world_size == 1:
            return None
        if site.inner is not None and site.inner.inside:
            return site.inner.layout(x, site.name)
        rows = site.force.rows if site.force is not None else None
        if rows is not None and (rows.fits(x) or (x.dim() == 2 and x.shape[0] == rows.mine)):
            return x.dim() - 2, rows.num, [rows.begin, rows.begin + rows.mine]
        return None

    def drop(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """The dropout of this point of the forward."""
        frame = self._top
        assert frame is not None and self.seed is not None
        frame.calls += 1
        number = _site_number(frame.site.name, frame.repeat, frame.calls)
        return keyed_dropout(x, self.seed, number, p, *(self._part(x) or ()))

    def refuse_part(self, what: str, x: torch.Tensor) -> None:
        """Of kinds of dropout that are the same on all ranks on full tensors alone, where the generators are equal."""
        if self._top is not None and self._part(x) is not None:
            raise ValueError(
                f"{self._top.site.name}: {what} on a part of a tensor would differ from one process's; use dropout"
            )


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
    if isinstance(input, GatheredRows):
        input = input.gathered()
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
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    with torch.autocast(device, enabled=False):
        q, k, v = (t if t.dtype == torch.float64 else t.float() for t in (query, key, value))
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        # Factors that lie in order, so that a product's bits don't depend on the number of heads (layout.py).
        scores = (
            q.contiguous() @ k.transpose(-2, -1).contiguous() * (scale if scale is not None else q.shape[-1] ** -0.5)
        )
        if is_causal:
            causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~causal, -torch.inf)
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
        nothing = (scores == -torch.inf).all(-1, keepdim=True)  # a query that may see no key gets zeros
        probabilities = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
        return (dropouts.drop(probabilities, dropout_p) @ v.contiguous()).to(dtype)


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
    if training and p > 0:
        dropouts.refuse_part(func.__name__, input)


def _is_random(name: str) -> bool:
    return any(word in name for word in ("drop", "jitter", "noise"))


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0


def key_dropouts(root: nn.Module, inner: dict[str, Inner], stacks: dict[str, RowsInForce], place: Place) -> Dropouts:
    """Makes every dropout in `root` keyed. inner: of the modules that have column and row layers, by name; stacks: of
    the lists of layers that keep their rows of the hidden states alone, by name."""
    dropouts = Dropouts(place)
    root.__dict__["_pypar_dropouts"] = dropouts
    for name, module in list(root.named_modules()):
        dropouts.watch(module)
        is_leaf = not module._modules and type(module).__module__.startswith(("torch.nn.", "pypar."))
        if is_leaf and not isinstance(module, nn.modules.dropout._DropoutNd):
            continue  # nothing in there drops out; or its caller's name does for a site
        site = Site(dropouts, name, _nearest(inner, name), _nearest(stacks, name))
        site.opens_inner = name in inner
        site.attach(module)
    return dropouts


def _nearest(by_name: dict[str, Any], name: str) -> Any:
    """Of the module or one above it."""
    while name not in by_name and name:
        name = name.rpartition(".")[0]
    return by_name.get(name)


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

    def reduce(self: Any, _protocol: Any) -> Any:
        return _new_checkpointed, (base,), self.__dict__  # to be pickled though no module has this class

    names = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {**names, "__reduce_ex__": reduce})


def _new_checkpointed(base: type[nn.Module]) -> nn.Module:
    cls = _checkpointed_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)
