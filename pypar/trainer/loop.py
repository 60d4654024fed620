"""The training loop of one rank."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import pypar
from pypar import rng
from pypar.hybrid import HybridModel, HybridOptimizer
from pypar.trainer import cache, checkpoint, data, model
from pypar.trainer.config import as_options
from pypar.trainer.errors import TrainError
from pypar.trainer.loss import TokenLoss
from pypar.trainer.metrics import Metrics, read
from pypar.trainer.optimizer import groups_of, learning_rate, settings_of
from pypar.trainer.prepare import Job
from pypar.trainer.progress import Progress
from pypar.trainer.ranks import Ranks
from pypar.trainer.state import Full, load_model, load_optimizer, save_model, save_optimizer


class Trainer:
    """Model, data and optimizer of this rank, at `step` done steps and `position` sequences read by all ranks."""

    def __init__(self, job: Job, ranks: Ranks):
        """Collective: an error on one rank is raised on all."""
        self.job, self.config, self.ranks = job, job.config, ranks
        self.run = Path(job.config.out or ".")
        self.cache = ranks.agree(lambda: cache.load(Path(job.cache)))
        self.train_data, self.val_data = data.split(
            self.cache, self.config.seq_len, self.config.val_fraction, self.config.seed
        )
        self.order = data.Order(self.train_data.num_sequences, self.config.seed)
        self.step = 0
        self.position = 0
        self.module = ranks.agree(self._make_module)
        self.num_parameters = sum(parameter.numel() for parameter in self.module.parameters())
        self.model, self.optimizer = self._parallelize()
        self.layout = self.model.axes
        self.token_loss = TokenLoss(self.module, self.layout.tp_group)
        # The ranks draw the same numbers: dropout is seeded by micro-batch, of which each dp rank has its own.
        rng.seed_everything(self.config.seed)
        if job.resume:
            ranks.agree(lambda: self._resume(Path(job.resume or "")))

    def _parallelize(self) -> tuple[HybridModel, HybridOptimizer]:
        config = self.config
        plan = config.plan(model.cuts_loss(self.job.model, config.plan()))
        try:
            return pypar.parallelize(
                self.module,
                plan,
                torch.optim.AdamW,
                param_groups=lambda named: groups_of(named, config),
                **settings_of(config),
            )
        except pypar.PlanError as error:
            raise TrainError(as_options(error, plan)) from error

    def _make_module(self) -> torch.nn.Module:
        """The full module, the same on every rank, on this rank's device."""
        rng.seed_everything(self.config.seed)
        module = model.create(self.job.model, self.job.weights)
        if self.job.resume:
            load_model(module, Path(self.job.resume))
        return module.to(self.ranks.device).train()

    def fit(self, metrics: Metrics | None, progress: Progress) -> None:
        """Trains up to config.steps, with validations and checkpoints on the way. metrics: on rank 0."""
        config = self.config
        if self.step == 0:
            self._evaluate(metrics, progress)
        while self.step < config.steps:
            lr = learning_rate(self.step, config)
            loss, norm = self._train_step(lr)
            self.step += 1
            self.position += config.batch_size
            if metrics:
                metrics.add(
                    "train",
                    self.step,
                    loss=loss,
                    lr=lr,
                    grad_norm=norm,
                    tokens=self.position * config.seq_len,
                    tokens_per_s=round(progress.tokens_per_s(self.step), 1),
                    unix_time=round(time.time(), 3),
                )
            progress.step(self.step, loss, lr)
            last = self.step == config.steps
            if last or (config.eval_every and self.step % config.eval_every == 0):
                self._evaluate(metrics, progress)
            if last or (config.save_every and self.step % config.save_every == 0):
                with progress.pause():
                    self.save()

    def _train_step(self, lr: float) -> tuple[float, float]:
        """(loss: the mean over all tokens of the global batch, norm of its gradient before clipping), on every rank."""
        config, ranks, layout = self.config, self.ranks, self.layout
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        own = data.share(self.order.take(self.position, config.batch_size), layout.dp_rank, layout.dp)
        loss = self._backward(own)
        norm = self.optimizer.clip_grad_norm_(config.clip or math.inf)
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            raise TrainError(
                f"{what} at step {self.step + 1}: lower --lr, clip harder (--clip) or warm up longer (--warmup)",
                exit_code=1,
                echo=ranks.rank != 0,
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def _backward(self, own: Sequence[int]) -> float:
        """Gradients of this rank's sequences; the mean loss over the global batch."""
        inputs, targets = data.batch(self.train_data, own, self.ranks.device)
        with self._autocast():
            return float(self.model.train_step(({"input_ids": inputs}, targets), self._mean))

    def _mean(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        return self.token_loss(output.logits, targets) / targets.numel()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def _evaluate(self, metrics: Metrics | None, progress: Progress) -> None:
        """The same validation sequences every time, shared out over the dp ranks."""
        config, layout = self.config, self.layout
        number = self.val_data.num_sequences
        if config.eval_batches:
            number = min(number, config.eval_batches * config.batch_size)
        chosen = data.permutation(self.val_data.num_sequences, config.seed, 0)[:number]
        size = config.micro_batch() * layout.dp
        loss_sum = 0.0
        with progress.pause():
            self.module.eval()
            for first in range(0, number, size):
                part = list(chosen[first : first + size])
                mine = data.share(part, layout.dp_rank, layout.dp)
                # A rank that has nothing takes part with what does not count.
                weight = 1.0 if mine else 0.0
                inputs, targets = data.batch(self.val_data, mine or part[:1], self.ranks.device)
                with self._autocast():
                    mean = self.model.eval_step(
                        ({"input_ids": inputs}, targets),
                        lambda output, targets, w=weight: (  # type: ignore[misc]
                            w * self.token_loss(output.logits, targets), w * targets.numel()
                        ),
                    )  # fmt: skip
                loss_sum += float(mean) * len(part) * config.seq_len
            self.module.train()
            loss = loss_sum / (number * config.seq_len)
        if metrics:
            metrics.add("val", self.step, loss=loss)
        progress.say(f"step {self.step}/{config.steps}  validation loss {loss:.4f}")

    def save(self) -> None:
        """The checkpoint of this step, written by rank 0. Collective; when it fails, every rank raises TrainError."""
        states = [rng.capture(self.ranks.device)]  # the same on every rank

        def fill(folder: Path, full: Full) -> None:
            save_model(full, self.job.model, folder)
            save_optimizer(full, folder)
            if self.config.tokenizer and self.config.tokenizer != "bytes":
                (folder / "tokenizer.json").write_bytes(Path(self.config.tokenizer).read_bytes())
            checkpoint.write_state(
                folder,
                {
                    "step": self.step,
                    "position": self.position,
                    "config": self.config.to_json(),
                    "world_size": self.ranks.world_size,
                    "data": {name: self.cache.meta[name] for name in ("sha256", "num_tokens")},
                    "rng": states,
                    "versions": {
                        "pypar": pypar.__version__,
                        "torch": torch.__version__,
                        "python": platform.python_version(),
                    },
                },
            )

        def write(full: Full | None) -> str:
            assert full is not None
            return str(checkpoint.write(self.run, self.step, lambda folder: fill(folder, full), self.config.keep))

        full = Full.of(self.model, self.optimizer)
        self.ranks.first(lambda: write(full))

    def _resume(self, path: Path) -> None:
        """All but the weights, which _make_module has loaded."""
        state = checkpoint.read_state(path)
        load_optimizer(self.model, self.optimizer, path)
        self.step, self.position = state["step"], state["position"]
        rng.restore(state["rng"][0], self.ranks.device)

    def history(self) -> list[dict[str, Any]]:
        """The curve up to the resumed step, from the run that the checkpoint lies in."""
        return read(checkpoint.run_of(Path(self.job.resume)), self.step) if self.job.resume else []
