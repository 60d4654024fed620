"""Mistakes made on purpose in the protocol of csrc/cuda: each is noticed.

A mutation replaces a piece of a header, in a copy that the compiler finds first: no switch is in the kernels. What the
program ranks_as_threads says of it is in the table, tests/kernels/emulation/mutations.md.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_executor
import pytest

pytestmark = pytest.mark.skipif(cuda_executor.COMPILER is None, reason="no g++ on this machine")
TABLE = cuda_executor.EMULATION / "mutations.md"
TWIN = cuda_executor.EMULATION
KERNELS = cuda_executor.ROOT / "csrc"


@dataclasses.dataclass
class Mutation:
    mistake: str
    root: Path
    header: str
    old: str
    new: str
    scenario: str
    noticed: str  # "race" by ThreadSanitizer, "value" of a result, "end" of a call and what is said of it
    world: int = 3


MUTATIONS = [
    Mutation(
        "a flag is stored without release",
        TWIN,
        "pypar/signal.cuh",
        "store(value, std::memory_order_release)",
        "store(value, std::memory_order_relaxed)",
        "two_shot",
        "race",
    ),
    Mutation(
        "a wait ends without acquire",
        TWIN,
        "pypar/signal.cuh",
        "load(std::memory_order_acquire)",
        "load(std::memory_order_relaxed)",
        "all_gather",
        "race",
    ),
    Mutation(
        "blocks are counted without order",
        TWIN,
        "pypar/signal.cuh",
        "std::memory_order_acq_rel",
        "std::memory_order_relaxed",
        "reduce_scatter",
        "race",
    ),
    Mutation(
        "no barrier of the block before a flag is stored",
        KERNELS,
        "cuda/channel.cuh",
        "uint32_t call) {\n  __syncthreads();\n  for (int peer",
        "uint32_t call) {\n  for (int peer",
        "reduce_scatter",
        "race",
    ),
    Mutation(
        "no barrier of the block after a wait",
        KERNELS,
        "cuda/channel.cuh",
        "kNoData, source, chunk, call);\n  }\n  __syncthreads();",
        "kNoData, source, chunk, call);\n  }",
        "all_gather",
        "race",
    ),
    Mutation(
        "no barrier of the block before it counts as over",
        KERNELS,
        "cuda/channel.cuh",
        "uint32_t call) {\n  __syncthreads();\n  if (threadIdx.x != 0)",
        "uint32_t call) {\n  if (threadIdx.x != 0)",
        "one_way",
        "race",
    ),
    Mutation(
        "no gate in a collective, where it can't matter",  # see one_way in ranks_as_threads.cpp
        KERNELS,
        "cuda/channel.cuh",
        "wait_flag(channel, empty_flag(channel, channel.rank, peer, before), before, kNoSlot, peer, 0, call);",
        "",
        "zero_scatter",
        "not noticed",
    ),
    Mutation(
        "no gate: a slot is written before it was read",
        KERNELS,
        "cuda/channel.cuh",
        "wait_flag(channel, empty_flag(channel, channel.rank, peer, before), before, kNoSlot, peer, 0, call);",
        "",
        "one_way",
        "race or value",
    ),
    Mutation(
        "the gate is one call of its parity late",
        KERNELS,
        "cuda/channel.cuh",
        "gate(channel, call, call - 2);",
        "gate(channel, call, call - 4);",
        "one_way",
        "race or value",
    ),
    Mutation(
        "one slot for both parities",
        KERNELS,
        "cuda/channel.cuh",
        "(call & 1) * channel.slot_bytes",
        "0 * channel.slot_bytes",
        "two_shot",
        "race",
    ),
    Mutation(
        "copies gated as if they had two slots",
        KERNELS,
        "cuda/all_gather.cuh",
        "gate(channel, call, call - 1);",
        "gate(channel, call);",
        "copied",
        "race",
    ),
    Mutation(
        "copies are signalled before they are made",
        KERNELS,
        "cuda/all_gather.cuh",
        "launch(gate_kernel, dim3(1), dim3(kMaxRanks), 0, stream, channel, true);",
        "launch(gate_kernel, dim3(1), dim3(kMaxRanks), 0, stream, channel, true);\n"
        "  launch(publish_kernel, dim3(1), dim3(kMaxRanks), 0, stream, channel, true);",
        "copied",
        "race",
    ),
    Mutation(
        "a message is signalled before it is copied",
        KERNELS,
        "cuda/ring_send.cuh",
        "launch(ring_gate_kernel, dim3(1), dim3(1), 0, stream, params, true);",
        "launch(ring_gate_kernel, dim3(1), dim3(1), 0, stream, params, true);\n"
        "  launch(ring_publish_kernel, dim3(1), dim3(1), 0, stream, params, false);",
        "ring",
        "race",
    ),
    Mutation(
        "a slot is given back before it was read",
        KERNELS,
        "cuda/channel.cuh",
        "if (add_acq_rel_gpu(mine + kDone, 1) + 1 != gridDim.x) return false;",
        "if (add_acq_rel_gpu(mine + kDone, 1) != 0) return false;",
        "reduce_scatter",
        "race",
    ),
    Mutation(
        "the count of blocks is not set back",
        KERNELS,
        "cuda/channel.cuh",
        "  mine[kDone] = 0;\n",
        "",
        "all_gather",
        "race or end",
    ),
    Mutation(
        "the call's number stays",
        KERNELS,
        "cuda/channel.cuh",
        "  mine[kEpoch] = call;\n",
        "",
        "one_shot",
        "value",
    ),
    Mutation(
        "4 bytes are taken whatever call they are of",
        KERNELS,
        "cuda/all_reduce.cuh",
        "while (static_cast<uint32_t>(pair >> 32) != call) {",
        "while (static_cast<uint32_t>(pair >> 32) == 0) {",
        "one_shot",
        "value",
    ),
    Mutation(
        "chunks and results share their flags",
        KERNELS,
        "cuda/all_reduce.cuh",
        "results = kChunks / 2 + block;",
        "results = block;",
        "two_shot",
        "race",
    ),
    Mutation(
        "the switch adds before all numbers are there",
        KERNELS,
        "cuda/all_reduce_multimem.cuh",
        "  wait(channel, block, call);\n",
        "",
        "multimem",
        "race or value",
    ),
    Mutation(
        "the switch's sums are read without waiting",
        KERNELS,
        "cuda/all_reduce_multimem.cuh",
        "  wait(channel, results, call);\n",
        "",
        "multimem",
        "race or value",
    ),
    Mutation(
        "every rank adds the chunk of the first",
        KERNELS,
        "cuda/all_reduce_multimem.cuh",
        "const Run run = piece_of<T>(p.all.numel, rank, world, block, blocks);",
        "const Run run = piece_of<T>(p.all.numel, 0, world, block, blocks);",
        "multimem",
        "race or value",
    ),
    Mutation(
        "sums in the order (rank - i) mod W",
        KERNELS,
        "cuda/elements.cuh",
        "return r == rank ? own : slot + r * stride;",
        "r = (rank - r + world) % world;\n    return r == rank ? own : slot + r * stride;",
        "two_shot",
        "value",
    ),
    Mutation(
        "sums rounded after every rank",
        KERNELS,
        "cuda/elements.cuh",
        "sum[k] = combine(op, sum[k], Element<T>::widen(x.at[k]));",
        "sum[k] = Element<T>::widen(Element<T>::narrow(combine(op, sum[k], Element<T>::widen(x.at[k]))));",
        "two_shot",
        "value",
    ),
    Mutation(
        "a wait whose time is over goes on",
        KERNELS,
        "cuda/channel.cuh",
        "while (!reached(load_relaxed_sys(flag), target)) patience",
        "while (!reached(load_relaxed_sys(flag), target) && patience.looks < 500) patience",
        "absent",
        "race or end",
    ),
    Mutation(
        "peers are not told of the end",
        KERNELS,
        "cuda/channel.cuh",
        "    store_release_sys(words_of(channel, r) + kAbort, kAbortFor + static_cast<uint32_t>(peer));\n",
        "",
        "absent",
        "end",
    ),
    Mutation(
        "a message is sent without its credit",
        KERNELS,
        "cuda/ring_send.cuh",
        "ring.piece - static_cast<uint32_t>(ring.num_slots), kNoSlot",
        "ring.piece - 2 * static_cast<uint32_t>(ring.num_slots), kNoSlot",
        "pipe",
        "race or value",
        2,
    ),
    Mutation(
        "a message is read without waiting",
        KERNELS,
        "cuda/ring_recv.cuh",
        "ring.piece, kNoData",
        "0, kNoData",
        "ring",
        "race",
        2,
    ),
]


def mutate(mutation: Mutation, folder: Path) -> Path:
    text = (mutation.root / mutation.header).read_text()
    assert text.count(mutation.old) == 1, f"{mutation.header} has {text.count(mutation.old)} times {mutation.old!r}"
    copy = folder / "mutated" / mutation.header
    copy.parent.mkdir(parents=True)
    copy.write_text(text.replace(mutation.old, mutation.new))
    return folder / "mutated"


@pytest.fixture(scope="module")
def program_of(request, tmp_path_factory) -> Iterator[Callable[[Mutation], Path]]:
    """mutation -> the program with it. All that this session needs are compiled while the first ones run."""

    root = tmp_path_factory.mktemp("mutants")

    def compiled(mutation: Mutation) -> Path:
        folder = root / mutation.mistake.replace(" ", "_")
        folder.mkdir()
        return cuda_executor.build_ranks(folder, "races", mutate(mutation, folder))

    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = {item.callspec.params["mutation"].mistake: item.callspec.params["mutation"] for item in items}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = {mistake: pool.submit(compiled, mutation) for mistake, mutation in wanted.items()}
        yield lambda mutation: programs[mutation.mistake].result()
        pool.shutdown(cancel_futures=True)


def notice(mutation: Mutation, program: Path) -> tuple[str, str]:
    """How the mistake was noticed, and the first line that says so."""
    status, said = cuda_executor.run_program(program, mutation.scenario, mutation.world, 30, stalls="11:300")
    if status == 0:
        return "not noticed", ""
    race = re.search(r"SUMMARY: ThreadSanitizer: data race \S*/(\S+ in .*)", said)
    if race:
        return "race", race[1].replace("pypar::", "")
    line = re.search(r"WRONG (.*)", said)
    assert line, said
    return ("end" if line[1].startswith(("end", "report", "error")) else "value"), line[1]


def check(mutation: Mutation, program: Path) -> None:
    """How it is noticed first may depend on what else the machine does; that it is noticed doesn't."""
    how = notice(mutation, program)[0]
    assert (how == "not noticed") == (mutation.noticed == "not noticed"), how


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.mistake.replace(" ", "_"))
def test_a_mistake_is_noticed(mutation, program_of):
    check(mutation, program_of(mutation))


@pytest.mark.parametrize("mutation", MUTATIONS[:2], ids=lambda m: m.mistake.replace(" ", "_"))
def test_a_forgotten_order_is_a_race(mutation, program_of):
    """Two of them in the fast suite, too."""
    check(mutation, program_of(mutation))


def rows() -> str:
    lines = [f"| {m.mistake} | {m.header} | {m.scenario}, {m.world} ranks | {m.noticed} |" for m in MUTATIONS]
    head = "| mistake | in | noticed by the scenario | as |\n| --- | --- | --- | --- |"
    return "\n".join([head, *lines])


def test_the_table_is_of_these_mutations():
    assert rows() in TABLE.read_text(), "run python tests/kernels/test_cuda_emulated_mutations.py"


if __name__ == "__main__":  # writes the table
    TABLE.write_text(
        "# Mistakes that the tests of csrc/cuda notice\n\n"
        "Written by `python tests/kernels/test_cuda_emulated_mutations.py`, whose test makes each of these mistakes\n"
        "in a copy of a header and runs it with ranks as threads under ThreadSanitizer. As: a `race` that it reports,\n"
        "a wrong `value` of some rank, a wrong `end` (a call that ends in an error, or should and does not).\n\n"
        + rows()
        + "\n"
    )
