"""Whether a model can be cut for the stages of a pipeline."""

from __future__ import annotations

from typing import Any

import torch

from pypar.pipeline_parallel.generators import make_schedule
from pypar.placement import cut
from pypar.trainer.config import TrainConfig
from pypar.trainer.errors import TrainError, reason
from pypar.trainer.model import create


def check_pipeline(name: str, model: dict[str, Any], config: TrainConfig) -> None:
    """Raises TrainError when the model can't be cut for the schedule's stages. name: --model."""
    if config.pp == 1:
        return
    try:
        plan = config.plan()
        schedule = make_schedule(plan.schedule, plan.pp, plan.micro_batches, plan.num_stages)
        with torch.device("meta"):
            cut(create(model, None), schedule.num_stages, plan.split)
    except ValueError as error:
        why = reason(error, with_type=False).replace("schedule '", "--schedule '")
        raise TrainError(f"--pp {config.pp} --schedule {config.schedule}, --model {name}: {why}") from error
