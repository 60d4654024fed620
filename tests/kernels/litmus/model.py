"""PTX's memory model: all executions of a small program that its axioms allow, and whether they race.

Source: PTX ISA, chapter "Memory Consistency Model"; Lustig, Sahasrabuddhe, Giroux, A Formal Analysis of the NVIDIA PTX
Memory Consistency Model (2019). The names of relations are theirs. A wait is a read that must find a value: executions
in which it goes on are left out. Loops are not modelled, nor accesses that overlap in part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Regs = dict[str, int]
SCOPES = ("cta", "gpu", "sys")
STRONG = ("relaxed", "acquire", "release", "acq_rel")


@dataclass(frozen=True)
class Op:
    """kind: R, W, RMW (adds `value`), F (a fence), BAR. A read has to find the value `want`, or `least` or more."""

    kind: str
    loc: str = ""
    value: int = 0
    reg: str = ""
    sem: str = "weak"
    scope: str = "cta"
    want: int | None = None
    least: int | None = None
    is_async: bool = False  # a write that later operations of its thread don't wait for


def load(
    reg: str, loc: str, sem: str = "weak", scope: str = "cta", want: int | None = None, least: int | None = None
) -> Op:
    return Op("R", loc, reg=reg, sem=sem, scope=scope, want=want, least=least)


def store(loc: str, value: int, sem: str = "weak", scope: str = "cta", is_async: bool = False) -> Op:
    return Op("W", loc, value, sem=sem, scope=scope, is_async=is_async)


def add(reg: str, loc: str, value: int, sem: str, scope: str, want: int | None = None) -> Op:
    return Op("RMW", loc, value, reg, sem, scope, want)


def fence(sem: str = "acq_rel", scope: str = "sys") -> Op:
    """sem: acq_rel or sc."""
    return Op("F", sem=sem, scope=scope)


def bar(name: str = "bar") -> Op:
    """bar.sync of the block: the n-th of a thread meets the n-th of the others."""
    return Op("BAR", name)


@dataclass(frozen=True)
class Thread:
    """kernel: threads of a GPU's kernel n + 1 begin when those of kernel n are over."""

    ops: tuple[Op, ...]
    gpu: int = 0
    block: int = 0
    kernel: int = 0


@dataclass(frozen=True)
class Program:
    threads: tuple[Thread, ...]
    stale: Callable[[Regs], bool]  # whether registers say what must not be


@dataclass
class Event:
    index: int
    op: Op
    thread: int
    place: int  # in its thread

    @property
    def reads(self) -> bool:
        return self.op.kind in ("R", "RMW")

    @property
    def writes(self) -> bool:
        return self.op.kind in ("W", "RMW")


@dataclass
class Execution:
    registers: Regs
    races: list[tuple[str, str]]
    reads_from: list[tuple[str, str]] = field(default_factory=list)


Relation = list[int]  # of each event a set of events behind it, as bits


def closure(relation: Relation) -> Relation:
    made = list(relation)
    for k in range(len(made)):
        bit, behind = 1 << k, made[k]
        for i in range(len(made)):
            if made[i] & bit:
                made[i] |= behind
    return made


def compose(first: Relation, second: Relation) -> Relation:
    made = []
    for bits in first:
        behind = 0
        for j in members(bits):
            behind |= second[j]
        made.append(behind)
    return made


def members(bits: int) -> Iterator[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def has(relation: Relation, i: int, j: int) -> bool:
    return bool(relation[i] >> j & 1)


class Model:
    """The parts of a program that are the same in all its executions. Event i < len(locations) writes the first 0."""

    def __init__(self, program: Program):
        self.program = program
        locations = sorted({op.loc for t in program.threads for op in t.ops if op.kind in ("R", "W", "RMW")})
        self.events = [Event(i, Op("W", loc), -1, 0) for i, loc in enumerate(locations)]
        for number, thread in enumerate(program.threads):
            for place, op in enumerate(thread.ops):
                self.events.append(Event(len(self.events), op, number, place))
        self.size = len(self.events)
        self.po = self._program_order()
        self.fixed = closure(self._fixed_order())
        self.strong = [[self._morally_strong(a, b) for b in self.events] for a in self.events]

    def name(self, event: Event) -> str:
        if event.thread < 0:
            return f"first {event.op.loc}"
        thread, op = self.program.threads[event.thread], event.op
        what = {"R": f"read {op.loc}", "W": f"{op.loc} = {op.value}", "RMW": f"{op.loc} += {op.value}"}
        said = what.get(op.kind, op.kind)
        return f"GPU {thread.gpu} block {thread.block} thread {event.thread}: {said} {op.sem}.{op.scope}"

    def _program_order(self) -> Relation:
        made = [0] * self.size
        for a, b in itertools.product(self.events, repeat=2):
            if a.thread == b.thread >= 0 and a.place < b.place and not a.op.is_async:
                made[a.index] |= 1 << b.index
        return made

    def _fixed_order(self) -> Relation:
        """Program order, barriers of blocks, kernels behind each other, and first values before all."""
        made = list(self.po)
        threads = self.program.threads
        for a, b in itertools.product(self.events, repeat=2):
            if a.thread < 0 <= b.thread:
                made[a.index] |= 1 << b.index
            if a.thread < 0 or b.thread < 0 or a.op.is_async:
                continue
            ta, tb = threads[a.thread], threads[b.thread]
            if ta.gpu == tb.gpu and ta.kernel < tb.kernel:
                made[a.index] |= 1 << b.index
            same_block = (ta.gpu, ta.kernel, ta.block) == (tb.gpu, tb.kernel, tb.block) and a.thread != b.thread
            if same_block and a.op.kind == b.op.kind == "BAR" and self._nth_bar(a) == self._nth_bar(b):
                for before in members(self._before(a)):
                    made[before] |= self.po[b.index]
        return made

    def _nth_bar(self, event: Event) -> int:
        return sum(op.kind == "BAR" for op in self.program.threads[event.thread].ops[: event.place])

    def _before(self, event: Event) -> int:
        return sum(1 << e.index for e in self.events if has(self.po, e.index, event.index))

    def _includes(self, event: Event, other: Event) -> bool:
        a, b = self.program.threads[event.thread], self.program.threads[other.thread]
        if event.op.scope == "sys":
            return True
        if a.gpu != b.gpu:
            return False
        return event.op.scope == "gpu" or (a.block, a.kernel) == (b.block, b.kernel)

    def _morally_strong(self, a: Event, b: Event) -> bool:
        if a.thread < 0 or b.thread < 0:
            return True  # the first value is there for everybody
        if has(self.po, a.index, b.index) or has(self.po, b.index, a.index):
            return True
        strong = {"F"}
        is_strong = all(e.op.kind in strong or e.op.sem in STRONG for e in (a, b))
        return is_strong and self._includes(a, b) and self._includes(b, a)

    # -- executions ------------------------------------------------------------------------------------------------

    def executions(self) -> Iterator[Execution]:
        reads = [e for e in self.events if e.reads]
        sources = [[w for w in self.events if w.writes and w.op.loc == r.op.loc and w is not r] for r in reads]
        fences = [e for e in self.events if e.op.kind == "F" and e.op.sem == "sc"]
        for chosen in itertools.product(*sources):
            rf = {r.index: w.index for r, w in zip(reads, chosen, strict=True)}
            values = self._values(rf)
            if values is None:
                continue
            for order in itertools.permutations(fences):
                yield from self._with_order(rf, values, order)

    def _values(self, rf: dict[int, int]) -> dict[int, int] | None:
        """What each event reads or writes; None where a wait finds something else, or atomics read in a circle."""
        written: dict[int, int | None] = {}

        def of(index: int) -> int | None:
            if index in written:
                return written[index]
            event = self.events[index]
            if event.op.kind == "W":
                written[index] = event.op.value
            else:
                written[index] = None  # on the way: a circle
                read = of(rf[index])
                written[index] = None if read is None else read + event.op.value
            return written[index]

        found = {}
        for reader, source in rf.items():
            value = of(source)
            op = self.events[reader].op
            if value is None or (op.want is not None and op.want != value):
                return None
            if op.least is not None and value < op.least:
                return None
            found[reader] = value
        return found

    def _synchronizes(self, rf: dict[int, int], observation: Relation) -> Relation:
        """Release patterns to acquire patterns."""
        releases, acquires = [], []  # (first of the pattern, its write), (its read, last of the pattern)
        for e in self.events:
            if e.thread < 0:
                continue
            strong = e.op.sem in STRONG
            if e.writes and strong:
                if e.op.sem in ("release", "acq_rel"):
                    releases.append((e, e))
                for f in self.events:
                    if not has(self.po, f.index, e.index):
                        continue
                    same = f.writes and f.op.loc == e.op.loc and f.op.sem in ("release", "acq_rel")
                    if f.op.kind == "F" or same:
                        releases.append((f, e))
            if e.reads and strong:
                if e.op.sem in ("acquire", "acq_rel"):
                    acquires.append((e, e))
                for f in self.events:
                    if not has(self.po, e.index, f.index):
                        continue
                    same = f.reads and f.op.loc == e.op.loc and f.op.sem in ("acquire", "acq_rel")
                    if f.op.kind == "F" or same:
                        acquires.append((e, f))
        made = [0] * self.size
        for (first, write), (read, last) in itertools.product(releases, acquires):
            if has(observation, write.index, read.index) and self.strong[first.index][last.index]:
                made[first.index] |= 1 << last.index
        return made

    def _with_order(self, rf: dict[int, int], values: dict[int, int], fences: tuple[Event, ...]) -> Iterator[Execution]:
        observed = [0] * self.size
        for reader, writer in rf.items():
            if self.strong[writer][reader]:
                observed[writer] |= 1 << reader
        observation = list(observed)  # through atomics too
        for _ in range(self.size):
            for e in self.events:
                for middle in members(observation[e.index]):
                    if self.events[middle].op.kind == "RMW":
                        observation[e.index] |= observation[middle]
        base = list(self.fixed)
        for i, bits in enumerate(self._synchronizes(rf, observation)):
            base[i] |= bits
        for a, b in itertools.combinations(fences, 2):
            if self.strong[a.index][b.index]:
                base[a.index] |= 1 << b.index
        base = closure(base)
        if any(has(base, i, i) for i in range(self.size)):
            return
        cause = [b | o for b, o in zip(base, compose(observation, base), strict=True)]
        by_location: dict[str, list[Event]] = {}
        for e in self.events:
            if e.writes and e.thread >= 0:
                by_location.setdefault(e.op.loc, []).append(e)
        for orders in itertools.product(*(itertools.permutations(writes) for writes in by_location.values())):
            coherence = self._coherence(orders, cause)
            if coherence is not None and self._holds(rf, coherence, cause):
                registers = {self.events[r].op.reg: v for r, v in values.items()}
                named = [(self.name(self.events[w]), self.name(self.events[r])) for r, w in rf.items()]
                yield Execution(registers, self._races(cause), named)

    def _coherence(self, orders: tuple[tuple[Event, ...], ...], cause: Relation) -> Relation | None:
        """Writes of a location, as far as they are ordered at all; None where that contradicts causality."""
        made = [0] * self.size
        for writes in orders:
            for e in self.events:
                if e.thread < 0 and e.op.loc == writes[0].op.loc:
                    made[e.index] |= sum(1 << w.index for w in writes)
            for a, b in itertools.combinations(writes, 2):
                if has(cause, b.index, a.index):
                    return None
                if self.strong[a.index][b.index] or has(cause, a.index, b.index):
                    made[a.index] |= 1 << b.index
        return closure(made)

    def _holds(self, rf: dict[int, int], coherence: Relation, cause: Relation) -> bool:
        from_reads = [0] * self.size
        for reader, writer in rf.items():
            from_reads[reader] |= coherence[writer] & ~(1 << reader)
        for reader, writer in rf.items():  # atomicity: nobody writes between an atomic's read and its write
            if self.events[reader].op.kind == "RMW":
                for between in members(coherence[writer]):
                    if between != reader and has(coherence, between, reader) and self.strong[between][reader]:
                        return False
                if has(coherence, reader, writer):
                    return False
        communication = [c | f for c, f in zip(coherence, from_reads, strict=True)]
        for reader, writer in rf.items():
            communication[writer] |= 1 << reader
        # causality: what was caused can't have been communicated before
        for i in range(self.size):
            for j in members(communication[i]):
                if has(cause, j, i):
                    return False
        # sequential consistency of each location, among operations that are morally strong
        local = [0] * self.size
        for a, b in itertools.product(self.events, repeat=2):
            if (
                a.op.loc == b.op.loc != ""
                and a.op.kind != "BAR"
                and self.strong[a.index][b.index]
                and (has(self.po, a.index, b.index) or has(communication, a.index, b.index))
            ):
                local[a.index] |= 1 << b.index
        local = closure(local)
        return not any(has(local, i, i) for i in range(self.size))

    def _races(self, cause: Relation) -> list[tuple[str, str]]:
        found = []
        for a, b in itertools.combinations([e for e in self.events if e.reads or e.writes], 2):
            conflict = a.op.loc == b.op.loc and (a.writes or b.writes) and min(a.thread, b.thread) >= 0
            ordered = has(cause, a.index, b.index) or has(cause, b.index, a.index)
            if conflict and a.thread != b.thread and not self.strong[a.index][b.index] and not ordered:
                found.append((self.name(a), self.name(b)))
        return found


@dataclass(frozen=True)
class Verdict:
    """of all executions that the model allows"""

    executions: int
    stale: Execution | None
    race: Execution | None

    @property
    def is_safe(self) -> bool:
        return self.executions > 0 and self.stale is None and self.race is None


def judge(program: Program) -> Verdict:
    number, stale, race = 0, None, None
    for execution in Model(program).executions():
        number += 1
        if stale is None and program.stale(execution.registers):
            stale = execution
        if race is None and execution.races:
            race = execution
    return Verdict(number, stale, race)
