"""The training loop of one rank."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import pypar
from pypar import rng
from pypar.trainer import cache, checkpoint, data, model
from pypar.trainer.clip import Clip
from pypar.trainer.errors import TrainError
from pypar.trainer.layout import Layout
from pypar.trainer.loss import TokenLoss
from pypar.trainer.metrics import Metrics, read
from pypar.trainer.optimizer import learning_rate, make_optimizer
from pypar.trainer.pipeline import PipelineRun
from pypar.trainer.prepare import Job
from pypar.trainer.progress import Progress
from pypar.trainer.ranks import Ranks
from pypar.trainer.state import Full, load_model, load_optimizer, save_model, save_optimizer, unsharded


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
        self.layout = Layout.make(ranks, self.config.tp, self.config.pp)
        self.step = 0
        self.position = 0
        self.module = ranks.agree(self._make_module)
        self.num_parameters = sum(parameter.numel() for parameter in self.module.parameters())
        self.pipeline = PipelineRun(self.module, self.config) if self.layout.pp > 1 else None
        model.cut(self.module, self.layout, self.config.sequence_parallel)
        self.token_loss = TokenLoss(self.module, self.layout.tp_group)
        self.clip = Clip(self.module, self.layout)
        self.optimizer: torch.optim.Optimizer = make_optimizer(self.module, self.config)
        # Every dp rank has its own dropout; the ranks of a tp group, which share activations, have the same.
        rng.seed_everything(self.config.seed, self.layout.dp_rank, self.layout.dp)
        if job.resume:
            ranks.agree(lambda: self._resume(Path(job.resume or "")))
        self.parallel = model.wrap(self.module, self.layout, self.config.zero, self.optimizer)
        self.zero = self.parallel if isinstance(self.parallel, pypar.Zero) else None
        if self.zero is not None:
            self.optimizer = self.zero.optimizer

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
        norm = self._clip()
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
        config, layout = self.config, self.layout
        if self.pipeline is not None:
            with self._autocast():
                return self.pipeline.train_step(*data.batch(self.train_data, own, self.ranks.device))
        # DataParallel averages over dp ranks; times dp makes that a sum of this rank's share of the mean.
        scale = layout.dp / (config.batch_size * config.seq_len)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for part in range(config.accumulate):
            last = part == config.accumulate - 1
            with nullcontext() if last or layout.dp == 1 else self.parallel.no_sync():  # type: ignore[operator]
                part_sum = self._loss_sum(self.parallel, self.train_data, data.share(own, part, config.accumulate))
                (part_sum * scale).backward()
            loss_sum += part_sum.detach()
        return self._total(loss_sum) / (config.batch_size * config.seq_len)

    def _clip(self) -> float:
        """The norm of the gradient before clipping."""
        most = self.config.clip or math.inf
        return self.clip(self.zero, most) if self.pipeline is None else self.pipeline.pipeline.clip_grad_norm_(most)

    def _total(self, own: torch.Tensor) -> float:
        """The sum over the dp ranks' data, the same bits on every rank of the job."""
        return self.ranks.total(own if self.layout.counts() else torch.zeros_like(own))[0]

    def _loss_sum(self, module: torch.nn.Module, stream: data.Stream, indices: Sequence[int]) -> torch.Tensor:
        """float32 [], summed over the tokens of these sequences"""
        inputs, targets = data.batch(stream, indices, self.ranks.device)
        with self._autocast():
            logits = module(input_ids=inputs).logits  # [sequences, seq_len, vocab, or this rank's part of it]
        return self.token_loss(logits, targets)

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
        own = data.share(list(chosen), layout.dp_rank, layout.dp)
        size = config.micro_batch()
        passes = math.ceil(math.ceil(number / layout.dp) / size)  # of the busiest rank
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        with progress.pause():
            self.module.eval()
            for part in range(passes):
                mine = own[part * size : (part + 1) * size]
                if mine and self.pipeline is not None:
                    with self._autocast():
                        loss_sum += self.pipeline.eval_sum(*data.batch(self.val_data, mine, self.ranks.device))
                elif mine:
                    loss_sum += self._loss_sum(self.module, self.val_data, mine)
                elif config.zero == 3:  # a forward pass may gather parameters from every rank: for company
                    self._loss_sum(self.module, self.val_data, list(chosen[:1]))
            self.module.train()
            total = float(loss_sum) if self.pipeline is not None else self._total(loss_sum)
            loss = total / (number * config.seq_len)
        if metrics:
            metrics.add("val", self.step, loss=loss)
        progress.say(f"step {self.step}/{config.steps}  validation loss {loss:.4f}")

    def save(self) -> None:
        """The checkpoint of this step, written by rank 0. Collective; when it fails, every rank raises TrainError."""
        # The ranks of a tp group are in the same state: one of each dp rank.
        states = self.ranks.gather(rng.capture(self.ranks.device))[:: self.layout.tp * self.layout.pp]

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

        with self._full() as full:
            self.ranks.first(lambda: write(full))

    @contextmanager
    def _full(self) -> Iterator[Full | None]:
        """Within the block, on the ranks of the first copy of the model. Collective."""
        is_first, is_cut = self.layout.dp_rank == 0, self.layout.tp > 1
        if self.pipeline is not None:
            yield self.pipeline.full(self.optimizer)
            return
        if self.zero is None:
            yield Full.of(self.module, self.optimizer, is_cut) if is_first else None
            return
        states = self.zero.optimizer.full_state(dst=0)
        with self.zero.full_params():
            yield Full.of(self.module, unsharded(self.module, states), is_cut) if is_first else None

    def _resume(self, path: Path) -> None:
        """All but the weights, which _make_module has loaded."""
        state = checkpoint.read_state(path)
        # ZeRO's wrapper copies its shards: until then the states may lie in the file.
        borrow = self.config.zero > 0 and self.layout.tp == 1
        load_optimizer(
            self.optimizer, self.module, path, borrow, None if self.pipeline is None else self.pipeline.part_of
        )
        self.step, self.position = state["step"], state["position"]
        layout = self.layout
        if len(state["rng"]) == layout.dp:
            rng.restore(state["rng"][layout.dp_rank], self.ranks.device)
        else:
            # No state to go on with: new ones, that a second resume from here would draw again.
            rng.seed_everything(self.config.seed, layout.dp_rank, layout.dp, self.step)

    def history(self) -> list[dict[str, Any]]:
        """The curve up to the resumed step, from the run that the checkpoint lies in."""
        return read(checkpoint.run_of(Path(self.job.resume)), self.step) if self.job.resume else []
