"""The training loop's view of a pipeline: its steps, its full tensors, its sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import pypar
from pypar.pipeline_parallel.generators import make_schedule
from pypar.placement import cut
from pypar.trainer.config import TrainConfig
from pypar.trainer.errors import TrainError, reason
from pypar.trainer.loss import TokenLoss
from pypar.trainer.model import CONTEXT_NAMES, create
from pypar.trainer.state import Full


def check_pipeline(name: str, model: dict[str, Any], config: TrainConfig) -> None:
    """Raises TrainError when the model can't be cut for the schedule's stages. name: --model."""
    if config.pp == 1:
        return
    try:
        schedule = make_schedule(config.schedule, config.pp, config.micro_batches)
        with torch.device("meta"):
            cut(create(model, None), schedule.num_stages)
    except ValueError as error:
        why = reason(error, with_type=False).replace("schedule '", "--schedule '")
        raise TrainError(f"--pp {config.pp} --schedule {config.schedule}, --model {name}: {why}") from error


class PipelineRun:
    """Cuts the full module in place."""

    def __init__(self, module: nn.Module, config: TrainConfig):
        self.pipeline = pypar.Pipeline(module, schedule=config.schedule, micro_batches=config.micro_batches)
        self._sum = TokenLoss(module, None)
        known = [getattr(module.config, name, None) for name in CONTEXT_NAMES]
        self._context = next((n for n in known if isinstance(n, int)), config.seq_len)

    def _mean(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        return self._sum(output.logits, targets) / targets.numel()

    def train_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """The mean loss over all tokens, on every rank; gradients are there."""
        return float(self.pipeline.train_step(({"input_ids": inputs}, targets), self._mean))

    def eval_sum(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """The sum of the loss over all tokens, on every rank."""
        return float(self.pipeline.eval_step(({"input_ids": inputs}, targets), self._mean)) * targets.numel()

    def full(self, optimizer: torch.optim.Optimizer) -> Full | None:
        """On rank 0. Collective."""
        pipeline = self.pipeline
        weights, states = pipeline.full_state_dict(), pipeline.full_optimizer_state(optimizer)
        if not weights:
            return None
        for name in pipeline.aliases:  # a tied parameter is stored once
            weights.pop(name, None), states.pop(name, None)
        return Full(type(pipeline.module).__name__, weights, states)

    def part_of(self, states: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """Of the states of all parameters, by name, those of the parameters that are here."""
        here = [name for name, _ in self.pipeline.module.named_parameters()]
        first = {name: self.pipeline.aliases.get(name, name) for name in here}
        return {name: states[first[name]] for name in here if first[name] in states}

    def generate(self, prompt: Sequence[int], num_tokens: int, end: int, temperature: float) -> list[int]:
        """Up to num_tokens after the prompt, the same on every rank; none beyond what the model takes. Collective."""
        room = self._context - len(prompt)
        if room < 1:
            return []
        text = self.pipeline.generate(
            torch.tensor([list(prompt)]), max_new_tokens=min(num_tokens, room), do_sample=True,
            temperature=temperature, top_k=0, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        out = text[0, len(prompt) :].tolist()
        return out[: out.index(end)] if end in out else out
