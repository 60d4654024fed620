"""Which run the ranks go on with that torchrun starts anew (--max-restarts): the one that this launch began.

A start leaves a mark in its run's folder. Without it a start that was refused, because --out holds another run, say,
would be followed by one that goes on with that other run. TORCHELASTIC_RESTART_COUNT does not serve: the agent of one
host does not count a restart that another host's rank caused.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pypar.trainer import checkpoint

NAME = ".launch"


@dataclass(frozen=True)
class Earlier:
    """What an earlier start of this launch has begun. out: the run's folder. old: checkpoints, by name and time of
    change in ns, that lay there before it, of which --resume may have left some behind for another branch."""

    out: Path
    old: frozenset[tuple[str, int]]

    def newest(self) -> Path | None:
        """The newest intact checkpoint that this launch has written."""
        checkpoint.restore(self.out)
        for path in reversed(checkpoint.all_of(self.out)):
            if _key(path) not in self.old and not checkpoint.problem(path):
                return path.absolute()
        return None


def launch() -> str | None:
    """A name of this launch of torchrun, the same in all of its starts; None where it does not start ranks anew.

    The folder that its agent makes for logs: LAUNCH/attempt_N/RANK/error.json is a rank's TORCHELASTIC_ERROR_FILE.
    """
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "/"))
    is_known = len(file.parents) > 2 and file.parents[1].name.startswith("attempt_")
    if not is_known or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return None
    return str(file.parents[2])


def earlier(out: str | None, resume: str | None) -> Earlier | None:
    """Of an earlier start of this launch. out: --out; without it the run that --resume names, or one of runs/."""
    name = launch()
    if name is None:
        return None
    if out:
        runs = [Path(out)]
    else:
        named = [Path(resume), checkpoint.run_of(Path(resume).absolute())] if resume else []
        runs = [run for run in named if run] + sorted(Path("runs").glob("*"))
    for run in runs:
        try:
            mark = json.loads((run / NAME).read_text())
        except (OSError, ValueError):
            continue
        if mark["launch"] == name:
            return Earlier(run.absolute(), frozenset((path, time) for path, time in mark["old"]))
    return None


def remember(out: str) -> None:
    """The first start of a launch has chosen this folder."""
    run, name = Path(out), launch()
    if name is not None:
        aside = run / f"{NAME}.tmp"
        aside.write_text(json.dumps({"launch": name, "old": [_key(path) for path in checkpoint.all_of(run)]}))
        aside.replace(run / NAME)


def _key(path: Path) -> tuple[str, int]:
    return path.name, path.stat().st_mtime_ns
