"""The C++ core without Python: model-checked, and run under the sanitizers with ranks as threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CORE = [
    f"csrc/comm/{f}.cpp"
    for f in (
        "bootstrap",
        "packets",
        "segment",
        "types",
        "windows",
        "communicator",
        "collectives",
        "collectives_rooted",
        "collectives_rows",
    )
] + [f"csrc/cpu/{f}.cpp" for f in ("reduce", "reduce_plain", "reduce_avx2", "reduce_avx512")]
RINGS = ["csrc/comm/rings.cpp", "csrc/comm/rings_progress.cpp"]
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")


def build(target: Path, *arguments: str) -> Path:
    command = [COMPILER, *arguments, "-o", str(target), "-pthread"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0 and "cannot find -l" in done.stderr:
        pytest.skip(f"this compiler has no runtime for {arguments[0]}")
    assert done.returncode == 0, done.stderr
    return target


MODELS = {
    "protocol_relacy": ["rounds2", "rounds3", "rooted3", "barrier", "futex", "signal"],
    "protocol_rings_relacy": ["ring", "announced", "bell", "pins"],
}


@pytest.fixture(scope="session")
def relacy(tmp_path_factory):
    """(model, mutation) -> what the checker says after 30000 schedules."""
    if not Path("/usr/include/relacy/relacy.hpp").exists():
        pytest.skip("Relacy is absent; install Debian's relacy-dev")
    folder = tmp_path_factory.mktemp("relacy")

    def check(model: str, mutation: str) -> tuple[int, str]:
        program = next(name for name, models in MODELS.items() if model in models)
        target = folder / program
        if not target.exists():
            build(target, "-std=c++17", "-O1", "-w", f"tests/native/{program}.cpp")
        done = subprocess.run([target, model, mutation, "30000"], capture_output=True, text=True)
        return done.returncode, done.stdout.strip()

    return check


@pytest.mark.parametrize("model", [model for models in MODELS.values() for model in models])
def test_protocol_holds(relacy, model):
    assert relacy(model, "none") == (0, "SUCCESS")


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
        ("ring", "relaxed_publish", "DATA RACE"),
        ("ring", "relaxed_wait", "DATA RACE"),
        ("ring", "relaxed_credit", "DATA RACE"),
        ("ring", "relaxed_credit_wait", "DATA RACE"),
        ("ring", "no_credit", "DATA RACE"),
        ("ring", "credit_before_copy", "DATA RACE"),
        ("ring", "credit_too_many", "LIVELOCK"),  # a slot is overwritten, its reader waits for ever
        ("announced", "credit_before_copy", "DATA RACE"),
        ("announced", "no_acknowledgement", "DATA RACE"),
        ("announced", "relaxed_credit", "DATA RACE"),
        ("announced", "relaxed_credit_wait", "DATA RACE"),
        ("bell", "no_announce", "DEADLOCK"),
        ("bell", "late_announce", "DEADLOCK"),
        ("bell", "bell_before_publish", "DEADLOCK"),
        ("bell", "bell_read_late", "DEADLOCK"),
        ("bell", "release_publish", "DEADLOCK"),
        ("bell", "acquire_look", "DEADLOCK"),
        ("bell", "relaxed_look_for_sleepers", "DEADLOCK"),
        ("pins", "look_before_pin", "USER ASSERT FAILED"),
        ("pins", "relaxed_pin", "USER ASSERT FAILED"),
        ("pins", "relaxed_forget", "USER ASSERT FAILED"),
        ("pins", "sweep_before_forget", "USER ASSERT FAILED"),
    ],
)
def test_checker_finds_what_goes_wrong_without_a_rule(relacy, model, mutation, fault):
    assert relacy(model, mutation) == (1, fault)


FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]


FAST = ["-O2", "-std=c++20", "-Icsrc", "-Icsrc/include"]


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """flags -> the objects of the core, compiled once, as many at a time as there are cores."""
    cache: dict[tuple[str, ...], list[str]] = {}

    def compiled(flags: Sequence[str]) -> list[str]:
        if tuple(flags) not in cache:
            folder = tmp_path_factory.mktemp("core")

            def compile_one(source: str) -> str:
                return str(build(folder / f"{Path(source).stem}.o", "-c", *flags, source))

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                cache[tuple(flags)] = list(pool.map(compile_one, CORE))
        return cache[tuple(flags)]

    return compiled


@pytest.fixture(scope="session")
def sanitized(objects):
    """sanitizer -> the objects of the core."""
    return lambda sanitizer: objects([f"-fsanitize={sanitizer}", *FLAGS])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize(
    ("sources", "calls"),
    [
        (["tests/native/collectives_test.cpp"], 120),
        (["tests/native/rows_test.cpp"], 40),
        ([*RINGS, "tests/native/rings_test.cpp"], 18),
    ],
    ids=["collectives", "rows", "messages"],
)
def test_sanitizer(tmp_path, sanitized, sanitizer, sources, calls):
    program = build(tmp_path / "program", f"-fsanitize={sanitizer}", *FLAGS, *sources, *sanitized(sanitizer))
    for world in (2, 3, 4):
        command = [program, str(world), str(calls), str(world)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-5000:] + done.stdout


def sanitized_mutant(tmp_path: Path, sanitized, sources: dict[str, str], test: str, *arguments: str) -> str:
    """What a test under ThreadSanitizer prints when files of the core read as in `sources`, {path: text}."""
    paths = []
    for path, text in sources.items():
        mutant = tmp_path / Path(path).relative_to("csrc")
        mutant.parent.mkdir(parents=True, exist_ok=True)
        mutant.write_text(text)
        paths += [str(mutant)] if path.endswith(".cpp") else []
    replaced = {Path(path).stem for path in paths}
    rest = [path for path in sanitized("thread") if Path(path).stem not in replaced]
    # A changed header is found before the one of the tree.
    program = build(tmp_path / "mutant", "-fsanitize=thread", f"-I{tmp_path}", *FLAGS, *paths, test, *rest)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=200, env=environment)
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("(head.sequence).exchange(sequence, {strong})", "(head.sequence).store(sequence, {relaxed})"),
        ("(head.sequence).load({strong}) != next", "(head.sequence).load({relaxed}) != next"),
        ("(word).exchange(in.consumed, {strong})", "(word).exchange(in.consumed + 1, {strong})"),
        ("reached(out.known_consumed, out", "reached(out.known_consumed + 1, out"),
    ],
    ids=["relaxed publish", "relaxed wait", "a credit too many", "done before it is copied"],
)
def test_sanitizer_finds_messages_that_break_a_rule(tmp_path, sanitized, rule, broken):
    orders = {"strong": "std::memory_order_seq_cst", "relaxed": "std::memory_order_relaxed"}
    rings = {path: (ROOT / path).read_text() for path in RINGS}
    assert sum(text.count(rule.format(**orders)) for text in rings.values()) == 1
    sources = {path: text.replace(rule.format(**orders), broken.format(**orders)) for path, text in rings.items()}
    said = sanitized_mutant(tmp_path, sanitized, sources, "tests/native/rings_test.cpp", "2", "18", "1")
    assert "data race" in said, said[-2000:]


ROWS, CALL, ROUNDS = "csrc/comm/collectives_rows.cpp", "csrc/comm/call.h", "csrc/comm/communicator.cpp"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("path", "rule", "broken"),
    [
        (ROWS, "            call.wait(r, round);\n", ""),
        (ROWS, "          call.wait_all(round);\n", ""),
        (ROWS, "0, Call::kAll,", "0, Call::kNobody,"),
        (CALL, "      sync();  // nobody may touch the window while a peer still reads or writes it\n", ""),
        (ROUNDS, "    if (peer != me && !reached(c.seen_", "    if (false && !reached(c.seen_"),
        (ROUNDS, "  notify(own.lines[round % kSlots].epoch, round, own.sleepers);",
         "  std::atomic_ref<uint32_t>(own.lines[round % kSlots].epoch).store(round, std::memory_order_relaxed);"),
    ],
    ids=[
        "gather without a wait", "scatter without a wait", "all_reduce without a wait", "window given back early",
        "no gate before a slot is written again", "relaxed publish",
    ],
)  # fmt: skip
def test_sanitizer_finds_rows_that_break_a_rule(tmp_path, sanitized, path, rule, broken):
    text = (ROOT / path).read_text()
    assert text.count(rule) == 1
    sources = {path: text.replace(rule, broken)}
    ranks = "2" if "kAll" in rule else "3"  # only two ranks sum everything when it comes in pieces
    for user in (ROWS, ROUNDS) if path == CALL else ():
        sources[user] = (ROOT / user).read_text()
    said = sanitized_mutant(tmp_path, sanitized, sources, "tests/native/rows_test.cpp", ranks, "80", "3")
    assert "data race" in said or "rows" in said, said[-2000:]  # wrong rows are printed with the op's name


@pytest.mark.parametrize("test", ["collectives_test", "rows_test"])
def test_ten_thousand_calls_with_stalls(tmp_path, objects, test):
    program = build(tmp_path / "program", *FAST, f"tests/native/{test}.cpp", *objects(FAST))
    for world, calls in ((2, 10000), (3, 2000)):
        subprocess.run([program, str(world), str(calls), "7"], check=True, timeout=250)
