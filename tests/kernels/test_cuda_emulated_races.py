"""The kernels of csrc/cuda with ranks as threads: under ThreadSanitizer and AddressSanitizer, and with many calls."""

from __future__ import annotations

import cuda_executor
import pytest

pytestmark = pytest.mark.skipif(cuda_executor.COMPILER is None, reason="no g++ on this machine")
SCENARIOS = [
    "one_shot",
    "two_shot",
    "multimem",
    "reduce_scatter",
    "all_gather",
    "copied",
    "zero_scatter",
    "zero_step",
    "ring",
    "pipe",
    "one_way",
    "absent",
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """sanitizer -> the compiled program."""
    folder, built = tmp_path_factory.mktemp("ranks"), {}

    def of(sanitizer: str):
        if sanitizer not in built:
            built[sanitizer] = cuda_executor.build_ranks(folder, sanitizer)
        return built[sanitizer]

    return of


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("sanitizer", ["races", "memory"])
def test_sanitizers_find_nothing(program, sanitizer, scenario, world):
    assert cuda_executor.run_program(program(sanitizer), scenario, world, 14) == (0, "")


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s != "absent"])
def test_stalls_change_nothing(program, scenario):
    assert cuda_executor.run_program(program("plain"), scenario, 4, 50, stalls="7:200") == (0, "")


@pytest.mark.parametrize("scenario", ["one_shot", "two_shot"])
def test_ten_thousand_calls(program, scenario):
    assert cuda_executor.run_program(program("plain"), scenario, 2, 10_000) == (0, "")
