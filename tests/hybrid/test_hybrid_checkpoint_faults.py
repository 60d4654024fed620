"""Saves that are killed or fail, checkpoints that are damaged or another model's: what every rank is told."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid.hybrid_common import make_batches, make_model
from torch import nn

import pypar
from pypar.hybrid import CheckpointError, together
from pypar.testing import _context, run_ranks


def _filled(value: int, features: int = 8) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(features, 8), nn.Linear(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model, torch.optim.SGD(model.parameters(), lr=float(value))


def _value(path: Path) -> int:
    """Of a checkpoint that _filled made, and whose parts are all of one save."""
    model, optimizer = _filled(0)
    value = pypar.load(path, model, optimizer)
    assert all(torch.equal(p, torch.full_like(p, value)) for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == value
    return value


def _said(run: Callable[[], Any]) -> str:
    try:
        run()
    except CheckpointError as error:
        return str(error)
    return ""


# -- killed ------------------------------------------------------------------------------------------------------------


def _killed_at(path: str, number: int) -> None:
    """Saves, and is killed before its number-th change of files."""
    left = [number]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
        if event == "open" and isinstance(args[2], int):
            writes = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and str(path) in str(args[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    pypar.save(path, *_filled(2), extra=2)
    os._exit(0)


def test_a_save_that_is_killed_at_any_change_leaves_the_one_before(tmp_path: Path):
    path = tmp_path / "ckpt"
    killed, seen = 0, []
    for number in range(1, 60):
        pypar.save(path, *_filled(1), extra=1)  # cleans what the killed one left
        assert sorted(p.name[:5] for p in path.iterdir()) == ["data-", "manif"]
        process = _context().Process(target=_killed_at, args=(str(path), number))
        process.start()
        process.join()
        seen.append(_value(path))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
    assert process.exitcode == 0 and killed > 8
    assert seen == sorted(seen) and seen[0] == 1 and seen[-1] == 2  # the old one, until the new one is there


def _save_for_ever(path: str) -> None:
    for value in range(1, 1 << 20):
        pypar.save(path, *_filled(value), extra=value)


def test_saves_that_are_killed_at_some_moment(tmp_path: Path):
    path, last = tmp_path / "ckpt", 0
    for delay_s in (0.05, 0.09, 0.13):
        process = _context().Process(target=_save_for_ever, args=(str(path),))
        process.start()
        end = time.monotonic() + 60
        while not ((path / "manifest.json").exists() and _quietly(path) != last) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(delay_s)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        last = _value(path)
        assert last >= 1


def _quietly(path: Path) -> int:
    try:
        return int(json.loads((path / "manifest.json").read_text())["data"].removeprefix("data-"))
    except (OSError, ValueError):
        return 0


def _one_is_killed(rank: int, world: int, path: str) -> str:
    model, optimizer = pypar.parallelize(make_model("own", layers=2), "dp=2 zero=2", torch.optim.AdamW)
    pypar.save(path, model, optimizer, extra=1)
    if rank == 1:
        from pypar.hybrid import folder

        folder.measure = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,return-value]
    try:
        pypar.save(path, model, optimizer, extra=2)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_rank_that_is_killed_while_saving(tmp_path: Path):
    path = tmp_path / "ckpt"
    said, _, failures = run_ranks(_one_is_killed, 2, str(path), expect_failure=True)
    assert list(failures) == [1] and said
    model = make_model("own", layers=2)
    assert pypar.load(path, model) == 1
    pypar.save(path, model, extra=3)
    assert len(list(path.glob("data-*"))) == 1


# -- failing -----------------------------------------------------------------------------------------------------------


def _disk_full(rank: int, world: int, path: str) -> list[str]:
    model, optimizer = pypar.parallelize(make_model("own"), "dp=2 zero=1", torch.optim.AdamW)
    model.train_step(model.local_batch(make_batches(1, 4)[0]))
    optimizer.step()
    pypar.save(path, model, optimizer, extra=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:  # as of a disk that is full: the write itself fails
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    said = [_said(lambda: pypar.save(path, model, optimizer, extra=2))]
    future = pypar.save(path, model, optimizer, extra=3, async_save=True)
    assert future is not None
    said.append(_said(future.result))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert pypar.load(path, model, optimizer) == 1
    pypar.save(path, model, optimizer, extra=4)
    assert pypar.load(path, model, optimizer) == 4
    return said


def test_a_disk_that_is_full_on_one_rank(tmp_path: Path):
    zero, one = run_ranks(_disk_full, 2, str(tmp_path / "ckpt"))
    assert zero == one
    assert all(re.search(r"cannot save .*ckpt: rank 1: .*", each) for each in zero), zero
    assert [p.name[:5] for p in sorted((tmp_path / "ckpt").iterdir())] == ["data-", "manif"]


def _no_permission(rank: int, world: int, path: str) -> str:
    model, _ = _filled(2)
    if rank == 1:
        os.seteuid(65534)
    said = _said(lambda: pypar.save(path, model))
    os.seteuid(0)
    return said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone without the right")
def test_no_permission_on_one_rank(tmp_path: Path):
    path = tmp_path / "ckpt"
    pypar.save(path, *_filled(1), extra=1)
    path.chmod(0o700)
    zero, one = run_ranks(_no_permission, 2, str(path))
    assert zero == one and "rank 1: " in zero
    assert _value(path) == 1


def _files(rank: int, world: int, folder: str) -> dict[str, str]:
    model, optimizer = pypar.parallelize(make_model("own", layers=2), "dp=2 zero=1", torch.optim.AdamW)
    before = pypar.gather_state(model)
    said = {}
    for case in sorted(p.name for p in Path(folder).iterdir()):
        said[case] = _said(lambda case=case: pypar.load(f"{folder}/{case}", model, optimizer))
    said["absent"] = _said(lambda: pypar.load(f"{folder}/absent", model, optimizer))
    after = pypar.gather_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return said


def test_what_is_damaged_or_of_another_model_is_named(tmp_path: Path):
    def write(case: str, model: nn.Module | None = None, optimizer: Any = torch.optim.AdamW) -> Path:
        model = make_model("own", layers=2) if model is None else model
        pypar.save(tmp_path / case, model, None if optimizer is None else optimizer(model.parameters(), lr=1e-3))
        return tmp_path / case

    data = "data-000001"
    path = write("damaged") / data / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    path = write("cut off") / data / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-7])
    (write("missing") / data / ".metadata").unlink()
    path = write("format") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 7}))
    path = write("manifest") / "manifest.json"
    path.write_text(path.read_text()[:40])
    path = write("foreign") / "manifest.json"
    path.write_text('{"format": 1, "files": {}}')
    (tmp_path / "empty").mkdir()
    write("smaller", make_model("own", layers=1))
    write("larger", make_model("own", layers=3))
    write("wider", make_model("own", layers=2, heads=6))
    write("sgd", optimizer=torch.optim.SGD)
    write("weights", optimizer=None)
    write("groups", optimizer=lambda p, lr: torch.optim.AdamW([{"params": [q]} for q in p], lr=lr))
    wanted = {
        "absent": "there is no folder",
        "damaged": f"{data}/__0_0.distcp is damaged: it does not have its recorded sha256",
        "cut off": f"{data}/__0_0.distcp is damaged: it has ",
        "missing": f"{data}/.metadata can't be read: No such file or directory",
        "format": "it has format 7, and this pypar reads 1",
        "manifest": "manifest.json is damaged",
        "foreign": "is no checkpoint of pypar.save",
        "empty": "has no manifest.json: no checkpoint, or one whose first save did not end",
        "smaller": "it is of another model: it has no 'blocks.1.norm1.weight', which is [24] here",
        "larger": "it is of another model: it has 'blocks.2.norm1.weight' [24], the model has not",
        "wider": "it is of another model: 'embed.weight' is [97, 36] there, and [97, 24] here",
        "sgd": "its optimizer is SGD, and the one here AdamW; leave the optimizer out",
        "weights": "it has weights alone; leave the optimizer out",
        "groups": "its optimizer has 35 parameter groups, the one here 1",
    }
    zero, one = run_ranks(_files, 2, str(tmp_path))
    assert zero == one
    wrong = [f"{case}: {zero[case]}" for case, text in wanted.items() if text not in zero[case]]
    wrong += [f"{case}: no folder named" for case in wanted if f"cannot load {tmp_path / case}" not in zero[case]]
    assert not wrong and set(zero) == set(wanted), "\n".join(wrong)


def test_what_can_not_be_saved_is_refused(tmp_path: Path):
    model, optimizer = _filled(1)
    with pytest.raises(CheckpointError, match="extra holds what torch"):
        pypar.save(tmp_path / "a", model, optimizer, extra={"f": Path})
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1.0)
    with pytest.raises(CheckpointError, match=r"steps a parameter \[3\] that is not the model's"):
        pypar.save(tmp_path / "a", model, stranger)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"manifest.json is another program's"):
        pypar.save(tmp_path, model)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="File exists"):
        pypar.save(tmp_path / "file", model)
    assert not list((tmp_path / "a").glob("data-*"))


# -- in the background -------------------------------------------------------------------------------------------------


def _in_background(rank: int, world: int, folder: str) -> None:
    batches = make_batches(4, 8)
    model, optimizer = pypar.parallelize(make_model("own"), "pp=2 dp=2 zero=2 micro_batches=2", torch.optim.AdamW)

    def step(number: int) -> float:
        loss = model.train_step(model.local_batch(batches[number]))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    step(0)
    first = pypar.save(f"{folder}/a", model, optimizer, extra="a", async_save=True)
    assert first is not None
    step(1)  # while it is written
    second = pypar.save(f"{folder}/a", model, optimizer, extra="b", async_save=True)  # waits for the first
    assert second is not None and first.done()
    third_loss = step(2)
    pypar.save(f"{folder}/c", model, optimizer, extra="c")
    assert second.done() and second.result() == first.result() == Path(folder) / "a"
    assert pypar.load(f"{folder}/a", model, optimizer) == "b"
    assert step(2) == third_loss
    third = pypar.save(f"{folder}/d", model, optimizer, extra="d", async_save=True)
    assert third is not None
    assert third.result(60) == Path(folder) / "d"


def test_saving_in_the_background(tmp_path: Path):
    run_ranks(_in_background, 4, str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"a", "c", "d"}


def _silent(rank: int, world: int) -> str:
    together.SILENCE_S, together.ALIVE_S = 1.0, 0.1
    ranks = together.InBackground("cannot save x", "token")
    if rank == 1:
        time.sleep(3)  # neither answers nor shows a sign of life
        return ""
    return _said(lambda: ranks.spread(lambda: rank, lambda all: all))


def _slow(rank: int, world: int) -> int:
    together.SILENCE_S, together.ALIVE_S = 1.0, 0.1
    ranks = together.InBackground("cannot save x", "token")
    return ranks.spread(lambda: time.sleep(2 * rank), lambda all: [10, 11])


def test_a_rank_that_is_gone_is_not_waited_for_for_ever():
    assert run_ranks(_silent, 2)[0] == "cannot save x: rank 1 gave no sign of life for 1 s"
    assert run_ranks(_slow, 2) == [10, 11]
