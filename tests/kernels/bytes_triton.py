"""Bytes that the Triton kernels load and store, counted in the interpreter: every access, masks respected.

An access is told by its address: the peers' channels, the own slots and tensors. The own flags and the table of
addresses are left out: how often a flag is looked at is chance. The kernels that run are those that are released.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from kernels import bytes_least as least
from kernels.bytes_least import Least, Moved

from pypar.channel import Channel, data_offset
from pypar.testing import run_ranks

WORLD = 2
NUMEL = 20002  # as in bytes_cuda
M, N, K = 120, 168, 72  # tiles of 64: none fits
T, COLUMNS = 100, 500
Mutation = tuple[str, str, str]  # module of triton_kernels, what its text says, what it is to say
Counts = dict[str, int]


class Counter:
    """While it is active, accesses of kernels on that channel are added to `counts`."""

    def __init__(self, channel: Channel) -> None:
        slots = data_offset(channel.world_size)
        bytes_ = slots + 2 * channel.slot_bytes
        addresses, own = channel.pointers.tolist(), channel.pointers.tolist()[channel.rank]
        table = channel.pointers.data_ptr()
        self.ignored = [(own, own + slots), (table, table + 8 * channel.world_size)]
        self.peers = [(a, a + bytes_) for i, a in enumerate(addresses) if i != channel.rank]
        self.counts: Counts = dict.fromkeys(("read", "written", "to_peers", "from_peers"), 0)

    def _add(self, ptr: Any, mask: Any, local: str, remote: str) -> None:
        at = np.atleast_1d(ptr.data)
        if mask is not None:
            at = at[np.broadcast_to(np.atleast_1d(mask.data), at.shape)]
        each = max(1, ptr.get_element_ty().primitive_bitwidth // 8)

        def inside(ranges: list[tuple[int, int]]) -> np.ndarray:
            return sum(((at >= begin) & (at < end) for begin, end in ranges), np.zeros(at.shape, bool))

        theirs, ignored = inside(self.peers), inside(self.ignored)
        self.counts[remote] += each * int(theirs.sum())
        self.counts[local] += each * int((~theirs & ~ignored).sum())

    def load(self, ptr: Any, mask: Any) -> None:
        self._add(ptr, mask, "read", "from_peers")

    def store(self, ptr: Any, mask: Any) -> None:
        self._add(ptr, mask, "written", "to_peers")

    @contextlib.contextmanager
    def active(self) -> Iterator[Counts]:
        """Of a descriptor's accesses the interpreter makes masked ones, and of unmasked ones such with a full mask."""
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        from pypar.triton_kernels import copy_engine

        load, store, rmw = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw
        cas, memory_at = Builder.create_atomic_cas, copy_engine.memory_at

        def masked_load(builder: Any, ptrs: Any, mask: Any, *more: Any, **options: Any) -> Any:
            self.load(ptrs, mask)
            return load(builder, ptrs, mask, *more, **options)

        def masked_store(builder: Any, ptrs: Any, value: Any, mask: Any, *more: Any) -> Any:
            self.store(ptrs, mask)
            return store(builder, ptrs, value, mask, *more)

        def atomic_rmw(builder: Any, op: Any, ptr: Any, val: Any, mask: Any, *more: Any) -> Any:
            self.store(ptr, mask)
            return rmw(builder, op, ptr, val, mask, *more)

        def atomic_cas(builder: Any, ptr: Any, *more: Any) -> Any:
            self.store(ptr, None)
            return cas(builder, ptr, *more)

        def copied_to(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
            self.counts["read"] += num_bytes
            self.counts["to_peers"] += num_bytes
            return memory_at(address, num_bytes, device)

        Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
        Builder.create_atomic_rmw, Builder.create_atomic_cas = atomic_rmw, atomic_cas
        copy_engine.memory_at = copied_to
        try:
            yield self.counts
        finally:
            Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw = load, store, rmw
            Builder.create_atomic_cas, copy_engine.memory_at = cas, memory_at


def module_of(name: str, mutation: Mutation | None, folder: str) -> ModuleType:
    """pypar.triton_kernels.<name>, or a copy of it with the mutation."""
    module = importlib.import_module(f"pypar.triton_kernels.{name}")
    if mutation is None or mutation[0] != name:
        return module
    _, old, new = mutation
    text = Path(str(module.__file__)).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{name}.py has {text.count(old)} times '{old}', expected 1")
    path = Path(folder) / f"{name}_mutated.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"pypar.triton_kernels.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def matrices(rank: int, rows: int, columns: int, k: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes = {"x": (rows, k), "w": (columns, k), "bias": (columns,), "residual": (rows, columns)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def calls(rank: int, find: Callable[[str], ModuleType]) -> dict[str, tuple[str, Callable[..., Any]]]:
    """Name of a row: the dtype, and the call, given where it runs."""
    from pypar.triton_kernels.matmul_tile import Config

    tiles = Config(block_m=64, block_n=64, block_k=32, programs=2, rows=16, cols=64)
    with_tma = Config(block_m=64, block_n=64, block_k=32, programs=2, rows=16, cols=64, tma=True)
    own, whole = matrices(rank, M // WORLD, N, K), matrices(rank, M, N, K)
    logits = torch.randn(T, COLUMNS, generator=torch.Generator().manual_seed(rank)).bfloat16()
    target = torch.randint(0, WORLD * COLUMNS, (T,), generator=torch.Generator().manual_seed(9))
    shard = {"begin": rank * COLUMNS, "vocabulary": WORLD * COLUMNS, "ignore_index": -100}

    def reduce(algorithm: str, dtype: torch.dtype) -> Callable[..., Any]:
        return lambda at: find("all_reduce").all_reduce(torch.ones(NUMEL, dtype=dtype), "sum", algorithm, **at)

    def gather(at: dict[str, Any], config: Config, copied: bool) -> Any:
        addresses = at["pointers"].tolist() if copied else None
        run = find("all_gather_matmul").all_gather_matmul
        return run(own["x"], [own["w"]], **at, biases=[own["bias"]], config=config, addresses=addresses)

    def scatter(at: dict[str, Any], config: Config) -> Any:
        run = find("matmul_reduce_scatter").matmul_reduce_scatter
        return run(whole["x"], whole["w"], **at, bias=whole["bias"], residual=own["residual"], config=config)

    def matmul_reduce(at: dict[str, Any], one_step_bytes: int) -> Any:
        module = find("matmul_all_reduce")
        module.ONE_STEP_BYTES = one_step_bytes
        run = module.matmul_all_reduce
        return run(whole["x"], whole["w"], **at, bias=whole["bias"], residual=whole["residual"], config=tiles)

    def loss(at: dict[str, Any], smoothing: float) -> Any:
        return find("vocab_cross_entropy").vocab_cross_entropy(logits, target, **at, **shard, label_smoothing=smoothing)

    def dlogits(at: dict[str, Any]) -> Any:
        stats = torch.stack([torch.zeros(T), torch.ones(T)])
        run = find("vocab_cross_entropy").vocab_cross_entropy_dlogits
        return run(logits, target, stats, torch.ones(()), **shard, label_smoothing=0.0)

    return {
        "all_reduce one_shot": ("float32", reduce("one_shot", torch.float32)),
        "all_reduce two_shot": ("float32", reduce("two_shot", torch.float32)),
        "all_reduce two_shot, halves": ("bfloat16", reduce("two_shot", torch.bfloat16)),
        "all_gather_matmul, pushed by a kernel": ("bfloat16", lambda at: gather(at, tiles, False)),
        "all_gather_matmul, pushed by copies": ("bfloat16", lambda at: gather(at, tiles, True)),
        "all_gather_matmul, w through descriptors": ("bfloat16", lambda at: gather(at, with_tma, False)),
        "matmul_reduce_scatter": ("bfloat16", lambda at: scatter(at, tiles)),
        "matmul_reduce_scatter, through descriptors": ("bfloat16", lambda at: scatter(at, with_tma)),
        "matmul_all_reduce in one step": ("bfloat16", lambda at: matmul_reduce(at, 256 << 10)),
        "matmul_all_reduce in two steps": ("bfloat16", lambda at: matmul_reduce(at, 0)),
        "vocab_cross_entropy": ("bfloat16", lambda at: loss(at, 0.0)),
        "vocab_cross_entropy, smoothed": ("bfloat16", lambda at: loss(at, 0.1)),
        "vocab_cross_entropy_dlogits": ("bfloat16", dlogits),
    }


def count_in_rank(
    rank: int, world: int, only: str, mutation: Mutation | None, folder: str
) -> dict[str, tuple[str, Counts]]:
    from kernels import triton_matmul_executor as ex

    found = {}
    for name, (dtype, call) in calls(rank, lambda module: module_of(module, mutation, f"{folder}/{rank}")).items():
        if not name.startswith(only):
            continue
        channel = ex.channel(name, 1 << 19)
        with Counter(channel).active() as counts:
            call(ex.where(channel))
        channel.check()
        found[name] = dtype, counts
    return found


def shape_and_least(name: str, item: int) -> tuple[str, Least]:
    op = name.split(",")[0].split(" ")[0]
    if op == "all_reduce":
        return f"[{NUMEL}]", least.all_reduce(NUMEL, item, WORLD)
    if op.startswith("vocab"):
        return f"[{T}, {COLUMNS}]", getattr(least, op)(T, COLUMNS, item, WORLD)
    return f"M {M}, N {N}, K {K}", getattr(least, op)(M, N, K, item, WORLD)


def count(only: str = "", mutation: Mutation | None = None, folder: str = "") -> list[Moved]:
    """only: what the rows' names begin with. folder: for the mutated module, one below it for each rank."""
    for rank in range(WORLD if mutation else 0):
        (Path(folder) / str(rank)).mkdir(exist_ok=True)
    ranks = run_ranks(count_in_rank, WORLD, only, mutation, folder)
    rows = []
    for name, (dtype, _) in ranks[0].items():
        shape, needed = shape_and_least(name, torch.empty(0, dtype=getattr(torch, dtype)).element_size())
        counts = [found[name][1] for found in ranks]
        mean = {kind: sum(of_rank[kind] for of_rank in counts) / WORLD for kind in counts[0]}
        rows.append(Moved("Triton", name, shape, dtype, **mean, least=needed))
    return rows


@functools.cache
def rows() -> list[Moved]:
    return count()
