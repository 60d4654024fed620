"""python -m bench.gpu: the kernels' suite on this machine's GPUs, their times and rooflines, and one report of it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the executors

from kernels.executors import EXECUTORS, Executor  # noqa: E402

from bench.gpu import measure, report  # noqa: E402
from bench.gpu.limits import Reached  # noqa: E402
from pypar.testing import RankFailed, run_ranks  # noqa: E402

SUITE = "tests/kernels/test_executors.py"


def run_tests(executor: str, folder: Path, select: str) -> list[tuple[str, str, str]]:
    """(name, outcome, why) of every test of the executor; a run that doesn't start is one failed test."""
    xml = folder / "tests.xml"
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", SUITE, "-k", select, f"--junitxml={xml}", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (folder / "tests.log").write_text(done.stdout + done.stderr)
    if not xml.exists():
        return [(f"pytest of {executor}", "failed", (done.stderr or done.stdout).strip()[-300:])]
    cells = []
    for case in ElementTree.parse(xml).iter("testcase"):
        outcome, why = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                outcome, why = "failed", child.get("message") or ""
            elif child.tag == "skipped":
                outcome, why = "skipped", child.get("message") or ""
        cells.append((case.get("name") or "", outcome, why))
    return cells


def run_sanitizer(executor: Executor, folder: Path, select: str) -> str:
    """One sentence; the whole output lies beside the report."""
    tool = shutil.which("compute-sanitizer")
    if executor.device != "cuda":
        return "compute-sanitizer: not for this executor, which has no GPU."
    if tool is None:
        return "compute-sanitizer is not here: skipped."
    said = []
    for kind in ("memcheck", "racecheck"):
        command = [tool, f"--tool={kind}", "--target-processes=all", "--error-exitcode=9", sys.executable]
        command += ["-m", "pytest", "-q", SUITE, "-k", f"{select} and all_reduce"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        (folder / f"{kind}.log").write_text(done.stdout + done.stderr)
        said.append(f"{kind}: {'no errors' if done.returncode == 0 else f'FAILED, see {kind}.log'}")
    return f"compute-sanitizer {'; '.join(said)}."


def machine(executor: Executor) -> str:
    lines = [f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"]
    if executor.device == "cuda":
        lines += [f"GPU {i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
        lines.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
        lines.append(f"CUDA_DEVICE_MAX_CONNECTIONS {os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS', 'not set')}")
    else:
        lines.append(f"executor {executor.name}, on a CPU: times of a GPU are not what this is")
    return "\n".join(f"- {line}" for line in lines)


def time_all(executor: Executor, world: int, folder: Path, small: bool, rounds: int) -> str:
    """Leaves folder/times.json, as far as it got; "" or why it didn't get to the end."""
    (folder / "times.json").unlink(missing_ok=True)
    os.environ.update(executor.environment)
    try:
        run_ranks(
            measure.rows, world, executor.name, small, rounds, str(folder), backend=executor.backend, timeout_s=120,
            limit_s=1800,
        )  # fmt: skip
    except RankFailed as error:
        return str(error)
    return ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--executor", default="cuda", choices=sorted(EXECUTORS), help="who runs the kernels")
    parser.add_argument("--ranks", type=int, default=0, help="default: all GPUs, 2 without")
    parser.add_argument("--rounds", type=int, default=7, help="of each timing, in turn with the others")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU that only tests this program")
    parser.add_argument("--select", default="", help="which tests, as pytest's -k; default: all of the executor")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu")
    arguments = parser.parse_args(argv)
    executor = EXECUTORS[arguments.executor]
    world = arguments.ranks or max(2, torch.cuda.device_count())
    why = executor.lacks(world)
    if why:
        print(f"python -m bench.gpu: {executor.name} can't run here: {why}", file=sys.stderr)
        return 2
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    select = arguments.select or executor.name
    print(f"{executor.name}: the suite, `{select}` ...", flush=True)
    cells = run_tests(executor.name, folder, select)
    sanitized = run_sanitizer(executor, folder, select)
    print(f"{executor.name}: times on {world} ranks ...", flush=True)
    failure = time_all(executor, world, folder, arguments.small, arguments.rounds)
    measured = json.loads((folder / "times.json").read_text()) if (folder / "times.json").exists() else {}
    rows = measured.get("rows", [])
    parts = [
        f"# pypar's GPU kernels on {executor.name}, {datetime.date.today()}",
        machine(executor),
        "## Tests",
        report.tests_table(cells),
        sanitized,
        "## Times",
        f"{world} ranks, medians of {arguments.rounds} rounds in turn, verified against torch before they were timed.",
    ]
    if rows:
        report.write_csv(rows, folder / "times.csv")
        report.chart(rows, f"{executor.name}, {world} ranks", folder / "times.png")
        parts += [
            report.limits_table(Reached(**measured["reached"])),
            report.bench_table(rows),
            "![share of the limits](times.png)",
        ]
    if failure:
        parts.append(f"The timing failed, after what is above:\n\n```\n{failure}\n```")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    print(f"{folder / 'report.md'}")
    return 1 if failure or any(outcome == "failed" for _, outcome, _ in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
