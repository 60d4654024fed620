"""What a rank holds of a full tensor, in the form that torch.distributed.checkpoint saves and loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from pypar.zero.partition import boxes

Held = tuple[tuple[int, ...], torch.Tensor]


class ShardTensor(torch.Tensor):
    """Stands for a full tensor in a state dict; its data are boxes of it that lie on this rank.

    For torch.distributed.checkpoint alone, which asks for chunks and their data: no operator takes it. The checkpoint
    is one of full tensors: it loads under any other sharding, and into a plain model.
    """

    held: list[Held]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, held: Sequence[Held]) -> ShardTensor:
        """held: (offsets in the full tensor, a view of the box's elements), of what is here."""
        device = held[0][1].device if held else torch.device("cpu")
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        made.held = list(held)
        return made

    @classmethod
    def of_flat(
        cls, shape: Sequence[int], dtype: torch.dtype, parts: Sequence[tuple[int, torch.Tensor]]
    ) -> ShardTensor:
        """parts: (number of the first element in the full tensor, the elements, flat), of what is here."""
        return cls(shape, dtype, [each for start, flat in parts for each in boxes_of_flat(shape, start, flat)])

    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), data.shape) for offsets, data in self.held]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for offsets, data in self.held:
            if offsets == index.offset:
                return data
        raise ValueError(f"pypar: '{index.fqn}' has no chunk at {index.offset} on this rank")

    def __repr__(self) -> str:  # type: ignore[override]
        held = ", ".join(f"{list(data.shape)} at {list(offsets)}" for offsets, data in self.held)
        return f"ShardTensor({self.dtype}{list(self.shape)}, {held or 'nothing'})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].shape, args[0].dtype, args[0].held)
        raise NotImplementedError(
            f"pypar: {func} of a sharded state: it is for torch.distributed.checkpoint; "
            "full_state_dict() gives ordinary tensors"
        )


def boxes_of_flat(shape: Sequence[int], start: int, flat: torch.Tensor) -> list[Held]:
    """Elements from `start` on of a contiguous tensor of that shape, as boxes, each contiguous."""
    found, at = [], 0
    for offsets, sizes in boxes(shape, start, start + flat.numel()):
        numel = math.prod(sizes)
        found.append((offsets, flat[at : at + numel].view(sizes)))
        at += numel
    return found
