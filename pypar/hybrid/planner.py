"""torch.distributed.checkpoint's plan of a save: every element written once, the work spread over its holders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from pypar.hybrid.regions import Box, share_out
from pypar.zero import ShardTensor


class SharedOutPlanner(SavePlanner):
    """Of state dicts of ShardTensor. buffers: names of what may differ between ranks, of which the first rank's is
    written."""

    def __init__(self, buffers: set[str]):
        self._buffers = buffers
        self._tensors: dict[str, ShardTensor] = {}
        self._kept: dict[MetadataIndex, torch.Tensor] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self._tensors = dict(state_dict)

    def create_local_plan(self) -> SavePlan:
        items = [item for name, t in self._tensors.items() for item in t.__create_write_items__(name, t)]
        return SavePlan(items, planner_data=self._buffers)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raises ValueError where ranks differ in what a tensor is, or elements are on no rank."""
        first: dict[str, WriteItem] = {}
        held: dict[str, list[list[Box]]] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                name, data = item.index.fqn, item.tensor_data
                assert data is not None and data.chunk is not None
                known = first.setdefault(name, item).tensor_data
                assert known is not None
                if (data.size, data.properties.dtype) != (known.size, known.properties.dtype):
                    raise ValueError(
                        f"'{name}' is {list(data.size)} {data.properties.dtype} on rank {rank}, and "
                        f"{list(known.size)} {known.properties.dtype} on another"
                    )
                boxes = held.setdefault(name, [[] for _ in all_plans])
                boxes[rank].append(Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
        load = [0] * len(all_plans)
        shared: list[list[WriteItem]] = [[] for _ in all_plans]
        buffers = set().union(*(plan.planner_data or () for plan in all_plans))
        for name, item in first.items():
            data = item.tensor_data
            assert data is not None
            item_bytes = data.properties.dtype.itemsize
            try:
                parts = share_out(held[name], data.size.numel(), item_bytes, load, spread=name not in buffers)
            except ValueError as error:
                raise ValueError(f"'{name}': {error}") from error
            for rank, mine in enumerate(parts):
                shared[rank] += [_item(item, box) for box in mine]
        return create_default_global_save_plan([SavePlan(items) for items in shared])

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        kept = self._kept.pop(write_item.index, None)
        if kept is not None:
            return kept
        data = write_item.tensor_data
        assert data is not None and data.chunk is not None
        wanted = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        for offsets, view in self._tensors[write_item.index.fqn].held:
            if Box(offsets, tuple(view.shape)).holds(wanted):
                for dim, (offset, size) in enumerate(zip(wanted.offsets, wanted.sizes, strict=True)):
                    view = view.narrow(dim, offset - offsets[dim], size)
                return view.detach()
        raise AssertionError(f"{write_item.index} is to be written by a rank that doesn't hold it")

    def snapshot(self, plan: SavePlan) -> None:
        """Copies, in the memory of the CPU, of what this rank writes; the model may change from then on."""
        kept = {item.index: self.resolve_data(item).to("cpu", copy=True).contiguous() for item in plan.items}
        self._kept, self._tensors = kept, {}


def _item(item: WriteItem, box: Box) -> WriteItem:
    assert item.tensor_data is not None
    chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
    index = MetadataIndex(item.index.fqn, chunk.offsets)
    return replace(item, index=index, tensor_data=replace(item.tensor_data, chunk=chunk))
