"""save and load: a checkpoint of full tensors, written under one plan and read under any other."""

from __future__ import annotations

import io
import json
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter, Metadata, SavePlan

from pypar import rng
from pypar.hybrid import folder
from pypar.hybrid.held import Holding, States
from pypar.hybrid.model import HybridModel
from pypar.hybrid.planner import SharedOutPlanner
from pypar.hybrid.together import CheckpointError, InBackground, Together, reason

# Of a model, the save that may be on its way; not an attribute of the model, which would no longer copy and pickle.
_SAVING: WeakKeyDictionary[nn.Module, Future[Path]] = WeakKeyDictionary()


def save(
    path: str | PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: Any = None,
    async_save: bool = False,
) -> Future[Path] | None:
    """Writes a checkpoint of the full model, which pypar.load reads under any plan and number of ranks. Collective of
    all ranks of the job, between two steps.

    path        a folder on a file system that all ranks share; a checkpoint in it is replaced when this one is whole
    model       of pypar.parallelize; or a plain module, or one in pypar.Zero, DataParallel or Pipeline
    optimizer   of that model, with its states, settings and step counts; None: weights alone
    extra       of rank 0, whatever torch.load(weights_only=True) reads: numbers, text, lists, dicts, tensors. For the
                step, the position in the data, the state of a scheduler
    async_save  True: a snapshot is taken and written in the background; returns a Future, whose result() is the path.
                The next save of the model waits for it

    Every element is written by one rank. Weights have the full model's names, tied ones the first of theirs. Also
    kept: float32 masters of a bfloat16 plan, and the random states of every rank (torch, random, numpy).
    Raises CheckpointError, on every rank and with the reason of the one that failed; the checkpoint before is whole.
    """
    target = Path(path)
    together = Together(f"cannot save {target}")
    wait([_SAVING[model]] if model in _SAVING else [])
    saving = _Saving(target, model, optimizer, extra, together)
    if not async_save:
        saving.write(together)
        return None
    together.all(saving.snapshot)
    background = InBackground(together.what, saving.token)
    future: Future[Path] = Future()
    _SAVING[model] = future

    def run() -> None:
        try:
            future.set_result(saving.write(background))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="pypar-checkpoint").start()
    return future


@dataclass
class _Local:
    """What a rank tells rank 0."""

    plan: SavePlan
    keys: dict[str, list[str]]
    scalars: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    random: dict[str, Any]


class _Saving:
    """A save that is planned, from then on without collective calls."""

    def __init__(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: Any, together: Together
    ):
        self.path, self.rank, self.world_size = path, together.rank, together.world_size
        self._plan_text = str(model.plan) if isinstance(model, HybridModel) else None
        self._optimizer_name: str | None = None
        self._config: dict[str, Any] | None = None
        self._extra = extra
        self._metadata: Metadata | None = None
        self._files: dict[str, bytes] = {}  # that rank 0 writes
        self._data: Path | None = None
        try:
            self.plan, name, self.token = together.spread(lambda: self._local(model, optimizer), self._combine)
        except BaseException:
            self._abandon()
            raise
        self._data = path / name

    def _local(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> _Local:
        holding = Holding(model, optimizer)
        states = holding.states() if optimizer is not None else States({}, {}, {}, [])
        if holding.optimizer is not None:
            self._optimizer_name = type(getattr(holding.optimizer, "inner", holding.optimizer)).__name__
        config = getattr(holding.module, "config", None)
        if callable(getattr(config, "to_dict", None)):
            self._config = config.to_dict()  # type: ignore[union-attr]
            if not self._config.get("architectures"):  # type: ignore[union-attr]
                self._config["architectures"] = [type(holding.module).__name__]  # type: ignore[index]
        self._planner = SharedOutPlanner({f"model.{name}" for name, _ in holding.buffers()})
        self._planner.set_up_planner({**holding.weights(), **states.tensors})
        return _Local(
            self._planner.create_local_plan(), states.keys, states.scalars, states.groups, rng.capture(_device(model))
        )

    def _combine(self, everyone: list[_Local]) -> list[tuple[SavePlan, str, str]]:
        """On rank 0."""
        plans, self._metadata = self._planner.create_global_plan([each.plan for each in everyone])
        state = {
            "keys": _merged([each.keys for each in everyone]),
            "scalars": _merged([each.scalars for each in everyone]),
            "groups": _groups([each.groups for each in everyone]),
            "random": [each.random for each in everyone],
            "extra": self._extra,
        }
        self._files[folder.STATE] = _packed(state)
        if self._config is not None:
            self._files[folder.CONFIG] = json.dumps(self._config, indent=1, sort_keys=True, default=str).encode()
        self._data = folder.begin(self.path)
        plans = FileSystemWriter(self._data).prepare_global_plan(plans)
        token = uuid.uuid4().hex
        return [(plan, self._data.name, token) for plan in plans]

    def snapshot(self) -> None:
        self._planner.snapshot(self.plan)

    def write(self, together: Together) -> Path:
        """Raises CheckpointError."""
        try:
            return together.spread(self._write, self._commit)
        except BaseException:
            self._abandon()
            raise

    def _write(self) -> tuple[list[Any], dict[str, Any]]:
        data = self._data
        assert data is not None
        if not data.is_dir():
            raise CheckpointError(f"there is no {data} here: the folder must lie on a file system that all ranks share")
        writer = FileSystemWriter(data)
        writer.set_up_storage_writer(self.rank == 0)
        results = writer.write_data(self.plan, self._planner).value()
        for name, content in self._files.items():
            folder.write(data / name, content)
        names = [path.name for path in data.glob(f"__{self.rank}_*")] + list(self._files)
        return results, {name: folder.measure(data / name) for name in names}

    def _commit(self, everyone: list[tuple[list[Any], dict[str, Any]]]) -> list[Path]:
        """On rank 0."""
        assert self._data is not None and self._metadata is not None
        writer = FileSystemWriter(self._data)
        writer.set_up_storage_writer(True)
        writer.finish(self._metadata, [results for results, _ in everyone])
        files = _merged([files for _, files in everyone])
        files[".metadata"] = folder.measure(self._data / ".metadata")
        manifest = {
            "world_size": self.world_size,
            "plan": self._plan_text,
            "optimizer": self._optimizer_name,
            "torch": torch.__version__,
            "files": files,
        }
        folder.commit(self._data, manifest)
        return [self.path] * self.world_size

    def _abandon(self) -> None:
        if self.rank == 0 and self._data is not None:
            folder.abandon(self._data)


def load(path: str | PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Reads what pypar.save wrote, whatever its plan, into this model and optimizer; returns its `extra`. Collective of
    all ranks of the job.

    Every rank reads what it holds. Weights are bit-equal, and so is the optimizer. Random states are each rank's own
    where there are as many ranks as when it was saved, and else rank 0's on all. Where the checkpoint has float32
    masters, they are the weights of a float32 model.
    Raises CheckpointError, on every rank: a damaged or missing file, another format, another model (the first name
    that is missing or has another shape), another optimizer or other parameter groups. Nothing has changed then.
    """
    source = Path(path)
    together = Together(f"cannot load {source}")
    size, rank = together.world_size, together.rank
    manifest = together.spread(lambda: None, lambda _: [folder.read_manifest(source)] * size)
    data = source / manifest["data"]
    together.all(lambda: folder.check_files(data, manifest["files"], rank, size))
    reader = FileSystemReader(data)
    read: list[tuple[Metadata, dict[str, Any], Holding]] = []

    def check() -> list[str]:
        metadata = reader.read_metadata()
        state = torch.load(data / folder.STATE, weights_only=True)
        holding = Holding(model, optimizer)
        stored = metadata.state_dict_metadata
        _check_weights(holding, stored)
        if optimizer is not None:
            _check_optimizer(holding, manifest["optimizer"], state["groups"])
        read.append((metadata, state, holding))
        return list(holding.shapes())

    names = {f"model.{name}" for each in together.all(check) for name in each}
    ((metadata, state, holding),) = read
    stored = metadata.state_dict_metadata
    unknown = [n for n in stored if n.startswith("model.") and n not in names]
    if unknown:
        name, shape = unknown[0].removeprefix("model."), list(stored[unknown[0]].size)  # type: ignore[union-attr]
        raise CheckpointError(f"{together.what}: it is of another model: it has '{name}' {shape}, the model has not")

    def fill() -> None:
        wanted = holding.wanted_weights(stored)
        if optimizer is not None:
            wanted |= holding.wanted_states(state["keys"], stored)
        read_tensors(reader, metadata, wanted)
        if optimizer is not None:
            holding.take_scalars(state["scalars"], state["groups"])

    together.all(fill)
    holding.settle()
    random = state["random"]
    rng.restore(random[rank if len(random) == size else 0], _device(model))
    return state["extra"]


@torch.no_grad()
def read_tensors(reader: FileSystemReader, metadata: Metadata, wanted: Mapping[str, torch.Tensor]) -> None:
    """Fills the tensors, without a collective call."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(wanted), metadata, False)
    reader.set_up_storage_reader(metadata, False)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()


def _check_weights(holding: Holding, stored: Mapping[str, Any]) -> None:
    for name, shape in holding.shapes().items():
        if not shape.numel():
            continue
        found = stored.get(f"model.{name}")
        if found is None:
            raise CheckpointError(f"it is of another model: it has no '{name}', which is {list(shape)} here")
        if torch.Size(found.size) != shape:
            raise CheckpointError(
                f"it is of another model: '{name}' is {list(found.size)} there, and {list(shape)} here"
            )


def _check_optimizer(holding: Holding, name: str | None, groups: list[dict[str, Any]]) -> None:
    here = type(getattr(holding.optimizer, "inner", holding.optimizer)).__name__
    if name is None:
        raise CheckpointError("it has weights alone; leave the optimizer out")
    if name != here:
        raise CheckpointError(f"its optimizer is {name}, and the one here {here}; leave the optimizer out")
    mine = holding.groups()
    if len(mine) != len(groups):
        raise CheckpointError(f"its optimizer has {len(groups)} parameter groups, the one here {len(mine)}")
    there = {name: number for number, group in enumerate(groups) for name in group["params"]}
    for number, group in enumerate(mine):
        for name in group["params"]:
            if there.get(name) != number:
                where = f"group {there[name]}" if name in there else "no group"
                raise CheckpointError(f"'{name}' is in {where} of its optimizer, and in group {number} here")


def _merged(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the ranks in turn, the first that has a name."""
    found: dict[str, Any] = {}
    for mine in each:
        for name, value in mine.items():
            found.setdefault(name, value)
    return found


def _groups(each: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Settings of rank 0, names of all."""
    for rank, groups in enumerate(each):
        if len(groups) != len(each[0]):
            raise CheckpointError(f"rank {rank} has {len(groups)} parameter groups, and rank 0 {len(each[0])}")
    return [
        {**group, "params": list(dict.fromkeys(name for groups in each for name in groups[number]["params"]))}
        for number, group in enumerate(each[0])
    ]


def _packed(state: dict[str, Any]) -> bytes:
    """Raises CheckpointError for what would not be read again."""
    for name, value in state.items():
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except Exception as error:
            what = "extra" if name == "extra" else f"the optimizer's {name}"
            raise CheckpointError(
                f"{what} holds what torch.load(weights_only=True) does not read; give numbers, text, lists, dicts and "
                f"tensors: {reason(error)[:200]}"
            ) from error
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
