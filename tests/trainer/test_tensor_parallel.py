"""dp x tp changes the loss curve by rounding only, and a checkpoint goes on under any other dp x tp."""

import dataclasses
import json

import pytest
import torch

from pypar.hybrid import Plan
from pypar.testing import run_ranks
from pypar.trainer import args, checkpoint, model
from pypar.trainer.errors import TrainError
from pypar.trainer.loop import Trainer
from pypar.trainer.main import main
from pypar.trainer.prepare import Job, prepare
from pypar.trainer.progress import Progress
from pypar.trainer.ranks import Ranks
from pypar.trainer.sample import generate
from pypar.trainer.state import Full

from .helpers import BACKEND, curve, rows, run_train

# 2 key and value heads, which 4 ranks hold as copies; widths and vocabulary that 4 ranks don't divide; tied.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 257,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "tie_word_embeddings": True,
}
SETTINGS = [{}, {"sequence_parallel": False, "accumulate": 2}]
LAYOUTS = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 4: [(2, 2), (1, 4)]}


@pytest.fixture
def llama_options(options, model, tmp_path, monkeypatch):
    """As `options`, of a llama. eps: a gradient near zero must not become a step of lr."""
    monkeypatch.chdir(tmp_path)
    model.write_text(json.dumps(LLAMA))
    return [*options, "--eps", "1e-5", "--batch-size", "7"]


def laid_out(job: dict, dp: int, tp: int, **settings) -> Job:
    made = Job.from_json(job)
    return dataclasses.replace(made, config=dataclasses.replace(made.config, dp=dp, tp=tp, **settings))


def train(trainer: Trainer, steps: int) -> list[tuple[float, float]]:
    """(loss, norm) of each step"""
    out = []
    for _ in range(steps):
        out.append(trainer._train_step(lr=1e-2))
        trainer.step += 1
        trainer.position += trainer.config.batch_size
    return out


def full_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    full = Full.of(trainer.model, trainer.optimizer)
    return {} if full is None else {name: tensor.clone() for name, tensor in (full.weights | full.moments).items()}


class Validations:
    """Stands for Metrics."""

    def __init__(self):
        self.losses = []

    def add(self, split, step, loss):
        self.losses.append(loss)


def results(rank: int, world_size: int, job: dict):
    """For each of SETTINGS and each layout: losses and norms of 4 steps, validation loss, sample, weights and moments;
    and what the rank draws next."""
    out = []
    for settings in SETTINGS:
        for dp, tp in LAYOUTS[world_size]:
            trainer = Trainer(laid_out(job, dp, tp, **settings), Ranks.current("cpu"))
            steps = train(trainer, 4)
            validations = Validations()
            trainer._evaluate(validations, Progress(0, 4, 1, 1, shown=False))
            prompt = trainer.val_data.sequence(0)[:20].tolist()
            group, full = trainer.layout.tp_group, trainer.token_loss.full
            sample = generate(trainer.module, prompt, 12, 256, 16, 1.0, torch.device("cpu"), 3, group, full)
            out.append((steps, validations.losses, sample, full_of(trainer), torch.rand(2).tolist()))
    return out


def assert_close(found, wanted):
    (steps, validation, sample, tensors), (its_steps, its_validation, its_sample, its_tensors) = found, wanted
    assert torch.tensor(steps).flatten().tolist() == pytest.approx(torch.tensor(its_steps).flatten().tolist(), rel=1e-5)
    assert validation == pytest.approx(its_validation, rel=1e-5)
    assert sample == its_sample
    assert tensors.keys() == its_tensors.keys()
    for name, expected in its_tensors.items():
        torch.testing.assert_close(tensors[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_layouts_change_only_rounding(llama_options):
    job = prepare(args.parse(llama_options)[0], None, False).to_json()
    wanted = run_ranks(results, 1, job, backend=BACKEND)[0]
    for steps, _, sample, _, _ in wanted:
        assert steps[-1][0] < steps[0][0] and len(sample) == 12
    for world_size, layouts in list(LAYOUTS.items())[1:]:
        ranks = run_ranks(results, world_size, job, backend=BACKEND)
        for number, found in enumerate(ranks[0]):
            assert_close(found[:4], wanted[number // len(layouts)][:4])
            for other in ranks[1:]:
                assert other[number][:3] == found[:3], "every rank sees the same losses, norms and tokens"
            drawn = [rank[number][4] for rank in ranks]
            assert all(numbers == drawn[0] for numbers in drawn), "one state of the generators goes into a checkpoint"


def save_and_go_on(rank: int, world_size: int, jobs: list[dict]):
    """For each layout 2 steps, a checkpoint, 2 more: those losses, weights and moments; and again from it."""
    out = []
    for job, (dp, tp) in zip(jobs, LAYOUTS[world_size], strict=True):
        trainer = Trainer(laid_out(job, dp, tp), Ranks.current("cpu"))
        train(trainer, 2)
        trainer.save()
        straight = train(trainer, 2), full_of(trainer)
        again = Trainer(resumed(laid_out(job, dp, tp)), Ranks.current("cpu"))
        out.append((straight, (train(again, 2), full_of(again))))
    return out


def resumed(job: Job) -> Job:
    return dataclasses.replace(job, resume=job.config.out + "/checkpoints/step-00000002")


def go_on(rank: int, world_size: int, jobs: list[dict]):
    """For each checkpoint and each layout: 2 steps from it."""
    out = []
    for job in jobs:
        for dp, tp in LAYOUTS[world_size]:
            trainer = Trainer(resumed(laid_out(job, dp, tp)), Ranks.current("cpu"))
            out.append((train(trainer, 2), [], [], full_of(trainer)))
    return out


def test_a_checkpoint_goes_on_under_any_layout(llama_options, tmp_path):
    from transformers import AutoModelForCausalLM

    names = [f"dp{dp}tp{tp}" for dp, tp in LAYOUTS[4]]
    jobs = [prepare(args.parse([*llama_options, "--out", name])[0], None, False).to_json() for name in names]
    saved = run_ranks(save_and_go_on, 4, jobs, backend=BACKEND)[0]
    for name, (straight, again) in zip(names, saved, strict=True):
        assert straight[0] == again[0], "the same layout goes on bit for bit"
        assert not [key for key, tensor in straight[1].items() if not torch.equal(tensor, again[1][key])]
        path = checkpoint.latest(tmp_path / name)
        checkpoint.verify(path)
        loaded = AutoModelForCausalLM.from_pretrained(path)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and loaded.lm_head.weight.shape == (257, 32)
    for world_size, layouts in LAYOUTS.items():
        for number, found in enumerate(run_ranks(go_on, world_size, jobs, backend=BACKEND)[0]):
            steps, tensors = saved[number // len(layouts)][0]
            assert_close(found, (steps, [], [], tensors))


def test_more_ranks_than_heads(refused, llama_options):
    line = refused(*llama_options, "--tp", "5")
    assert "--tp 5 does not fit --model" in line and "has 4 heads, too few for 5 ranks" in line
    assert line.endswith("use --tp 1 to 4")


def test_a_model_that_cannot_be_cut(refused, llama_options, model):
    model.write_text(json.dumps({"model_type": "mamba", "vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1}))
    line = refused(*llama_options, "--tp", "2")
    assert "--tp 2 does not fit --model" in line and line.endswith("MambaForCausalLM: use --dp in place of --tp")


def test_layouts_that_cannot_work(refused, llama_options):
    assert "--tp must be at least 1, got 0" in refused(*llama_options, "--tp", "0")
    assert "--tp must be at least 1, got -2" in refused(*llama_options, "--tp", "-2")
    line = refused(*llama_options, "--dp", "8", "--tp", "2")
    assert "--batch-size 7 gives some of --dp 8 ranks" in line and "--batch-size 8 or more" in line
    line = refused(*llama_options, "--dp", "100", "--tp", "4", "--batch-size", "100")
    assert "--dp 100 x --tp 4 is more than 8 ranks for each of" in line
    assert "--tp 400 is more than 8 ranks" in refused(*llama_options, "--tp", "400")


def test_ranks_of_torchrun(llama_options):
    def prepared(world_size, *more):
        return prepare(args.parse([*llama_options, *more])[0], None, False, world_size).config

    assert prepared(6, "--tp", "2").dp == prepared(6, "--dp", "3", "--tp", "2").dp == 3
    for message, world_size, *more in [
        ("--tp 4 does not divide the 6 ranks of torchrun: use --tp 1, 2, 3 or 6, or start", 6, "--tp", "4"),
        ("--tp 2 does not divide the 1 rank of torchrun: use --tp 1, or start", 1, "--tp", "2"),
        ("--tp 0 does not divide the 2 ranks of torchrun: use --tp 1 or 2, or start", 2, "--tp", "0"),
        ("--dp 2 x --tp 2, but torchrun started 6 ranks: leave --dp out", 6, "--dp", "2", "--tp", "2"),
        ("--dp 2, but torchrun started 6 ranks: leave --dp out", 6, "--dp", "2"),
    ]:
        with pytest.raises(TrainError, match=message):
            prepared(world_size, *more)


def test_sequence_parallel_that_does_not_fit_names_the_option(monkeypatch):
    from pypar.tensor_parallel import parallelize

    def refuse(*_):
        raise ValueError("sequence_parallel=True found no list of layers: use sequence_parallel=False")

    monkeypatch.setattr(parallelize, "stacks_of", refuse)
    config = model.describe("llama-tiny", 257, 256, 32, None)
    with pytest.raises(TrainError, match="--sequence-parallel found no list of layers: use --no-sequence-parallel"):
        model.check_tensor_parallel("llama-tiny", config, Plan(tp=2, sequence_parallel=True))
    model.check_tensor_parallel("llama-tiny", config, Plan(tp=2))


@pytest.mark.slow
def test_the_command_line(refused, llama_options, tmp_path):
    """Four ranks; then the run goes on with one."""
    done = run_train(*llama_options, "--dp", "2", "--tp", "2", "--out", "four", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "4 ranks (dp 2 x tp 2, sequence parallel) over" in done.stdout
    assert main([*llama_options, "--out", "one"]) == 0
    one, four = (
        [(row["split"], row["step"], row["loss"]) for row in curve(tmp_path / name)] for name in ("one", "four")
    )
    assert [row[:2] for row in one] == [row[:2] for row in four]
    assert [row[2] for row in four] == pytest.approx([row[2] for row in one], rel=1e-5)
    assert (tmp_path / "four/sample.txt").read_text() == (tmp_path / "one/sample.txt").read_text()

    assert main(["--resume", "four", "--dp", "1", "--tp", "1", "--steps", "11"]) == 0
    assert rows(tmp_path / "four")[-1]["step"] == 11
    assert "--tp 5 does not fit" in refused("--resume", "four", "--tp", "5", "--steps", "14")
