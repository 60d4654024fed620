"""Two emulated hosts on one machine: network namespaces, joined by a veth pair whose rate `tc` limits."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

PREFIX = "pypar"
FOLDER = Path("/run/netns")
INTERFACE = "link0"
CLONE_NEWNET = 0x40000000


class NoRights(RuntimeError):
    """This machine or user can't make network namespaces; says why."""


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NoRights(f"{command[0]} is not installed (iproute2)") from error
    if done.returncode != 0:
        raise NoRights(f"`{' '.join(command)}`: {done.stderr.strip() or done.returncode}")


def enter(namespace: str) -> None:
    """This thread, and those that it starts from now on, are on that host."""
    with open(FOLDER / namespace) as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns({namespace})")


class TwoHosts:
    """A context: made on entry, gone on exit, also after Ctrl-C or SIGTERM. Raises NoRights where that can't be."""

    def __init__(self) -> None:
        self.names = [f"{PREFIX}{os.getpid()}{host}" for host in "ab"]
        self._handler: Any = None

    def __enter__(self) -> TwoHosts:
        _remove_stale()
        self._handler = signal.signal(signal.SIGTERM, _interrupt)
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            a, b = self.names
            _run("ip", "link", "add", INTERFACE, "netns", a, "type", "veth", "peer", "name", INTERFACE, "netns", b)
            for k, name in enumerate(self.names):
                _run("ip", "-n", name, "addr", "add", f"10.77.0.{k + 1}/30", "dev", INTERFACE)
                for device in ("lo", INTERFACE):
                    _run("ip", "-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def limit(self, gbit_per_s: float) -> None:
        """Each direction of the link, from now on."""
        burst_bytes = int(max(128 << 10, gbit_per_s * 1e9 / 8 * 1e-3))  # a millisecond's worth
        for name in self.names:
            shape = ["rate", f"{int(gbit_per_s * 1000)}mbit", "burst", str(burst_bytes), "latency", "50ms"]
            _run("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *shape)

    def __exit__(self, *_: object) -> None:
        for name in self.names:  # the link goes with them
            if (FOLDER / name).exists():
                subprocess.run(["ip", "netns", "del", name], capture_output=True)
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _remove_stale() -> None:
    """Of benches that were killed."""
    for path in FOLDER.glob(f"{PREFIX}[0-9]*[ab]") if FOLDER.is_dir() else ():
        if not Path("/proc", path.name[len(PREFIX) : -1]).exists():
            subprocess.run(["ip", "netns", "del", path.name], capture_output=True)
