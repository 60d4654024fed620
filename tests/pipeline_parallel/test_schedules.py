"""The schedules: what they hold and idle, against their papers and torch's; the checker; CSV."""

import types

import pytest

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
        if m % p == 0:
            idle, held, timeline = of("interleaved", v * p)
            assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1))
            assert held == (min(v * m, (v + 1) * p - 1) if p > 1 else v)
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


def torchs(kind, p, m, v):
    """The order of one of torch's schedule classes, without stages or processes."""
    from torch.distributed.pipelining import schedules

    cls = getattr(schedules, kind)
    rounds = max(1, m // p)
    facts = {
        "pp_group_size": p, "_n_microbatches": m, "n_local_stages": v, "_num_stages": p * v, "num_stages": p * v,
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


@pytest.mark.parametrize(("p", "m"), [(2, 4), (2, 8), (4, 8), (4, 16)])
def test_interleaved_and_dualpipev_are_torchs(p, m):
    for v in (2, 3):
        ours = make_schedule("interleaved", p, m, v * p)
        assert [list(row) for row in ours.actions] == torchs("ScheduleInterleaved1F1B", p, m, v)
    assert [list(row) for row in make_schedule("dualpipev", p, m).actions] == torchs("ScheduleDualPipeV", p, m, 2)


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


def test_too_few_slots_are_found():
    with pytest.raises(ScheduleError, match=r"with 1 slots rank \d waits for ever at .* ring of .* is full"):
        check(make_schedule("zbv", 4, 8), slots=1)
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
