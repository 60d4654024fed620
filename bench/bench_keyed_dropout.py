"""keyed_dropout against torch's dropout, forward and backward: python -m bench.bench_keyed_dropout [--threads 1]

One process: nothing is communicated. A case is named by the bytes of x; p = 0.1. "part" is a rank's half of attention's
probabilities [B, H, S, S], cut by heads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from bench import harness, report
from bench.collectives import parse_sizes
from bench.harness import Case
from pypar.ops import keyed_dropout

P, SEED, SITE = 0.1, 5, 7
SIZES = (64 << 10, 1 << 20, 16 << 20)
S = 64  # of the probabilities [B, 4, S, S], of which a part has 2 heads


def shaped(case: Case) -> torch.Tensor:
    x = torch.randn(case.nbytes // 4, generator=torch.Generator().manual_seed(1)).view(-1, 2, S, S)
    return torch.where(x == 0, 1, x)  # so that what is 0 was dropped


def keyed(x: torch.Tensor) -> torch.Tensor:
    return keyed_dropout(x, SEED, SITE, P)


def part(x: torch.Tensor) -> torch.Tensor:
    return keyed_dropout(x, SEED, SITE, P, 1, 4, [2, 4])


def plain(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, P)


class Dropout:
    """A way to drop out."""

    def __init__(self, name: str, fn: Callable[[torch.Tensor], torch.Tensor]):
        self.name, self.fn = name, fn

    def skips(self, case: Case) -> bool:
        return False

    def verify(self, case: Case) -> str:
        x = shaped(case).requires_grad_()
        y = self.fn(x)
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        kept = y != 0
        share = kept.double().mean().item()
        if abs(share - (1 - P)) > 5 * (P * (1 - P) / x.numel()) ** 0.5:
            return f"{share} of the elements are kept, not {1 - P}"
        if not torch.allclose(y, x * kept / (1 - P)) or not torch.allclose(x.grad, kept / (1 - P)):
            return "what is kept is not x / (1 - p), or its gradient not 1 / (1 - p)"
        return ""

    def measure(self, case: Case, iters: int, num_samples: int) -> list[float]:
        x, dy = shaped(case).requires_grad_(), shaped(case)
        us = []
        for _ in range(num_samples):
            start = time.perf_counter_ns()
            for _ in range(iters):
                torch.autograd.grad(self.fn(x), x, dy)
            us.append((time.perf_counter_ns() - start) / (1000 * iters))
        return us


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    p = argparse.ArgumentParser(description="Bench keyed_dropout, forward and backward")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--sizes", type=parse_sizes, default=SIZES, help="bytes of x, as 64K,16M")
    p.add_argument("--rounds", type=int, default=5, help="of A B A B; default 5")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    variants = [Dropout("torch", plain), Dropout("keyed", keyed), Dropout("keyed, part", part)]
    cases = [Case("keyed_dropout", nbytes, 1) for nbytes in args.sizes]
    results = harness.run(variants, cases, args.rounds, say=print)
    harness.write_csv("bench_keyed_dropout", results)
    kept = harness.one_regime(results)
    title = f"keyed_dropout, forward and backward, {args.threads} threads, float32"
    print(f"\n{title}\n{report.table(kept)}\n{report.chart('bench_keyed_dropout', title, kept)}\n")
    return 1 if any(r.refused for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
