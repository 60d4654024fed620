"""What the tests of DataParallel share: small modules, inputs, the mean gradient, the run of many checks."""

from __future__ import annotations

import importlib
import itertools
import traceback

import torch
import torch.distributed as dist
from torch import nn

TINY = {"bucket_size_mb": 1e-5, "first_bucket_size_mb": 1e-5}  # a bucket for every parameter


def small(*sizes, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes)))


def gradients(module):
    return {n: p.grad.clone() for n, p in getattr(module, "module", module).named_parameters() if p.grad is not None}


def inputs(rank, step=0, rows=3, width=4):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(100 * rank + step))


def mean_gradients(world_size, make, loss):
    """{name: mean over ranks of the gradient of loss(module, rank)}, computed by one process."""
    sums: dict[str, torch.Tensor] = {}
    for rank in range(world_size):
        module = make()
        loss(module, rank).backward()
        for name, grad in gradients(module).items():
            sums[name] = sums.get(name, 0) + grad / world_size
    return sums


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


class Branches(nn.Module):
    """`left` and `right` are used by some ranks, `never` by none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.never, self.left, self.right, self.both = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, left):
        return self.both((self.left if left else self.right)(x))


def all_home(wrapper):
    return all(slot.param.grad is not None and slot.is_home(slot.param.grad) for slot in wrapper._reducer.slots)


# Each check_* runs on every rank and is one feature; those of a file share the processes of one run_ranks call.


def checks_of(module_name):
    return {n: f for n, f in vars(importlib.import_module(module_name)).items() if n.startswith("check_")}


def run_checks(rank, world_size, module_name):
    """Runs a module's check_* functions on this rank: {name: None or the traceback}.

    Ends at the first failure, on whichever rank: the ranks part ways there.
    """
    store, results = dist.distributed_c10d._get_default_store(), {}
    for name, check in checks_of(module_name).items():
        try:
            check(rank, world_size)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
        store.set(f"{name}/{rank}", "failed" if results[name] else "passed")
        if any(store.get(f"{name}/{r}") == b"failed" for r in range(world_size)):
            break
    return results
