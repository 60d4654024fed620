"""What the commands have in common: how their options are read, and how wrong ones are told."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from pypar.hybrid.plan import Plan, PlanError
from pypar.trainer.errors import TrainError, reason

OPTIMIZERS = ("AdamW", "Adam", "SGD", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta")


class Parser(argparse.ArgumentParser):
    """Raises TrainError in place of leaving the process; the description and the epilog keep their lines."""

    def __init__(self, prog: str, description: str, epilog: str, argument_default: object = None):
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            argument_default=argument_default,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise TrainError(f"{message} (see {self.prog} --help)")


def positive(text: str) -> int:
    """A type of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def plan_of(text: str) -> Plan:
    """--plan: the text of a plan, or a file of JSON. Raises TrainError, also for one that can't run."""
    try:
        path = Path(text)
        plan = Plan.from_json(path.read_text()) if path.suffix == ".json" else Plan.parse(text)
        plan.check()
    except (OSError, PlanError) as error:
        raise TrainError(f"--plan {text}: {reason(error, with_type=False)}") from error
    return plan
