"""What a rank holds of a full tensor, in the form that torch.distributed.checkpoint saves and loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from pypar.zero.partition import boxes


class ShardTensor(torch.Tensor):
    """Stands for a full tensor in a state dict; its data are flat ranges of elements that lie on this rank.

    For torch.distributed.checkpoint alone, which asks for chunks and their data: no operator takes it. A flat range of
    a tensor is a few boxes of it, so that the checkpoint is one of full tensors: it loads under any other sharding, and
    into a plain model.
    """

    parts: list[tuple[int, torch.Tensor]]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, parts: Sequence[tuple[int, torch.Tensor]]
    ) -> ShardTensor:
        """parts: (number of the first element in the full tensor, the elements, flat), of what is here."""
        device = parts[0][1].device if parts else torch.device("cpu")
        made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        made.parts = list(parts)
        return made

    def _boxes(self) -> list[tuple[ChunkStorageMetadata, torch.Tensor]]:
        found = []
        for start, flat in self.parts:
            at = 0
            for offsets, sizes in boxes(self.shape, start, start + flat.numel()):
                numel = math.prod(sizes)
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                found.append((chunk, flat[at : at + numel].view(sizes)))
                at += numel
        return found

    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk, _ in self._boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for chunk, data in self._boxes():
            if chunk.offsets == index.offset:
                return data
        raise ValueError(f"pypar.Zero: '{index.fqn}' has no chunk at {index.offset} on this rank")

    def __repr__(self) -> str:  # type: ignore[override]
        held = ", ".join(f"[{start}, {start + flat.numel()})" for start, flat in self.parts)
        return f"ShardTensor({self.dtype}{list(self.shape)}, elements {held or 'none'})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].shape, args[0].dtype, args[0].parts)
        raise NotImplementedError(
            f"pypar.Zero: {func} of a sharded state: it is for torch.distributed.checkpoint; "
            "full_state_dict() gives ordinary tensors"
        )
