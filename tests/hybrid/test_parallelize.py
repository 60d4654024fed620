"""pypar.parallelize: what the matrix does not vary, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hybrid.hybrid_common import differences, make_batches, make_model
from torch import nn

import pypar
from pypar.hybrid import Plan, PlanError
from pypar.testing import run_ranks
from pypar.verify.steps import Run, Settings, alone, together


def mean_of(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch["input_ids"].flatten())


def sum_and_count(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    labels = batch["labels"].flatten()
    return F.cross_entropy(output.flatten(0, 1), labels, reduction="sum"), int((labels != -100).sum())


LOSSES = {"mean": mean_of, "sum": sum_and_count}


def _losses(rank: int, world: int, plans: list[str]) -> list[list[Run]]:
    found = []
    for plan in plans:
        runs = []
        for loss in LOSSES.values():
            settings = Settings(accumulate=2, clip=1.0, loss_fn=loss)
            runs.append(together(make_model("own", tied=True), Plan.parse(plan), make_batches(6, 7), settings))
        found.append(runs)
    return found


def test_losses_count_over_the_whole_batch():
    plans = [
        "dp=4 zero=0 micro_batches=2",
        "dp=4 zero=1 micro_batches=2",
        "dp=4 zero=2 replicate=2",
        "pp=2 dp=2 zero=0 micro_batches=3",
        "pp=2 dp=2 zero=1 micro_batches=3",
        "pp=2 dp=2 zero=2 micro_batches=2",
        "pp=2 dp=2 zero=3 micro_batches=2 reduce=once",
        "pp=2 tp=2 micro_batches=2 schedule=gpipe",
        "tp=2 dp=2 order=tp+pp+dp zero=1",
    ]
    found = run_ranks(_losses, 4, plans)[0]
    wrong = []
    for number, (name, loss) in enumerate(LOSSES.items()):
        settings = Settings(accumulate=2, clip=1.0, loss_fn=loss)
        wanted = alone(make_model("own", tied=True), make_batches(6, 7), settings)
        for plan, runs in zip(plans, found, strict=True):
            wrong += [f"{plan}, {name}: {each}" for each in differences(runs[number], wanted)[:3]]
    assert not wrong, "\n".join(wrong)


def _two_sums_of_one(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what two steps add up to, what torch makes of them), of a loss whose counts make the factor 1."""
    batches = make_batches(2, 4)
    shared, _ = pypar.parallelize(make_model("own"), "dp=1")
    plain = make_model("own")
    for batch in batches:
        shared.train_step(batch, lambda output, batch: (mean_of(output, batch), 1))
        mean_of(plain(batch["input_ids"]), batch).backward()
    return shared.module.lm_head.weight.grad, plain.lm_head.weight.grad


def test_earlier_gradients_stay_whatever_the_factor():
    found, wanted = run_ranks(_two_sums_of_one, 1)[0]
    torch.testing.assert_close(found, wanted)


class NameWithin(nn.Module):
    """One weight is called as another one is behind its first dot."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)
        self.inner = nn.Sequential()
        self.inner.add_module("proj", nn.Linear(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.proj(x))


def _names_within(rank: int, world: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    plan = Plan(tp=2, tp_plan={"proj": "colwise_gather_output"})
    return pypar.gather_state(pypar.parallelize(NameWithin(), plan)[0])


def test_a_weight_is_joined_by_its_whole_name():
    torch.manual_seed(0)
    torch.testing.assert_close(run_ranks(_names_within, 2)[0], dict(NameWithin().state_dict()))


def _over_gloo(rank: int, world: int, plans: list[str]) -> list[Run]:
    settings, batches = Settings(clip=1.0), make_batches(3, 8)
    return [together(make_model("llama", tied=True), Plan.parse(plan), batches, settings) for plan in plans]


def test_without_shared_memory():
    """ZeRO 3 gathers; a pipeline does so once per step."""
    plans = ["pp=2 dp=2 zero=3 micro_batches=2 schedule=zbv", "dp=4 zero=3 replicate=2", "dp=2 tp=2 zero=2"]
    wanted = alone(make_model("llama", tied=True), make_batches(3, 8), Settings(clip=1.0))
    for plan, found in zip(plans, run_ranks(_over_gloo, 4, plans, backend="gloo")[0], strict=True):
        assert not differences(found, wanted), (plan, differences(found, wanted)[:3])


def _plain_loop(rank: int, world: int, plans: list[str]) -> list[dict[str, torch.Tensor]]:
    found = []
    for plan in plans:
        model, optimizer = pypar.parallelize(make_model("own"), plan, torch.optim.SGD, lr=0.1)
        for batch in make_batches(3, 8):
            mine = model.local_batch(batch)
            loss = mean_of(model(mine["input_ids"]), mine)
            loss.backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append(pypar.gather_state(model))
    return found


def test_the_plain_loop_works_without_a_pipeline():
    model = make_model("own")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in make_batches(3, 8):
        mean_of(model(batch["input_ids"]), batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for state in run_ranks(_plain_loop, 4, ["dp=4", "dp=2 tp=2", "dp=2 tp=2 zero=3", "tp=4"])[0]:
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-5, atol=1e-6)


def _steps(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    batch = make_batches(1, 8)[0]
    for plan in ("dp=2 tp=2", "pp=2 dp=2 zero=1 micro_batches=2", "pp=2 tp=2 micro_batches=2"):
        model, _ = pypar.parallelize(make_model("llama"), plan)
        mine = model.local_batch(batch)
        before = torch.get_rng_state()
        loss = model.eval_step(mine)
        text = model.generate(batch["input_ids"][:1, :4], max_new_tokens=5, do_sample=False)
        assert all(p.grad is None for p in model.parameters())
        found[plan] = (float(loss), text, torch.equal(before, torch.get_rng_state()))
    return found


def test_evaluation_and_generation_are_those_of_one_process():
    model, batch = make_model("llama"), make_batches(1, 8)[0]
    with torch.no_grad():
        loss = float(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)
    text = model.generate(batch["input_ids"][:1, :4], max_new_tokens=5, do_sample=False)
    for found in run_ranks(_steps, 4):
        for plan, (theirs, words, _) in found.items():
            assert theirs == pytest.approx(loss, rel=1e-5), plan
            assert torch.equal(words, text), plan


def _half(rank: int, world: int) -> list[tuple[list[float], list[torch.dtype]]]:
    found = []
    for plan in ("dp=4 zero=1", "dp=2 tp=2 zero=2", "pp=2 dp=2 zero=3 micro_batches=2"):
        model, optimizer = pypar.parallelize(make_model("llama"), f"{plan} precision=bfloat16", lr=1e-2)
        losses = []
        for _ in range(8):
            losses.append(float(model.train_step(model.local_batch(make_batches(1, 8)[0]))))
            optimizer.step()
            optimizer.zero_grad()
        found.append((losses, sorted({p.dtype for p in model.parameters()}, key=str)))
    return found


def test_bfloat16_with_float32_masters_learns():
    for losses, dtypes in run_ranks(_half, 4)[0]:
        assert dtypes == [torch.bfloat16]
        assert losses[-1] < losses[0] - 0.5, losses


def _dropout(rank: int, world: int, plans: list[str]) -> list[float]:
    found = []
    for plan in plans:
        torch.manual_seed(3)
        model, optimizer = pypar.parallelize(make_model("own", dropout=0.3), plan)
        torch.manual_seed(4 + rank)  # rank 0's draws count
        for batch in make_batches(2, 8):
            loss = model.train_step(model.local_batch(batch))
            optimizer.step()
            optimizer.zero_grad()
        found.append(float(loss))
    return found


def test_dropout_depends_on_the_micro_batch_and_not_on_the_plan():
    same = [
        ["dp=4", "dp=4 zero=3", "dp=4 zero=1 replicate=2"],
        ["dp=2 tp=2", "dp=2 tp=2 zero=1", "dp=2 tp=2 sequence_parallel=true"],
        ["pp=2 dp=2 micro_batches=2", "pp=2 dp=2 zero=2 micro_batches=2 schedule=zbv", "pp=4 micro_batches=4"],
    ]
    losses = run_ranks(_dropout, 4, [plan for plans in same for plan in plans])[0]
    for plans in same:
        mine, losses = losses[: len(plans)], losses[len(plans) :]
        assert mine == pytest.approx([mine[0]] * len(mine), rel=1e-5), plans


def _whole_gradients(rank: int, world: int, reduce: str) -> tuple[set[str], set[str]]:
    """(parameters of blocks whose full gradients are there when a reduction begins, all parameters of blocks)"""
    plan = Plan(pp=2, dp=2, zero=3, schedule="interleaved", micro_batches=2, reduce=reduce)
    model, _ = pypar.parallelize(make_model("own"), plan)
    reducer = model.zero._reducer
    reduces, most = reducer.reduce_now, set()

    def spy(*args: Any, **kwargs: Any) -> None:
        held = {n for n, p in model.module.named_parameters() if p.grad is not None and n.startswith("blocks.")}
        most.update(held) if len(held) > len(most) else None
        reduces(*args, **kwargs)

    reducer.reduce_now = spy
    model.train_step(model.local_batch(make_batches(1, 8)[0]))
    return most, {n for n, _ in model.module.named_parameters() if n.startswith("blocks.")}


def test_gradients_of_one_stage_are_whole_at_a_time_or_all_until_the_end():
    for most, every in run_ranks(_whole_gradients, 4, "auto"):
        assert len({name.split(".")[1] for name in every}) == 2, "two stages of a block each"
        assert len({name.split(".")[1] for name in most}) == 1, most
    for most, every in run_ranks(_whole_gradients, 4, "once"):
        assert most == every


def _refused(rank: int, world: int, case: str) -> str:
    model = make_model("own")
    batch = make_batches(1, 8)[0]
    try:
        if case == "size":
            pypar.parallelize(model, "pp=3 dp=2")
        elif case == "layers":
            pypar.parallelize(model, Plan(pp=4, schedule="interleaved", micro_batches=4))
        elif case == "heads":
            pypar.parallelize(make_model("llama", heads=2), "tp=4")
        elif case == "optimizer":
            pypar.parallelize(model, "tp=4", torch.optim.Adafactor)
        elif case == "model":
            pypar.parallelize(make_model("own", layers=4 + rank // 3), "dp=4")
        elif case == "loss":
            shared, _ = pypar.parallelize(model, "pp=2 dp=2 micro_batches=2")
            shared.train_step(shared.local_batch(batch), lambda output, batch: output)
        elif case == "batch":
            shared, _ = pypar.parallelize(model, "dp=2 tp=2")
            ids = batch["input_ids"][: 4 + rank % 2]
            shared.train_step({"input_ids": ids, "labels": ids})
        elif case == "values":
            shared, _ = pypar.parallelize(model, "dp=2 tp=2")
            ids = batch["input_ids"][:4] + rank % 2
            shared.train_step({"input_ids": ids, "labels": ids})
        elif case == "empty":
            shared, _ = pypar.parallelize(model, "dp=4")
            shared.train_step(shared.local_batch({k: v[:3] for k, v in batch.items()}))
        elif case == "one rank":
            shared, _ = pypar.parallelize(model, "dp=2 tp=2")
            if rank == 3:
                batch = {**batch, "labels": "nothing"}
            shared.train_step(shared.local_batch(batch))
        return "nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("size", ["PlanError", "pp=3 dp=2 tp=1: is 6 ranks, and the job has 4", "the nearest legal plan: pp=2 dp=2"]),
        ("layers", ["PlanError", "pp=4 schedule=interleaved", "8 stages for 4 blocks", "the nearest legal plan: "]),
        ("heads", ["PlanError", "tp=4", "2 heads, too few for 4 ranks", "the nearest legal plan: dp=2 tp=2"]),
        ("optimizer", ["ValueError", "Adafactor", "element by element", "AdamW"]),
        ("model", ["ValueError", "ranks 0 and 3 differ", "same full model"]),
        ("empty", ["ValueError", "share 3 of 4 has no sample"]),
        ("batch", ["ValueError", "ranks 0 and 1 are one data-parallel share", "different shape"]),
        ("values", ["ValueError", "ranks 0 and 1 are one data-parallel share", "different values"]),
    ],
)
def test_every_rank_says_what_is_wrong(case: str, says: list[str]):
    for text in run_ranks(_refused, 4, case, timeout_s=20):
        assert all(each in text for each in says), text


@pytest.mark.parametrize(
    ("case", "says"), [("loss", "loss_fn returned [2, 12, 97]"), ("one rank", "batch['labels'] is str")]
)
def test_what_one_rank_raises_the_others_learn(case: str, says: str):
    texts = run_ranks(_refused, 4, case, timeout_s=20)
    assert all(says in text or "PeerError" in text for text in texts), texts
    assert any(says in text for text in texts), texts
    assert "nothing" not in texts


def test_plans_are_text_json_and_differences():
    plan = Plan(pp=2, dp=2, tp=2, zero=3, schedule="zbv", micro_batches=8, split=(1, 2), order=("tp", "dp", "pp"))
    assert Plan.parse(str(plan)) == plan == Plan.from_json(plan.to_json())
    assert str(Plan()) == "dp=1" and Plan.parse("dp=1") == Plan()
    assert plan.diff(Plan(pp=2, dp=2, tp=2, zero=1, schedule="zbv", micro_batches=8, split=(1, 2))).splitlines() == [
        "zero: 3 -> 1",
        "order: tp+dp+pp -> pp+dp+tp",
    ]
    with pytest.raises(PlanError, match="stages=2: there is no such field; they are pp, dp"):
        Plan.parse("stages=2")
    with pytest.raises(PlanError, match="pp=two: expected a number"):
        Plan.parse("pp=two")
    with pytest.raises(PlanError, match="JSON"):
        Plan.from_json("{")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("zero=4", "zero=4: there are 0 .none., 1, 2 and 3; the nearest legal plan: zero=3"),
        ("pp=0", "pp=0: must be 1 or more"),
        ("dp=3 zero=1 replicate=2", "replicate=2: does not divide dp=3; the nearest legal plan: dp=3 zero=1"),
        ("dp=2 replicate=2", "needs zero 1, 2 or 3.*nearest legal plan: dp=2 zero=1 replicate=2"),
        ("dp=2 precision=bfloat16", "masters are ZeRO's; the nearest legal plan: dp=2 zero=1 precision=bfloat16"),
        ("dp=2 sequence_parallel=true", "there is no axis to share rows on; the nearest legal plan: dp=2"),
        ("pp=2 schedule=zbx", "schedule=zbx: there are gpipe, .*; the nearest legal plan: pp=2"),
        ("order=pp+dp", "order=pp.dp: name pp, dp and tp once each"),
    ],
)
def test_an_illegal_plan_names_the_cell_the_reason_and_the_nearest_legal_one(text: str, says: str):
    with pytest.raises(PlanError, match=says) as error:
        Plan.parse(text).check()
    assert error.value.nearest is not None
    error.value.nearest.check()


def test_without_a_process_group_it_says_what_to_do():
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"pypar\.init"):
        pypar.parallelize(make_model("own"), "dp=1")
