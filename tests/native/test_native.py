"""The C++ core without Python: model-checked, and run under the sanitizers with ranks as threads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CORE = [
    f"csrc/comm/{f}.cpp" for f in ("bootstrap", "segment", "types", "communicator", "collectives", "collectives_rooted")
] + [f"csrc/cpu/{f}.cpp" for f in ("reduce", "reduce_plain", "reduce_avx2", "reduce_avx512")]
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")


def build(target: Path, *arguments: str) -> Path:
    command = [COMPILER, *arguments, "-o", str(target), "-pthread"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0 and "cannot find -l" in done.stderr:
        pytest.skip(f"this compiler has no runtime for {arguments[0]}")
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def relacy(tmp_path_factory):
    if not Path("/usr/include/relacy/relacy.hpp").exists():
        pytest.skip("Relacy is absent; install Debian's relacy-dev")
    target = tmp_path_factory.mktemp("relacy") / "protocol"
    return build(target, "-std=c++17", "-O1", "-w", "tests/native/protocol_relacy.cpp")


@pytest.mark.parametrize("model", ["rounds2", "rounds3", "rooted3", "barrier", "futex", "signal"])
def test_protocol_holds(relacy, model):
    done = subprocess.run([relacy, model, "none", "30000"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "SUCCESS\n"), done.stdout


@pytest.mark.parametrize(
    ("model", "mutation", "fault"),
    [
        ("rounds2", "relaxed_publish", "DATA RACE"),
        ("rounds2", "relaxed_wait", "DATA RACE"),
        ("rounds2", "three_slots", "DATA RACE"),
        ("rooted3", "no_slot_wait", "DATA RACE"),
        ("barrier", "relaxed_publish", "DATA RACE"),
        ("barrier", "relaxed_wait", "DATA RACE"),
        ("barrier", "no_credit", "DATA RACE"),
        ("futex", "relaxed_publish", "DATA RACE"),
        ("futex", "relaxed_wait", "DATA RACE"),
        ("futex", "no_announce", "DEADLOCK"),
        ("futex", "late_announce", "DEADLOCK"),
        ("signal", "no_credit", "DATA RACE"),
        ("signal", "relaxed_publish", "DATA RACE"),
        ("signal", "relaxed_wait", "DATA RACE"),
    ],
)
def test_checker_finds_what_goes_wrong_without_a_rule(relacy, model, mutation, fault):
    done = subprocess.run([relacy, model, mutation, "30000"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (1, fault)


SANITIZED = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Icsrc", "-Icsrc/include"]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizer(tmp_path, sanitizer):
    program = build(
        tmp_path / "collectives", f"-fsanitize={sanitizer}", *SANITIZED, *CORE, "tests/native/collectives_test.cpp"
    )
    for world in (2, 3, 4):
        done = subprocess.run([program, str(world), "120", str(world)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-5000:] + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizer_on_messages(tmp_path, sanitizer):
    program = build(
        tmp_path / "rings",
        f"-fsanitize={sanitizer}",
        *SANITIZED,
        *CORE,
        "csrc/comm/rings.cpp",
        "tests/native/rings_test.cpp",
    )
    for world in (2, 3, 4):
        done = subprocess.run([program, str(world), "18", str(world)], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-5000:] + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("(head.sequence).exchange(sequence, std::memory_order_seq_cst)", "(head.sequence).store(sequence, {relaxed})"),
        ("(head.sequence).load(std::memory_order_seq_cst) != next", "(head.sequence).load({relaxed}) != next"),
        ("(word).exchange(in.consumed, std::memory_order_seq_cst)", "(word).store(in.consumed + 1, {relaxed})"),
    ],
    ids=["relaxed publish", "relaxed wait", "a credit too many"],
)
def test_sanitizer_finds_what_goes_wrong_in_messages_without_a_rule(tmp_path, rule, broken):
    source = (ROOT / "csrc/comm/rings.cpp").read_text()
    assert source.count(rule) == 1
    mutant = tmp_path / "rings.cpp"
    mutant.write_text(source.replace(rule, broken.format(relaxed="std::memory_order_relaxed")))
    program = build(
        tmp_path / "mutant", "-fsanitize=thread", *SANITIZED, *CORE, str(mutant), "tests/native/rings_test.cpp"
    )
    for attempt in range(5):
        done = subprocess.run([program, "2", "18", str(attempt)], capture_output=True, text=True, timeout=200)
        if "data race" in done.stderr:
            return
    pytest.fail(f"no data race was reported: {done.stdout}{done.stderr[-2000:]}")


def test_ten_thousand_calls_with_stalls(tmp_path):
    program = build(
        tmp_path / "collectives",
        "-O2",
        "-std=c++20",
        "-Icsrc",
        "-Icsrc/include",
        *CORE,
        "tests/native/collectives_test.cpp",
    )
    for world, calls in ((2, 10000), (3, 2000)):
        subprocess.run([program, str(world), str(calls), "7"], check=True, timeout=250)
