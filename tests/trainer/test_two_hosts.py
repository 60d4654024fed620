"""torchrun on two hosts of two ranks each, as docs/multi_host.md says, with a rank that is killed on the way.

The hosts are network namespaces of this machine, and PYPAR_NODE_ID keeps their ranks from sharing memory.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from bench import hosts
from pypar import backend
from pypar.trainer.main import main

from .helpers import curve, environment
from .test_elastic import steps_done
from .test_stop import ranks_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")]


@pytest.fixture
def two_hosts():
    try:
        with hosts.TwoHosts() as made:
            yield made.names
    except hosts.NoRights as error:
        pytest.skip(f"no network namespaces here: {error}")


def start_host(number, namespace, options, folder):
    """torchrun of one host. is_host and local-addr say what a resolver does elsewhere: the namespaces have no names."""
    words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "run7", "--rdzv-conf", f"is_host={1 - number}"]
    words += ["--local-addr", f"10.77.0.{number + 1}", "--max-restarts", "2", "-m", "pypar", "train"]
    own = {"PYPAR_NODE_ID": namespace, "GLOO_SOCKET_IFNAME": hosts.INTERFACE}
    with open(folder / f"host{number}.txt", "w") as said:
        return subprocess.Popen(
            [sys.executable, *words, *options, "--cache-dir", str(folder / f"cache{number}")],
            cwd=folder, env=environment() | own, stdout=said, stderr=subprocess.STDOUT,
            preexec_fn=lambda: hosts.enter(namespace),
        )  # fmt: skip


def test_two_hosts_train_as_one_process_and_go_on_after_a_rank_was_killed(options, tmp_path, two_hosts):
    options = [
        *options,
        "--dropout",
        "0",
        "--eps",
        "1e-5",
        "--sample-tokens",
        "0",
        "--steps",
        "24",
        "--save-every",
        "4",
    ]
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    options += ["--tp", "2", "--zero", "1", "--out", "run"]
    agents = [start_host(number, name, options, tmp_path) for number, name in enumerate(two_hosts)]
    said = [tmp_path / "host0.txt", tmp_path / "host1.txt"]
    try:
        deadline = time.monotonic() + 120
        while steps_done(tmp_path / "run") < 10 and time.monotonic() < deadline and agents[0].poll() is None:
            time.sleep(0.02)
        victims = ranks_of(agents[1])
        assert len(victims) == 2, [path.read_text() for path in said]
        os.kill(victims[1], signal.SIGKILL)
        # The host that holds the store may leave first; what the other one's agent then says is no fault of the run.
        assert agents[0].wait(timeout=120) == 0, [path.read_text() for path in said]
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait(timeout=60)
    out = said[0].read_text()
    assert out.count("resumed from") == 1 and "4 ranks (dp 2 x tp 2, ZeRO 1" in out
    found, wanted = curve(tmp_path / "run"), curve(tmp_path / "one")
    assert [(row["split"], row["step"]) for row in found] == [(row["split"], row["step"]) for row in wanted]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted], rel=1e-5)
