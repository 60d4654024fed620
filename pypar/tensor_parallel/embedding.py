"""An embedding of which every rank holds a part of the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pypar.tensor_parallel.cut import Cut, even_cut
from pypar.tensor_parallel.exchange import reduce_out
from pypar.tensor_parallel.shards import Group, Place, Shard, cut_parameter, place_of, shards_of


class _VocabParallel(nn.Embedding):
    """Goes before an embedding class: looks up the ids of this rank's shard, gives zeros for the others, sums.

    So an embedding class with a forward of its own (one that scales its output, say) keeps it.
    """

    cut: Cut
    place: Place

    def _become_shard(self, place: Place, unit: int, sizes: Sequence[int] | None, cut: Cut | None) -> None:
        for name, neutral in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"a vocab-parallel embedding can't have {name}={getattr(self, name)}: a rank sees only its part "
                    f"of the vocabulary; make the embedding with {name}={neutral}"
                )
        self.place = place
        self.cut = (
            cut
            if cut is not None
            else even_cut(self.num_embeddings, place.world_size, unit, sizes, "num_embeddings", place.determinism)
        )
        if not self.cut.in_order():
            raise ValueError(f"a vocab-parallel embedding's ranks hold one range of ids each, got {self.cut}")
        cut_parameter(self, "weight", Shard(0, self.cut, place))
        self.full_padding_idx = self.padding_idx
        self._start = sum(self.cut.sizes()[: place.rank])
        self._stop = self._start + self.cut.sizes()[place.rank]
        if self.padding_idx is not None:  # autograd drops the gradient of this row, where this rank has it
            here = self._start <= self.padding_idx < self._stop
            self.padding_idx = self.padding_idx - self._start if here else None

    def reset_parameters(self) -> None:
        """Draws the full embedding and keeps this rank's part, as the constructor does: for those made on "meta"."""
        shards = shards_of(self)
        if not shards:  # it is still the full one
            return super().reset_parameters()
        size = self.num_embeddings, self.embedding_dim, self.full_padding_idx
        full = nn.Embedding(*size, device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            self.weight.copy_(shards["weight"].take(full.weight))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._start == self._stop:
            found = self.weight.new_full((*input.shape, self.embedding_dim), -0.0)
            found = found - self.weight.sum()  # of nothing: ties the empty shard to the graph
        else:
            # An id outside the whole vocabulary is nobody's: the lookup refuses it on every rank, as torch's does.
            elsewhere = ((input >= 0) & (input < self._start)) | ((input >= self._stop) & (input < self.cut.full))
            local = (input - self._start).masked_fill(elsewhere, 0)
            # Of all numbers -0.0 alone changes none that it is added to, not even -0.0.
            found = super().forward(local).masked_fill(elsewhere.unsqueeze(-1), -0.0)
        return reduce_out(found, self.place.group_name)

    def extra_repr(self) -> str:
        sizes = self.cut.sizes()
        return f"{super().extra_repr()}, rank {self.place.rank} of {self.place.world_size} holds {sizes}"


class VocabParallelEmbedding(_VocabParallel):
    """y = the rows of the full weight that the ids name, on every rank; each rank holds a range of the ids.

    num_embeddings ...   as nn.Embedding's; max_norm, scale_grad_by_freq and sparse are refused
    group                the ranks that share the vocabulary (default: all)
    unit, sizes          how the vocabulary is cut: whole units, as equal as they go, or the sizes per rank
    Backward             local: dy is the same on every rank
    Numerics             exact: one rank gives the row, the others add zeros
    State dict           this rank's shard; load_state_dict takes the full weight or the shard
    """

    def __init__(
        self,
        *args: Any,
        group: Group | Place = None,
        unit: int = 1,
        sizes: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        # The full embedding is drawn and then cut, so that the initial weights don't depend on the number of ranks.
        super().__init__(*args, **kwargs)
        self._become_shard(place_of(group), unit, sizes, None)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        group: Group | Place = None,
        *,
        unit: int = 1,
        sizes: Sequence[int] | None = None,
        cut: Cut | None = None,
    ) -> nn.Embedding:
        """This rank's part of a full embedding; of a subclass with a forward of its own, a subclass of that."""
        if not isinstance(embedding, nn.Embedding) or isinstance(embedding, _VocabParallel):
            raise ValueError(f"{cls.__name__} takes an nn.Embedding that isn't cut yet, got {embedding}")
        kind: Any = cls if type(embedding) is nn.Embedding else _parallel_class(type(embedding))  # type: ignore[arg-type]
        self = kind.__new__(kind)
        self.__dict__.update(embedding.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):  # not shared with the full embedding
            self.__dict__[name] = dict(embedding.__dict__[name])
        self._become_shard(place_of(group), unit, sizes, cut)
        return self


@functools.cache
def _parallel_class(base: type) -> type:
    return type(f"VocabParallel{base.__name__}", (_VocabParallel, base), {})
