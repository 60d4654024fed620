"""What a pipeline does beside plain steps: skips, dropout, accumulation, evaluation, generation; faults."""

import os
import signal
import time

import pytest
import torch
from pipeline_parallel.pipeline_common import Own, batches, build, hf_llama, loss_of, next_token_loss

from pypar.pipeline_parallel import Pipeline
from pypar.pipeline_parallel.batch import causal_loss
from pypar.testing import run_ranks


def own(**options):
    torch.manual_seed(3)
    return Own(**options)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def gradients_of(model, batch):
    loss = loss_of(model, batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}


def skips(rank, world):
    (batch,) = batches("own", 1, 6)
    pipeline = Pipeline(own(skip=True), micro_batches=3, carry=["blocks.0"])
    loss = pipeline.train_step(batch, next_token_loss)
    found = pipeline.full_gradients()
    if rank == 0:
        want_loss, want = gradients_of(own(skip=True), batch)
        close(loss.item(), want_loss)
        for name, grad in want.items():
            close(found[name], grad)
    without = Pipeline(own(skip=True), micro_batches=3)
    with pytest.raises((RuntimeError, Exception), match=r"'norm' reads a value of an earlier stage.*carry=\[") as info:
        without.train_step(batch, next_token_loss)
    assert rank == world - 1 or type(info.value).__name__ == "PeerError"


def test_a_skip_connection_over_stages():
    run_ranks(skips, 3)


def dropout(rank, world, splits):
    found = []
    for schedule, micro_batches, split in splits:
        torch.manual_seed(11)
        pipeline = Pipeline(own(dropout=0.5), schedule=schedule, micro_batches=micro_batches, split=split)
        torch.manual_seed(12)
        for batch in batches("own", 2, 6):
            loss = pipeline.train_step(batch, next_token_loss)
        found.append((loss.item(), pipeline.full_gradients()))
    return found


def test_dropout_depends_on_neither_schedule_nor_split_nor_ranks():
    one = run_ranks(dropout, 1, [("gpipe", 3, "auto")])[0]
    splits = ([1, 6], ["blocks.3"], ["blocks.3.down"], "balanced")
    two = run_ranks(dropout, 2, [("gpipe", 3, "auto"), *(("zbh1", 3, split) for split in splits)])[0]
    three = run_ranks(dropout, 3, [("1f1b", 3, "auto")])[0]
    loss, grads = one[0]
    for other_loss, other in [*two, *three]:
        assert other_loss == loss
        assert not [n for n, g in grads.items() if not torch.equal(other[n], g)]


def accumulates(rank, world, kind):
    def mean_loss(output, targets):
        total, count = next_token_loss(output, targets)
        return total / count

    loss_fn = mean_loss if kind == "mean" else next_token_loss
    pipeline = Pipeline(own(tied=True), micro_batches=3)
    two = batches("own", 2, 6)
    for batch in two:
        pipeline.train_step(batch, loss_fn)
    norm = pipeline.clip_grad_norm_(0.05)
    found = pipeline.full_gradients()
    if rank == 0:
        model = own(tied=True)
        for batch in two:
            loss_of(model, batch).backward()
        close(torch.tensor(norm), torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        for name, p in model.named_parameters(remove_duplicate=False):
            close(found[name], p.grad)


@pytest.mark.parametrize("kind", ["mean", "sum and count"])
def test_accumulation_clipping_and_both_kinds_of_loss(kind):
    run_ranks(accumulates, 2, kind)


def evaluates(rank, world):
    batch = batches("llama", 1, 5)[0]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    torch.manual_seed(3)
    plain = hf_llama().eval()
    torch.manual_seed(3)
    pipeline = Pipeline(hf_llama(), micro_batches=2, schedule="1f1b")
    pipeline.eval()
    with torch.no_grad():
        close(pipeline(**inputs).logits, plain(**inputs).logits)
    prompt = {k: v[:, :4] for k, v in inputs.items()}
    found = pipeline.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, plain.generate(**prompt, max_new_tokens=5, do_sample=False))
    sampled = pipeline.generate(**prompt, max_new_tokens=5, do_sample=True)
    assert pipeline.train_step(batch).isfinite()
    return sampled


def test_evaluation_and_generation():
    first, second = run_ranks(evaluates, 2)
    assert torch.equal(first, second)


def checkpoints(rank, world, reentrant):
    batch = batches("llama", 1, 6)[0]
    torch.manual_seed(3)
    model = hf_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    pipeline = Pipeline(model, micro_batches=3)
    pipeline.train()
    loss = pipeline.train_step(batch)
    found = pipeline.full_gradients()
    if rank == 0:
        torch.manual_seed(3)
        want_loss, want = gradients_of(hf_llama(), batch)
        close(loss.item(), want_loss)
        for name, grad in want.items():
            close(found[name], grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    run_ranks(checkpoints, 2, reentrant)


def over_gloo(rank, world):
    batch = batches("own", 1, 7)[0]
    pipeline = Pipeline(own(tied=True), micro_batches=4)
    loss = pipeline.train_step(batch, next_token_loss)
    grown = batches("own", 1, 16)[0]  # larger messages than the first step had
    pipeline.train_step(grown, next_token_loss)
    pipeline.train_step((batch[0][:2], batch[1][:2]), next_token_loss)  # fewer samples than micro-batches
    return loss.item(), pipeline.full_gradients()


def test_backends_agree():
    pypar, gloo = (run_ranks(over_gloo, 3, backend=backend)[0] for backend in ("pypar", "gloo"))
    assert pypar[0] == gloo[0] and all(torch.equal(gloo[1][n], g) for n, g in pypar[1].items())


def state(rank, world):
    model = own()
    pipeline = Pipeline(own(), micro_batches=2)
    for p in pipeline.parameters():
        p.data.zero_()
    pipeline.load_full_state_dict(model.state_dict())
    found = pipeline.full_state_dict()
    assert rank or all(torch.equal(found[n], t) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="load_full_state_dict: "):
        pipeline.load_full_state_dict({})


def test_full_state_goes_out_and_in():
    run_ranks(state, 2)


def fails(rank, world, how):
    pipeline = Pipeline(own(), micro_batches=3)
    batch = batches("own", 1, 6)[0]
    pipeline.train_step(batch, next_token_loss)
    if rank == 1:
        if how == "raises":
            pipeline.module.blocks[3].norm.forward = lambda x: (_ for _ in ()).throw(ArithmeticError("of this block"))
        else:
            pipeline.module.blocks[3].norm.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    pipeline.train_step(batch, next_token_loss)


def test_an_exception_in_a_stage_reaches_every_rank():
    *_, failures = run_ranks(fails, 3, "raises", expect_failure=True)
    assert set(failures) == {0, 1, 2}
    assert "ArithmeticError: of this block" in failures[1] and "in stage 1" in failures[1]
    for rank in (0, 2):
        assert "PeerError" in failures[rank] and "rank 1 of the pipeline raised ArithmeticError" in failures[rank]
        assert "in stage 1" in failures[rank]


def test_a_stage_that_is_killed():
    *_, failures = run_ranks(fails, 3, "killed", expect_failure=True)
    assert set(failures) == {0, 1, 2}
    assert all("PeerError" in failures[rank] and "rank 1" in failures[rank] for rank in (0, 2))


def slow(rank, world):
    pipeline = Pipeline(own(), micro_batches=12, schedule="gpipe" if world == 1 else "1f1b")
    batch = batches("own", 1, 12)[0]
    if rank == 1:
        pipeline.module.blocks[3].register_forward_pre_hook(lambda *_: time.sleep(0.05))
    pipeline.train_step(batch, next_token_loss)
    engine = next(iter(pipeline._engines.values()))
    loss = pipeline.train_step(batch, next_token_loss)
    return loss.item(), {str(k): c.ring.edge.num_slots for k, c in engine.channels.items()}


def test_a_slow_stage_holds_the_others_back():
    first, second = run_ranks(slow, 2)
    assert first[0] == second[0]
    assert all(count <= 4 for count in first[1].values()), first[1]  # 12 micro-batches, and no more room than that


def many(rank, world):
    """More micro-batches under way than a ring has slots: activations are copied out of them."""
    pipeline = Pipeline(own(), micro_batches=70, schedule="gpipe")
    batch = batches("own", 1, 70)[0]
    loss = pipeline.train_step(batch, next_token_loss)
    assert all(engine.copies for engine in pipeline._engines.values())
    found = pipeline.full_gradients()
    if rank == 0:
        want_loss, want = gradients_of(own(), batch)
        close(loss.item(), want_loss)
        for name, grad in want.items():
            close(found[name], grad)


def test_more_micro_batches_than_slots():
    run_ranks(many, 2)


def wrong(rank, world):
    with pytest.raises(ValueError, match="8 stages for 7 blocks"):
        Pipeline(own(), micro_batches=2, num_stages=8, schedule="interleaved")
    with pytest.raises(ValueError, match="micro_batches=0"):
        Pipeline(own(), micro_batches=0)
    with pytest.raises(ValueError, match="no list of blocks"):
        Pipeline(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"split=\[2, 2\]: needs 2 numbers"):
        Pipeline(own(), split=[2, 2])
    with pytest.raises(ValueError, match=r"'blocks\.9' is no block"):
        Pipeline(own(), split=["blocks.9"])
    with pytest.raises(ValueError, match=r"carry: 'blocks\.9' is no part"):
        Pipeline(own(), carry=["blocks.9"])
    pipeline = Pipeline(own(), micro_batches=2)
    batch = batches("own", 1, 4)[0]
    with pytest.raises(ValueError, match="a batch is a pair"):
        pipeline.train_step(batch[0], next_token_loss)


def disagree(rank, world):
    pipeline = Pipeline(own(), micro_batches=2)
    batch = batches("own", 1, 4 + rank)[0]
    with pytest.raises(Exception, match=r"ranks \[1\] have another batch than rank 0"):
        pipeline.train_step(batch, next_token_loss)


def bad_loss(rank, world):
    pipeline = Pipeline(own(), micro_batches=2)
    with pytest.raises(Exception, match=r"loss_fn returned \[4, 12, 61\]"):
        pipeline.train_step(batches("own", 1, 8)[0], lambda output, targets: output)


@pytest.mark.parametrize("check", [wrong, disagree, bad_loss])
def test_wrong_input(check):
    run_ranks(check, 2)


def test_the_model_tells_whose_a_module_is():
    run_ranks(other_ranks, 2)


def other_ranks(rank, world):
    pipeline = Pipeline(build("own"), micro_batches=2)
    with pytest.raises(RuntimeError, match=r"is in stage \d, which is another rank's"):
        pipeline.module(batches("own", 1, 2)[0][0])
    assert causal_loss is not None
