"""The names of styles: Hugging Face's, torch's ParallelStyle objects, and what each means here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)


@dataclass(frozen=True)
class Style:
    """kind: what happens to the module or parameter. full_side: the side that column and row cut is full all the same
    (column: the output is gathered; row: the input is the full one). packed: blocks one behind the other. sequence: it
    asks for sequence parallel, of the whole model."""

    kind: str
    full_side: bool = False
    packed: int = 1
    sequence: bool = False


STYLES = {
    "colwise": Style("column"),
    "colwise_rep": Style("column", full_side=True),
    "colwise_gather_output": Style("column", full_side=True),
    "colwise_qkv": Style("column_qkv"),
    "packed_colwise": Style("column", packed=2),
    "rowwise": Style("row"),
    "rowwise_rep": Style("row", full_side=True),
    "rowwise_split_input": Style("row", full_side=True),
    "packed_rowwise": Style("row", packed=2),
    "embedding_rowwise": Style("vocab"),
    "vocab_parallel_rowwise": Style("vocab"),
    "replicated_with_grad_allreduce": Style("shared"),
    "moe_tp_experts": Style("experts"),
    "all_reduce": Style("reduce"),
    "replicate": Style("leave"),
    "local_params": Style("leave"),
    "sequence_parallel": Style("leave", sequence=True),
}


def style_of(given: Any, pattern: str) -> Style:
    if isinstance(given, str):
        if given in STYLES:
            return STYLES[given]
        raise ValueError(
            f"plan['{pattern}']: pypar.tensor_parallel has no style '{given}'; use one of {', '.join(STYLES)}"
        )
    if isinstance(given, Style):
        return given
    if isinstance(given, ParallelStyle):
        return _from_torch(given, pattern)
    raise ValueError(f"plan['{pattern}'] is {given!r}: give the name of a style or a torch ParallelStyle")


def _from_torch(given: ParallelStyle, pattern: str) -> Style:
    def layout(name: str) -> Any:
        return getattr(given, name)[0]

    def refuse(why: str) -> ValueError:
        return ValueError(f"plan['{pattern}'] is {type(given).__name__}{why}")

    if isinstance(given, SequenceParallel):
        return STYLES["sequence_parallel"]
    if isinstance(given, (PrepareModuleInput, PrepareModuleOutput)):
        return STYLES["replicate"]  # what they prepare follows from the layers here
    if type(given) not in (ColwiseParallel, RowwiseParallel):
        raise refuse(
            "; pypar.tensor_parallel takes ColwiseParallel, RowwiseParallel, SequenceParallel, PrepareModuleInput and "
            "PrepareModuleOutput"
        )
    if not given.use_local_output:  # type: ignore[attr-defined]
        raise refuse(" with use_local_output=False; activations are plain tensors here: use True")
    source, target = layout("input_layouts"), layout("output_layouts")
    full, last, sequence = Replicate(), Shard(-1), Shard(1)
    if isinstance(given, ColwiseParallel):
        if source in (full, sequence) and target in (last, full):
            return Style("column", full_side=target == full, sequence=source == sequence)
        raise refuse(f" from {source!r} to {target!r}; it takes Replicate() or Shard(1) to Shard(-1) or Replicate()")
    if source in (last, full) and target in (full, sequence):
        return Style("row", full_side=source == full, sequence=target == sequence)
    raise refuse(f" from {source!r} to {target!r}; it takes Shard(-1) or Replicate() to Replicate() or Shard(1)")
