"""python -m kernels.litmus (in tests/): verdicts of the protocol's edges; with a NAME, what goes wrong there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kernels.litmus.classic import CLASSIC
from kernels.litmus.model import Program, Verdict, judge
from kernels.litmus.protocol import EDGES

MARK = "<!-- from here on written by python -m kernels.litmus --docs -->"


def said(verdict: Verdict) -> str:
    if verdict.is_safe:
        return "safe"
    return " and ".join(name for name, found in (("stale value", verdict.stale), ("race", verdict.race)) if found)


def witness(program: Program) -> str:
    """An execution that the model allows and that must not be, as text."""
    verdict = judge(program)
    found = verdict.stale or verdict.race
    if found is None:
        return f"safe in all of {verdict.executions} executions"
    lines = [f"registers {found.registers}"]
    lines += [f"  {reader}  <-  {writer}" for writer, reader in found.reads_from]
    lines += [f"  race: {a}  |  {b}" for a, b in found.races]
    return "\n".join(lines)


def rows() -> list[tuple[str, str, str]]:
    """(edge, verdict, mistake: what it leads to; ...)"""
    return [
        (e.name, said(judge(e.program)), "; ".join(f"{m}: {said(judge(p))}" for m, p in e.mistakes.items()))
        for e in EDGES
    ]


def tables() -> str:
    lines = ["| edge of the protocol | verdict | mistakes, and what they allow |", "|---|---|---|"]
    lines += [f"| {edge} | {verdict} | {mistakes} |" for edge, verdict, mistakes in rows()]
    lines += ["", "| known program | outcome | race |", "|---|---|---|"]
    for name, (program, _, _) in CLASSIC.items():
        verdict = judge(program)
        allowed = "allowed" if verdict.stale else "forbidden"
        lines.append(f"| {name} | {allowed} | {'yes' if verdict.race else 'no'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.litmus", description=__doc__)
    parser.add_argument("name", nargs="?", help="part of the name of an edge, a mistake or a known program")
    parser.add_argument("--docs", type=Path, help="the page whose tables are written anew")
    arguments = parser.parse_args()
    if arguments.docs:
        head = arguments.docs.read_text().split(MARK)[0]
        arguments.docs.write_text(f"{head}{MARK}\n\n{tables()}\n")
        return 0
    if not arguments.name:
        print(tables())
        return 0
    programs = {f"{e.name}: {m}": p for e in EDGES for m, p in [("as it is", e.program), *e.mistakes.items()]}
    programs |= {name: program for name, (program, _, _) in CLASSIC.items()}
    found = {name: p for name, p in programs.items() if arguments.name in name}
    for name, program in found.items():
        print(f"{name}\n{witness(program)}\n")
    if not found:
        print(f"no program has {arguments.name!r} in its name; there are {', '.join(programs)}", file=sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
