"""vocab_cross_entropy and its chunked form against compositions: python -m bench.bench_vocab_cross_entropy [--ranks 4]

Forward and backward, float32. A case is named by the bytes of the full logits, [T, 32768]. The composition is the usual
one: all_reduce of the max, of the sum of e^(x - max), of the target's logit; from hidden states [T, 512], the matmul
around it and an all_reduce of dhidden. "one rank's share" is the composition with those all_reduces left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bench import harness, report
from bench.collectives import parse_sizes
from bench.harness import Case
from bench.pool import LIMIT_S, PoolVariant, Rank, RankPool

V, K = 32768, 512
SIZES = (1 << 20, 8 << 20, 64 << 20)  # 8, 64, 512 rows
OPS = ("vocab_cross_entropy", "linear_vocab_cross_entropy")
VARIANTS = ("one rank's share", "gloo", "pypar dist", "pypar fused")
Numbers = list[torch.Tensor]  # the loss and the gradients
Sum = Callable[..., Any]


def composed(logits: torch.Tensor, target: torch.Tensor, begin: int, all_reduce: Sum) -> Numbers:
    """The loss and its gradient from this rank's logits."""
    x_max = logits.amax(1)
    all_reduce(x_max, dist.ReduceOp.MAX)
    exp = (logits - x_max[:, None]).exp_()
    exp_sum = exp.sum(1)
    all_reduce(exp_sum)
    mine = (target >= begin) & (target < begin + logits.shape[1])
    column = torch.where(mine, target - begin, 0)[:, None]
    x_target = torch.where(mine, logits.gather(1, column)[:, 0], 0)
    all_reduce(x_target)
    loss = (exp_sum.log() + x_max - x_target).sum()
    dlogits = exp.div_(exp_sum[:, None])
    dlogits.scatter_add_(1, column, -mine.to(dlogits.dtype)[:, None])
    return [loss, dlogits]


def composed_linear(
    hidden: torch.Tensor, w: torch.Tensor, target: torch.Tensor, begin: int, all_reduce: Sum
) -> Numbers:
    loss, dlogits = composed(hidden @ w.t(), target, begin, all_reduce)
    dhidden = dlogits @ w
    all_reduce(dhidden)
    return [loss, dhidden, dlogits.t() @ hidden]


class LossRank(Rank):
    """Holds logits, hidden states, the shard of the weight, and the groups."""

    def __init__(self, rank: int, world: int, folder: str, page: str, max_bytes: int):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        super().__init__(rank, world, folder, page)
        import pypar  # registers the backend

        self.ops = pypar.ops
        self.groups: dict[str, Any] = {"gloo": dist.group.WORLD}
        self.groups["pypar"] = dist.new_group(backend="pypar", timeout=timedelta(seconds=LIMIT_S))
        rows = max_bytes // (4 * V)
        generator = torch.Generator().manual_seed(1)
        self.target = torch.randint(0, V, (rows,), generator=generator)
        self.hidden = torch.randn(rows, K, generator=generator)
        self.whole = torch.randn(V, K, generator=generator).div_(8)
        self.sizes = [len(part) for part in torch.empty(V).tensor_split(world)]
        self.begin = sum(self.sizes[:rank])
        self.w = self.whole.narrow(0, self.begin, self.sizes[rank]).clone()
        self.logits = self.hidden @ self.w.t()

    def prepare(self, variant: str, case: Case) -> Callable[[], Numbers]:
        rows = case.nbytes // (4 * V)
        target, group = self.target[:rows], self.groups["gloo" if variant == "gloo" else "pypar"]

        def all_reduce(x: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
            if variant != "one rank's share":
                dist.all_reduce(x, op, group=group)

        linear = case.op == "linear_vocab_cross_entropy"
        inputs = [self.hidden[:rows], self.w] if linear else [self.logits[:rows]]
        if variant != "pypar fused":
            fn = composed_linear if linear else composed
            return lambda: fn(*inputs, target, self.begin, all_reduce)
        leaves = [x.detach().requires_grad_() for x in inputs]

        def fused() -> Numbers:
            loss, _ = getattr(self.ops, case.op)(*leaves, target, group, self.sizes)
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

        return fused

    def verify(self, variant: str, case: Case) -> str:
        run = self.prepare(variant, case)
        self.barrier()
        got = run()
        self.barrier()
        if variant == "one rank's share":
            return ""
        rows = case.nbytes // (4 * V)
        leaves = [self.hidden[:rows].clone().requires_grad_(), self.whole.clone().requires_grad_()]
        logits = leaves[0] @ leaves[1].t()
        loss = torch.nn.functional.cross_entropy(logits, self.target[:rows], reduction="sum")
        linear = case.op == "linear_vocab_cross_entropy"
        grads = list(torch.autograd.grad(loss, leaves if linear else [logits]))
        grads[-1] = grads[-1].narrow(0 if linear else 1, self.begin, self.sizes[self.rank])
        for what, y, e in zip(("loss", "gradient", "gradient"), got, [loss.detach(), *grads], strict=False):
            if not torch.allclose(y, e, rtol=1e-4, atol=1e-4):
                return f"rank {self.rank}: the {what} of {case.op} is off by {(y - e).abs().max():g}"
        return ""

    def measure(self, variant: str, case: Case, iters: int, num_samples: int) -> list[float]:
        run = self.prepare(variant, case)
        return self.timed(run, iters, num_samples)


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    p = argparse.ArgumentParser(description="Bench the loss over a sharded vocabulary, forward and backward")
    p.add_argument("--ranks", type=int, default=2, choices=range(2, 5), metavar="2..4")
    p.add_argument("--sizes", type=parse_sizes, default=SIZES, help="bytes of the full logits, as 1M,64M")
    p.add_argument("--rounds", type=int, default=5, help="of A B A B; default 5")
    args = p.parse_args(argv)
    pool = RankPool(args.ranks, LossRank, max(args.sizes))
    refused = False
    try:
        for op in OPS:
            cases = [Case(op, nbytes, args.ranks) for nbytes in args.sizes]
            results = harness.run([PoolVariant(name, pool) for name in VARIANTS], cases, args.rounds, say=print)
            refused = refused or any(r.refused for r in results)
            harness.write_csv("bench_vocab_cross_entropy", results)
            kept = harness.one_regime(results)
            title = f"{op}, {args.ranks} ranks, one thread each, float32, sizes of the full logits [T, {V}]"
            print(f"\n{title}\n{report.table(kept)}\n{report.chart(f'bench_{op}', title, kept)}\n")
    finally:
        pool.close()
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
