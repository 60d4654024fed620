"""Linear layers of which every rank holds a part: of the output features (column), of the input features (row)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from pypar import ops
from pypar.tensor_parallel.cut import Cut, even_cut
from pypar.tensor_parallel.exchange import copy_in, gather_last, split_last, sum_copies
from pypar.tensor_parallel.layout import column_linear, copy_in_shares, shard_sizes
from pypar.tensor_parallel.rows import GatheredRows
from pypar.tensor_parallel.shards import Group, Place, Shard, cut_parameter, place_of, shards_of

if TYPE_CHECKING:
    from pypar.tensor_parallel.sequence import RowsInForce
    from pypar.tensor_parallel.shared import SharedInput


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer or of Hugging Face's Conv1D; None of anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return int(columns), int(rows)
    return None


class _ParallelLinear(nn.Linear):
    """What both kinds share. in_features and out_features are those of the full layer; weight and bias are the shard.

    transposed: the weight lies as [in, out], as in Hugging Face's Conv1D, so that checkpoints keep their shapes.
    """

    transposed = False
    cut: Cut
    place: Place
    force: RowsInForce | None = None  # set by sequence parallel
    # (y, x) -> y, whose backward computes the weight's gradient when it likes; set by a pipeline.
    weight_gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        group: Group | Place = None,
        *,
        unit: int = 1,
        sizes: Sequence[int] | None = None,
        determinism: str | None = None,
    ):
        # The full layer is drawn and then cut, so that the initial weights don't depend on the number of ranks.
        super().__init__(in_features, out_features, bias, device, dtype)
        self._become_shard(place_of(group, determinism), unit, sizes, None)

    @classmethod
    def _from(
        cls, linear: nn.Module, place: Place, unit: int, sizes: Sequence[int] | None, cut: Cut | None, **attributes: Any
    ) -> Self:
        shape = linear_shape(linear)
        strange = set(dict(linear.named_parameters())) - {"weight", "bias"} or dict(linear.named_buffers())
        if shape is None or strange or isinstance(linear, _ParallelLinear):
            raise ValueError(
                f"{cls.__name__} takes an nn.Linear (or Hugging Face's Conv1D) that isn't cut yet, got {linear}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.transposed = not isinstance(linear, nn.Linear)
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(linear, name, None))
        self.training = linear.training
        for name, value in attributes.items():
            setattr(self, name, value)
        self._become_shard(place, unit, sizes, cut)
        return self

    def _become_shard(self, place: Place, unit: int, sizes: Sequence[int] | None, cut: Cut | None) -> None:
        self.place = place
        full, what = self._cut_features()
        self.cut = cut if cut is not None else even_cut(full, place.world_size, unit, sizes, what, place.determinism)
        if self.cut.full != full or self.cut.world_size != place.world_size:
            raise ValueError(
                f"a cut of {self.cut.full} for {self.cut.world_size} ranks doesn't fit {what} = {full} on "
                f"{place.world_size} ranks"
            )
        if place.determinism == "layout":
            self.shard_sizes = shard_sizes(self.cut, place.rank, what)
        self._cut_parameters()

    def reset_parameters(self) -> None:
        """Draws the full layer and keeps this rank's part, as the constructor does: for layers made on "meta"."""
        shards = shards_of(self)
        if not shards:  # it is still the full one
            return super().reset_parameters()
        has_bias = self.bias is not None
        full = nn.Linear(self.in_features, self.out_features, has_bias, self.weight.device, self.weight.dtype)
        with torch.no_grad():
            if self.transposed:  # Hugging Face's Conv1D
                nn.init.normal_(full.weight, std=0.02)
                nn.init.zeros_(full.bias)
                full.weight = nn.Parameter(full.weight.t())
            for name, parameter in full.named_parameters():
                self._parameters[name].copy_(shards[name].take(parameter) if name in shards else parameter)  # type: ignore[union-attr]

    def _cut_features(self) -> tuple[int, str]:
        raise NotImplementedError

    def _cut_parameters(self) -> None:
        raise NotImplementedError

    def _linear_weight(self) -> torch.Tensor:
        """[out, in], this rank's part."""
        return self.weight.t() if self.transposed else self.weight

    def _defers(self, x: torch.Tensor) -> bool:
        """Whether somebody else computes the weight's gradient."""
        return (
            self.weight_gradient is not None
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and x.dtype == self.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def extra_repr(self) -> str:
        sizes = self.cut.sizes()
        return f"{super().extra_repr()}, rank {self.place.rank} of {self.place.world_size} holds {sizes}"


class ColumnParallelLinear(_ParallelLinear):
    """y_r = x @ w_r.T + b_r: every rank has the full x and finds its part of the output features.

    in_features ... dtype   as nn.Linear's; in_features and out_features of the full layer
    group                   the ranks that share the layer (default: all)
    unit, sizes             how out_features are cut: whole units, as equal as they go (some ranks may hold none), or
                            the sizes per rank
    gather_output           y of all ranks, joined, on every rank; else y is [..., sizes[rank]]
    Backward                dx = all_reduce(dy_r @ w_r): by each layer that stands alone, once for those of one parent
                            that read the same tensor, where pypar.tensor_parallel cut them; dw, db are local
    determinism             "run", or "layout": the same bits for 1, 2, 4 and 8 ranks; default that of the group's Place
    State dict              this rank's shard; load_state_dict takes the full tensors or the shard
    """

    shared_input: SharedInput | None = None  # of the column layers of one parent
    reads_rows = False  # with sequence parallel: this layer itself is handed a rank's rows

    def __init__(self, *args: Any, gather_output: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gather_output = gather_output

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        group: Group | Place = None,
        *,
        unit: int = 1,
        sizes: Sequence[int] | None = None,
        cut: Cut | None = None,
        gather_output: bool = False,
        determinism: str | None = None,
    ) -> Self:
        """This rank's part of a full layer. cut: for parts that aren't one range, instead of unit or sizes."""
        place = place_of(group, determinism)
        return cls._from(linear, place, unit, sizes, cut, gather_output=gather_output)

    def _cut_features(self) -> tuple[int, str]:
        return self.out_features, "out_features"

    def _cut_parameters(self) -> None:
        self._weight_dim = 1 if self.transposed else 0
        cut_parameter(self, "weight", Shard(self._weight_dim, self.cut, self.place))
        cut_parameter(self, "bias", Shard(0, self.cut, self.place))

    def copy_in(self, x: torch.Tensor) -> torch.Tensor:
        if self.place.determinism == "layout":
            return copy_in_shares(x, self.place.world_size, self.place.group_name)
        return copy_in(x, self.place.group_name)

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight [N_r, K] and bias as a matmul takes them; the gradients of copies are summed over their holders."""
        group_name, rank = self.place.group_name, self.place.rank
        weight: torch.Tensor = self._linear_weight()
        bias: torch.Tensor | None = self.bias
        if self.cut.has_copies():
            weight = sum_copies(weight, self.cut, 0, rank, group_name)
            bias = sum_copies(bias, self.cut, 0, rank, group_name) if bias is not None else None
        return weight, bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        group_name, rank = self.place.group_name, self.place.rank
        rows = self.force.of(input) if self.force is not None and self.reads_rows else None
        if rows is not None:
            input = GatheredRows(input, rows, (*input.shape[:-2], rows.num))
        if isinstance(input, GatheredRows):
            y = self.shared_input.matmul(self, input) if self.shared_input else input.products([self.operands()])[0]
        else:
            x = self.shared_input(input) if self.shared_input is not None else self.copy_in(input)
            layout = self.place.determinism == "layout"
            if self.weight_gradient is not None and not (layout or self.cut.has_copies()) and self._defers(x):
                y = self.weight_gradient(F.linear(x, self._linear_weight().detach(), self.bias), x.detach())
                return gather_last(y, self.cut, rank, group_name) if self.gather_output else y
            y = column_linear(x, *self.operands(), self.shard_sizes) if layout else F.linear(x, *self.operands())
        return gather_last(y, self.cut, rank, group_name) if self.gather_output else y


class RowParallelLinear(_ParallelLinear):
    """y = sum over ranks of x_r @ w_r.T, + b: every rank has its part of the input features and finds the full y.

    in_features ... dtype   as nn.Linear's; in_features and out_features of the full layer
    group                   the ranks that share the layer (default: all)
    unit, sizes             how in_features are cut, as in ColumnParallelLinear
    split_input             x is the full input, the same on every rank; else x is [..., sizes[rank]]
    Backward                local: dy is the same on every rank (with split_input, dx is gathered)
    determinism             as ColumnParallelLinear's
    Numerics                those of pypar.ops.matmul_all_reduce; the bias is added once, to the sum
    State dict              this rank's shard and the full bias; load_state_dict takes the full tensors or the shard
    """

    def __init__(self, *args: Any, split_input: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.split_input = split_input

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        group: Group | Place = None,
        *,
        unit: int = 1,
        sizes: Sequence[int] | None = None,
        cut: Cut | None = None,
        split_input: bool = False,
        determinism: str | None = None,
    ) -> Self:
        """This rank's part of a full layer. cut: for parts that aren't one range, instead of unit or sizes."""
        return cls._from(linear, place_of(group, determinism), unit, sizes, cut, split_input=split_input)

    def _cut_features(self) -> tuple[int, str]:
        return self.in_features, "in_features"

    def _cut_parameters(self) -> None:
        if self.cut.has_copies():
            raise ValueError(f"a row-parallel layer's ranks hold input features that don't overlap, got {self.cut}")
        cut_parameter(self, "weight", Shard(0 if self.transposed else 1, self.cut, self.place))
        if self.bias is not None:  # whole on every rank, but no longer the full layer's own
            self.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        group_name, rank = self.place.group_name, self.place.rank
        x = split_last(input, self.cut, rank, group_name) if self.split_input else input
        weight: torch.Tensor = self._linear_weight()
        bias: torch.Tensor | None = self.bias
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"rank {rank}: the input's last dim is {x.shape[-1]}, but this rank holds {weight.shape[1]} of the "
                f"{self.in_features} input features (sizes {self.cut.sizes()}): cut the layer before the same way"
            )
        rows = self.force.rows if self.force is not None else None
        if rows is not None and bias is not None:  # which every rank adds to its rows
            bias = rows.seen(bias)
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if rows is None:
            level = self.place.determinism
            late = self.weight_gradient if level != "layout" and self._defers(x) else None
            weight = weight if late is None else weight.detach()
            y = ops.matmul_all_reduce(flat, weight, group_name, bias=bias, determinism=level, sizes=self.cut.sizes())
            y = y if late is None else late(y, flat.detach())
            return y.reshape(*x.shape[:-1], self.out_features)
        y = ops.matmul_reduce_scatter(flat, weight, group_name, bias=bias, splits=rows.sizes)
        return y if x.dim() == 2 else y[None]
