"""What one rank does from start to end: train, then curve and sample."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

import pypar
from pypar.trainer import checkpoint
from pypar.trainer.config import cores
from pypar.trainer.loop import Trainer
from pypar.trainer.metrics import Metrics, curve, writing
from pypar.trainer.plot import plot
from pypar.trainer.prepare import Job, lock
from pypar.trainer.progress import Progress
from pypar.trainer.ranks import Ranks
from pypar.trainer.sample import generate
from pypar.trainer.tokens import load_tokens


def join(job_backend: str | None, device: str) -> Ranks:
    """Joins the job's process group."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    pypar.init(job_backend)
    return Ranks.current(device)


def train(job: Job, ranks: Ranks) -> None:
    """Runs the job on this rank. Raises TrainError."""
    config = job.config
    torch.set_num_threads(config.threads or max(1, cores() // ranks.local_world_size))
    run = Path(config.out or ".")
    started = time.monotonic()
    with ExitStack() as held:  # an error, too, gives the folder back
        if ranks.rank == 0:
            held.enter_context(lock(run))
        trainer = Trainer(job, ranks)
        metrics = Metrics(run, trainer.step, trainer.history()) if ranks.rank == 0 else None
        progress = Progress(
            trainer.step, config.steps, config.batch_size * config.seq_len, config.log_every, shown=ranks.rank == 0
        )
        progress.say(_headline(trainer))
        try:
            trainer.fit(metrics, progress)
        finally:
            progress.close()
        text = _sample(trainer) if config.sample_tokens else None
        if metrics:
            with writing(run):
                metrics.close()
                _finish(trainer, metrics, text, time.monotonic() - started)
        dist.barrier()


def _headline(trainer: Trainer) -> str:
    config, world_size = trainer.config, trainer.ranks.world_size
    pipeline = f"pp {config.pp} ({config.schedule})"
    how = [pipeline] if config.pp > 1 else []
    how += [f"dp {config.dp} x tp {config.tp}"] if config.pp == 1 or config.dp * config.tp > 1 else []
    how += [f"ZeRO {config.zero}"] if config.zero else []
    how += ["sequence parallel"] if config.tp > 1 and config.sequence_parallel else []
    how += ["recomputing"] if config.recompute else []
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks ({', '.join(how)})"
    skipped = trainer.cache.meta["skipped"]
    counts = "".join(f", {number} {why} files skipped" for why, number in sorted(skipped.items()))
    lines = [
        f"{config.model}: {trainer.num_parameters / 1e6:.2f} million parameters, {ranks} over {dist.get_backend()}, "
        f"{config.dtype}",
        f"data: {trainer.cache.meta['num_documents']} documents{counts}; "
        f"{trainer.train_data.num_tokens:,} training and {trainer.val_data.num_tokens:,} validation tokens",
        f"run: {trainer.run}",
    ]
    if trainer.job.resume:
        lines.append(f"resumed from {trainer.job.resume} at step {trainer.step}")
    return "\n".join(lines)


def _finish(trainer: Trainer, metrics: Metrics, sample: str | None, seconds: float) -> None:
    """Curve, sample and the last lines. Rank 0."""
    config, run = trainer.config, trainer.run
    plot(metrics.rows, f"{config.model}, {config.steps} steps", run / "loss.png")
    if sample is not None:
        (run / "sample.txt").write_text(sample, encoding="utf-8")
        print(f"--- sample (temperature {config.temperature:g}; the prompt comes first)\n{sample}\n---")
    losses = curve(metrics.rows, "val")[1]
    change = f"{losses[0]:.4f} -> {losses[-1]:.4f} nats per token ({100 * (losses[-1] / losses[0] - 1):+.0f} %)"
    print(f"validation loss {change} in {seconds:.0f} s")
    print(f"checkpoint {checkpoint.latest(run)}\ncurve {run / 'loss.png'}, metrics {run / 'metrics.jsonl'}", flush=True)


def _sample(trainer: Trainer) -> str:
    config = trainer.config
    tokens = load_tokens(config.tokenizer)
    if config.prompt is None:
        prompt = [int(number) for number in trainer.val_data.sequence(0)[: min(64, config.seq_len)]]
    else:
        prompt = list(tokens.encode(config.prompt))
    is_pipeline = config.pp > 1
    out = generate(
        trainer.model if is_pipeline else trainer.module,
        prompt,
        config.sample_tokens,
        tokens.end,
        config.seq_len,
        config.temperature,
        trainer.ranks.device,
        config.seed,
        dist.group.WORLD,
        trainer.token_loss.full,
        caches=not is_pipeline,
    )
    return tokens.decode([*prompt, *out])
