"""PyTorch's own suite for torch.distributed, on the backend "pypar" with 3 ranks.

table.txt has a line per test: `run`, `run with N ranks`, or `skip` and the reason. A test that is skipped starts no
process; one that should run and skips itself fails.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pypar import backend

HERE = Path(__file__).parent
LIMIT_S = 120
# What the decorators of a test must contain for the reason to be true.
EVIDENCE = {
    r"needs (a GPU|\d GPUs)": r"gpu|nccl|mpi",
    r"needs NCCL": r"nccl",
    r"needs torchvision": r"skipIfNoTorchVision",
    r"switched off by PyTorch": r"unittest\.skip",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not backend.available(), reason="needs the compiled extension"),
    pytest.mark.timeout(LIMIT_S + 120),
]


def read_table() -> dict[str, str]:
    return dict(line.split(": ", 1) for line in (HERE / "table.txt").read_text().splitlines())


TABLE = read_table()


class Server:
    """server.py, which forks the ranks of each test from a process that has torch imported."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), "pypar"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.tests: dict[str, str] = self.read()["tests"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server of the suite died with exit code {self.process.wait()}"
        return json.loads(line)

    def run(self, test: str, world_size: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(
            json.dumps({"test": test, "world_size": world_size, "limit_s": LIMIT_S}),
            file=self.process.stdin,
            flush=True,
        )
        return self.read()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.communicate()


def test_table_names_every_test_with_a_true_reason(server: Server) -> None:
    assert server.tests.keys() == TABLE.keys()
    for test, verdict in TABLE.items():
        if verdict.startswith("skip, "):
            reason = next(reason for reason in EVIDENCE if re.search(reason, verdict))
            assert re.search(EVIDENCE[reason], server.tests[test], re.IGNORECASE), f"{test}: {verdict}"


@pytest.mark.parametrize("test", TABLE)
def test_suite(test: str, request: pytest.FixtureRequest) -> None:
    verdict = TABLE[test]
    if verdict.startswith("skip, "):
        pytest.skip(verdict.removeprefix("skip, "))
    ranks = re.fullmatch(r"run(?: with (\d) ranks)?", verdict)
    assert ranks, f"table.txt: {test}: {verdict}"
    result = request.getfixturevalue("server").run(test, int(ranks[1] or 3))
    assert not any(result["codes"]), f"exit codes {result['codes']}\n{result['output']}"
