"""The GPU protocol under the axioms of PTX, mistakes in it, and the model itself under known programs."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernels.litmus.__main__ import MARK, tables, witness
from kernels.litmus.classic import CLASSIC
from kernels.litmus.model import Program, Thread, judge, load, store
from kernels.litmus.protocol import EDGES

PAGE = Path(__file__).parents[2] / "docs" / "memory_model.md"
MISTAKES = [(edge, mistake) for edge in EDGES for mistake in edge.mistakes]


@pytest.mark.parametrize("name", CLASSIC)
def test_known_programs_have_their_known_verdicts(name):
    program, is_allowed, races = CLASSIC[name]
    verdict = judge(program)
    assert verdict.executions > 0
    assert (verdict.stale is not None, verdict.race is not None) == (is_allowed, races)


@pytest.mark.parametrize("edge", EDGES, ids=lambda e: e.name)
def test_edges_of_the_protocol_are_safe(edge):
    assert judge(edge.program).is_safe, witness(edge.program)


@pytest.mark.parametrize(("edge", "mistake"), MISTAKES, ids=[f"{e.name}-{m}" for e, m in MISTAKES])
def test_every_mistake_lets_a_stale_value_through(edge, mistake):
    verdict = judge(edge.mistakes[mistake])
    assert verdict.stale is not None, "no execution of it reads what it must not"
    text = witness(edge.mistakes[mistake])
    assert text.startswith("registers {") and "<-" in text


def test_a_wait_that_is_never_answered_has_no_execution():
    lonely = Program((Thread((load("f", "flag", "acquire", "sys", want=1),)), Thread((store("x", 1),))), lambda r: True)
    verdict = judge(lonely)
    assert verdict.executions == 0 and not verdict.is_safe


def test_the_page_is_of_this_model():
    assert PAGE.read_text().split(MARK)[1].strip() == tables()
