"""The schedules: what they hold and idle, against their papers and torch's; the checker; CSV."""

import ast
import dataclasses
import types
from pathlib import Path

import pytest

import pypar.pipeline_parallel
from pypar.pipeline_parallel.check import check
from pypar.pipeline_parallel.generators import NAMES, make_schedule
from pypar.pipeline_parallel.schedule import Action, Schedule, ScheduleError
from pypar.pipeline_parallel.simulate import Costs, simulate

GRID = [(p, m) for p in (1, 2, 3, 4, 6, 8) for m in (1, p, 2 * p, 2 * p + 1, 4 * p)]


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_one_for_any_number_of_ranks_and_micro_batches(name):
    for p, m in GRID:
        schedule = make_schedule(name, p, m)
        report = check(schedule)
        assert schedule.num_ranks == p and schedule.micro_batches == m
        assert report.peaks == simulate(schedule).peaks
        for stage in range(schedule.num_stages):  # gradients add up in the order of micro-batches
            for kind in "FBIW":
                row = schedule.actions[schedule.rank_of(stage)]
                order = [a.micro_batch for a in row if (a.stage, a.kind) == (stage, kind)]
                assert order == sorted(order)


FULL = [(p, m) for p, m in GRID if m >= 2 * p]


@pytest.mark.parametrize(("p", "m"), FULL)
def test_bubbles_and_peaks_are_those_of_the_papers(p, m):
    """All passes cost one unit; a bubble is what the busiest rank idles until the last one is done."""

    def of(name, stages=None):
        timeline = simulate(make_schedule(name, p, m, stages))
        return round(timeline.makespan - timeline.busy, 9), max(timeline.peaks), timeline

    fraction = (p - 1) / (m + p - 1)
    for name, peak in (("gpipe", m), ("1f1b", p)):
        idle, held, timeline = of(name)
        assert idle == 3 * (p - 1) and held == peak
        assert timeline.bubble == pytest.approx(fraction)
    for v in (2, 3):
        idle, held, timeline = of("interleaved", v * p)
        assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1))
        turn = -(
            -m // (m // p)
        )  # micro-batches before a rank's stages take turns: p, and more where p doesn't divide m
        assert held == (min(v * m, 2 * (p - 1) + (v - 1) * turn + 1) if p > 1 else v)
        idle, held, timeline = of("breadth-first", v * p)
        assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1)) and held == v * m
    idle, held, _ = of("zbh1")
    assert idle == p - 1 and held == p  # a third of 1F1B's, in its memory
    idle, held, timeline = of("zb2p")
    assert timeline.idle_inside == 0 and held == 2 * p - 1  # only the way to the last rank: p - 1
    assert idle == p - 1
    idle, held, _ = of("zbv")
    assert idle == p - 1 and held == 2 * p  # the way to the last rank; two halves of a stage are one
    idle, held, _ = of("vhalf")
    assert idle <= 3 * p and held <= (p + 2) // 2 * 2
    idle, held, _ = of("vmin")
    assert idle <= 4 * p and held <= (p + 4) // 3 * 2
    idle, held, _ = of("dualpipev")
    assert idle == p - 1 and held == 2 * p + 1


@pytest.mark.parametrize("p", [2, 3, 5])
def test_interleaved_has_its_bubble_whatever_the_micro_batches(p):
    for m in range(p, 4 * p + 1):
        for v in (2, 4):
            timeline = simulate(make_schedule("interleaved", p, m, v * p))
            assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1))
            assert timeline.idle == (3 * (p - 1),) * p


def torchs(kind, p, m, v):
    """The order of one of torch's schedule classes, without stages or processes."""
    from torch.distributed.pipelining import schedules

    cls = getattr(schedules, kind)
    rounds = max(1, m // p)
    facts = {
        "pp_group_size": p, "_n_microbatches": m, "n_local_stages": v, "_num_stages": p * v, "num_stages": p * v,
        "_stages": [None] * v,
        "number_of_rounds": rounds, "microbatches_per_round": m // rounds,
    }  # fmt: skip
    rows = []
    for rank in range(p):
        self = types.SimpleNamespace(rank=rank, **facts)
        for name in ("_get_warmup_ops",):
            if hasattr(cls, name):
                setattr(self, name, types.MethodType(getattr(cls, name), self))
        found = cls._calculate_single_rank_operations(self, rank)
        flat = [each for op in found if op is not None for each in (op.sub_actions or [op])]
        rows.append([Action(a.stage_index, a.computation_type.value, a.microbatch_index) for a in flat])
    return rows


def torch_prints(kind, p, m):
    """What one of torch's single-stage classes prints, which is not what it runs."""
    from torch.distributed.pipelining import schedules

    order = getattr(schedules, kind)._get_pipeline_order(types.SimpleNamespace(_num_stages=p, _n_microbatches=m))
    return [
        [Action(a.stage_index, a.computation_type.value, a.microbatch_index)
         for a in order[rank] if a is not None and a.computation_type.value in "FBIW"]
        for rank in range(p)
    ]  # fmt: skip


def rows_of(name, p, m, stages=None):
    return [list(row) for row in make_schedule(name, p, m, stages).actions]


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 4), (4, 8), (4, 9)])
def test_gpipe_and_1f1b_are_torchs(p, m):
    assert rows_of("gpipe", p, m) == torch_prints("ScheduleGPipe", p, m)
    *ours, last = rows_of("1f1b", p, m)
    *theirs, their_last = torch_prints("Schedule1F1B", p, m)
    assert ours == theirs
    # torch 2.13 prints the last rank's forwards from 1 to m; it runs them from 0 to m - 1.
    forwards = [a.micro_batch for a in their_last if a.kind == "F"]
    assert forwards in (list(range(1, m + 1)), list(range(m)))
    first = forwards[0]
    assert last == [Action(a.stage, a.kind, a.micro_batch - (first if a.kind == "F" else 0)) for a in their_last]


@pytest.mark.parametrize(("p", "m"), [(2, 4), (2, 5), (2, 8), (4, 7), (4, 8), (4, 10), (4, 16)])
def test_interleaved_and_dualpipev_are_torchs(p, m):
    """torch takes no micro-batches that its rounds don't divide, and for DualPipeV no fewer than 2p."""
    for v in (2, 3) if m % (m // p) == 0 else ():
        assert rows_of("interleaved", p, m, v * p) == torchs("ScheduleInterleaved1F1B", p, m, v)
    if m >= 2 * p:
        assert rows_of("dualpipev", p, m) == torchs("ScheduleDualPipeV", p, m, 2)


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (3, 9), (4, 5), (4, 16), (6, 12)])
def test_zbh1_is_torchs_interleaved_zero_bubble_with_one_stage_per_rank(p, m):
    assert rows_of("zbh1", p, m) == torchs("ScheduleInterleavedZeroBubble", p, m, 1)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 2), (4, 8)])
def test_breadth_first_is_torchs_but_for_the_order_of_backwards(p, m):
    """torch's runs a stage's backwards from the last micro-batch to the first, ours as gradients add up. What each rank
    runs of which stage when is the same."""
    theirs = torchs("ScheduleLoopedBFS", p, m, 2)
    for row in theirs:
        row[:] = [Action(a.stage, a.kind, m - 1 - a.micro_batch if a.kind == "B" else a.micro_batch) for a in row]
    assert rows_of("breadth-first", p, m) == theirs


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 9), (4, 8), (4, 16)])
def test_zbv_holds_and_takes_what_torchs_does(p, m):
    """The order differs: torch writes it down phase by phase, ours follows from the block."""
    rows = torchs("ScheduleZBVZeroBubble", p, m, 2)
    ours = make_schedule("zbv", p, m)
    theirs = Schedule("torch", p, m, ours.ranks, tuple(map(tuple, rows)))
    check(theirs)
    assert simulate(theirs).makespan == simulate(ours).makespan
    assert max(simulate(theirs).peaks) == max(simulate(ours).peaks)


def test_csv_goes_out_and_in_and_torch_reads_it():
    from torch.distributed.pipelining.schedules import _Action

    for name in NAMES:
        schedule = make_schedule(name, 3, 5)
        text = schedule.to_csv()
        again = Schedule.from_csv(text, name)
        assert again == schedule
        for row, line in zip(schedule.actions, text.splitlines(), strict=True):
            assert [str(_Action.from_str(cell)) for cell in line.split(",")] == [str(a) for a in row]
    text = "0F0,0SEND_F0,,0B0\n1RECV_F0,(1F0;1B0)OVERLAP_F_B\n"
    assert Schedule.from_csv(text).to_csv() == "0F0,0B0\n1F0,1B0\n"
    assert Schedule.from_csv("\ufeff0F0,0B0\r\n1F0,1B0\r\n\r\n").ranks == (0, 1)  # as spreadsheets write it


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("0F0,0B0\n1F0,1X0\n", r"line 2, column 2: '1X0' is no action"),
        ("0F0,0B0\n0F1,1B0\n", r"line 2, column 1: '0F1' is of stage 0, which rank 0 holds"),
        ("0F0,0B0\n2F0,2B0\n", r"none of number 1"),
        ("", r"has stages \[\]"),
    ],
)
def test_csv_errors_name_line_and_column(text, error):
    with pytest.raises(ScheduleError, match=error):
        Schedule.from_csv(text)


def changed(schedule, rank, edit):
    rows = [list(row) for row in schedule.actions]
    edit(rows[rank])
    return Schedule(schedule.name, schedule.num_ranks, schedule.micro_batches, schedule.ranks, tuple(map(tuple, rows)))


def swap(i, j):
    def edit(row):
        row[i], row[j] = row[j], row[i]

    return edit


@pytest.mark.parametrize("name", NAMES)
def test_planted_faults_are_found(name):
    good = make_schedule(name, 4, 8)
    with pytest.raises(ScheduleError, match=r"rank 2 (never runs|lacks)"):
        check(changed(good, 2, lambda row: row.pop(3)))
    with pytest.raises(ScheduleError, match=r"rank 1 has \d+\w\d+ 2 times"):
        check(changed(good, 1, lambda row: row.append(row[0])))
    first = good.actions[3].index(next(a for a in good.actions[3] if a.kind in "BI"))
    before = next(k for k, a in enumerate(good.actions[3]) if a.kind == "F" and a.stage == good.actions[3][first].stage)
    with pytest.raises(ScheduleError, match="waits for ever"):
        check(changed(good, 3, swap(first, before)))
    with pytest.raises(ScheduleError, match=r"rank 0 has 1F0 .* stage 1 is rank 1's|rank 0 has 1F0"):
        check(changed(good, 0, lambda row: row.insert(0, Action(1, "F", 0))))


def test_what_is_no_schedule_is_said_so():
    good = make_schedule("1f1b", 2, 2)
    with pytest.raises(ScheduleError, match=r"rank 1 holds no stage; its stages lie on ranks \(0, 2\)"):
        check(Schedule.from_csv("0F0,0B0\n\n1F0,1B0\n"))
    with pytest.raises(ScheduleError, match=r"rank 1 has 1Q0 \(its action 0\); kinds are F, B, I, W"):
        check(changed(good, 1, lambda row: row.insert(0, Action(1, "Q", 0))))
    with pytest.raises(ScheduleError, match="has 0 micro-batches"):
        check(dataclasses.replace(good, micro_batches=0, actions=((), ())))
    with pytest.raises(ScheduleError, match="rank 0 never runs 0F2"):
        check(dataclasses.replace(good, micro_batches=3))


def test_the_pure_files_import_no_torch():
    for module in ("schedule", "generators", "zero_bubble", "plan", "check", "simulate", "draw", "chart"):
        source = (Path(pypar.pipeline_parallel.__file__).parent / f"{module}.py").read_text()
        nodes = list(ast.walk(ast.parse(source)))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
        assert names and not [name for name in names if name.split(".")[0] == "torch"], module


def test_too_few_slots_are_found():
    with pytest.raises(ScheduleError, match=r"with 1 slots rank \d waits for ever at .* ring of .* is full"):
        check(make_schedule("zbv", 4, 8), slots=1)
    assert max(check(make_schedule("gpipe", 2, 100)).slots.values()) > 64  # more than Pipeline makes
    report = check(make_schedule("1f1b", 4, 8))
    assert check(make_schedule("1f1b", 4, 8), slots=max(report.slots.values())).peaks == (4, 3, 2, 1)


def test_costs_and_communication():
    costs = Costs(forward=1.0, input_gradient=1.5, weight_gradient=0.5, communication=0.25)
    timeline = simulate(make_schedule("1f1b", 2, 1), costs)
    assert timeline.makespan == 1 + 0.25 + 1 + 2 + 0.25 + 2


def test_wrong_names_and_numbers():
    with pytest.raises(ValueError, match=r"schedule 'zbx' is unknown; there are gpipe, 1f1b"):
        make_schedule("zbx", 2, 2)
    with pytest.raises(ValueError, match=r"0 micro-batches on 2 ranks"):
        make_schedule("1f1b", 2, 0)
    with pytest.raises(ValueError, match=r"'zbv' has two stages per rank: 4 stages on 2 ranks, not 6"):
        make_schedule("zbv", 2, 2, 6)
    with pytest.raises(ValueError, match="not 5"):
        make_schedule("interleaved", 2, 2, 5)
