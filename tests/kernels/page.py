"""page.py RESULTS.xml --docs docs/kernels.md: what was executed, checked and compiled, as one page.

RESULTS.xml is what `pytest tests/kernels --junitxml=RESULTS.xml` wrote.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent.parent)]

from kernels import (  # noqa: E402
    bytes_cuda,
    bytes_triton,
    test_cuda_static,
    test_triton_loss_static,
    test_triton_matmul_protocol,
    test_triton_matmul_static,
)
from kernels.bytes_least import Moved  # noqa: E402
from kernels.cuda_executor import COMPILER  # noqa: E402
from kernels.executors import EXECUTORS  # noqa: E402

NOT_RUN = "compiled and executed under emulation; not yet run on a GPU"
# Of a multiprocessor: registers, bytes of shared memory, threads.
LIMITS = {"80": (65536, 167936, 2048), "90": (65536, 233472, 2048), "100": (65536, 233472, 2048)}
CUDA_TARGETS = ("80", "90a", "100a")
Cell = tuple[str, str, str]  # file's stem, test, outcome


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def read(path: Path) -> list[Cell]:
    cells, files = [], {file.stem for file in HERE.glob("test_*.py")}
    for case in ElementTree.parse(path).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        stem = case.get("classname", "").split(".")[-1]
        if stem in files:  # the results may be those of the whole suite
            cells.append((stem, case.get("name", ""), outcome))
    return cells


def by_executor(cells: list[Cell]) -> str:
    """Kernel by executor: on how many ranks the bits were those of plain torch."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for stem, name, outcome in cells:
        match = re.fullmatch(r"test_bits_of_plain_torch\[(.+)-(\w+)-(\d+)\]", name)
        if stem == "test_executors" and match:
            executor, op, world = match.groups()
            found[op, executor].append(world if outcome == "passed" else f"{world} {outcome.upper()}")
    ops = list(dict.fromkeys(op for op, _ in found))

    def cell(op: str, executor: str) -> str:
        worlds = found.get((op, executor))
        if worlds is None:
            return ""
        return "never run" if all("SKIPPED" in w for w in worlds) else f"{', '.join(sorted(worlds))} ranks"

    return table(["kernel", *EXECUTORS], [[op, *(cell(op, e) for e in EXECUTORS)] for op in ops])


def by_file(cells: list[Cell]) -> str:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for stem, _, outcome in cells:
        counts[stem][outcome] += 1
    rows = []
    for stem in sorted(counts):
        says = ast.get_docstring(ast.parse((HERE / f"{stem}.py").read_text())) or ""
        rows.append([stem, " ".join(says.split("\n\n")[0].split()), *(counts[stem][k] for k in OUTCOMES)])
    return table(["tests/kernels", "what is checked", *OUTCOMES], rows)


OUTCOMES = ["passed", "failed", "skipped"]


def blocks(target: str, registers: int, shared: int, threads: int) -> int:
    """Blocks of a kernel that a multiprocessor holds at once."""
    all_registers, all_shared, all_threads = LIMITS[target.rstrip("a")]
    of_registers = all_registers // (-(-registers // 8) * 8 * threads)
    return min(of_registers, all_shared // (shared + 1024), all_threads // threads)


def triton_facts(facts: list[dict]) -> str:
    rows = []
    for r in sorted(facts, key=lambda r: (r["kernel"], r["dtype"], r["target"])):
        threads = 32 * r["num_warps"]
        rows.append(
            [
                r["kernel"],
                r["dtype"],
                f"sm_{r['target']}",
                ", ".join(r["tensor_cores"]) or "-",
                r["registers"],
                r["stack_bytes"],
                r["shared_bytes"],
                threads,
                blocks(str(r["target"]), r["registers"], r["shared_bytes"], threads),
                f"{r['widest_load_bytes']} / {r['widest_store_bytes']}",
            ]
        )
    head = ["kernel", "dtype", "target", "tensor cores", "registers", "spilled bytes", "shared bytes", "threads"]
    return table([*head, "blocks per multiprocessor", "widest load / store, bytes"], rows)


TRITON = """\
Registers and spilled bytes are those of a thread, shared bytes and threads those of a block. Loads through descriptors
(TMA) are not among the widest loads: matmuls of halves and float8 from sm_90 on read their operands by them."""

BYTES = """\
One call on 2 ranks, the mean over them. Counted, not calculated: every load and store of the kernels as they are, in
Triton's interpreter with masks respected, and for CUDA where g++ reports each access (`tests/kernels/bytes_*.py`).

* locally: tensors and the own slots, read and written. The own flags are left out: how often one looks is chance. What
  the host does around the kernels is, too. Operands of a matmul count each time a tile of 64 x 64 reads them, which on
  a GPU is mostly answered by its caches.
* to peers: stored in other ranks' memory, flags too. No kernel loads from there.
* least: each input read once, each result written once, and what the other ranks can't know otherwise, sent once
  (`tests/kernels/bytes_least.py`). A slot is no part of that: what lies in one has to be read once more."""


def bytes_moved() -> str:
    def cells(row: Moved) -> list[str]:
        local, least = row.read + row.written, row.least.read + row.least.written
        there = f"{row.peers_ratio:.2f}" if row.least.to_peers else "-"
        counts = [f"{row.read:,.0f}", f"{row.written:,.0f}", f"{least:,.0f}", f"{local / least:.2f}"]
        return [row.kernel, row.shape, row.dtype, *counts, f"{row.to_peers:,.0f}", f"{row.least.to_peers:,.0f}", there]

    head = ["kernel", "shape", "dtype", "read locally", "written locally", "least of both", "times the least"]
    head += ["to peers", "least to peers", "times the least"]
    cuda = table(head, [cells(row) for row in bytes_cuda.rows()]) if COMPILER else "g++ was not here."
    triton = table(head, [cells(row) for row in bytes_triton.rows()])
    return "\n\n".join([BYTES, "### CUDA", cuda, BYTES_CUDA, "### Triton", triton, BYTES_TRITON])


BYTES_CUDA = """\
`one_shot` sends pairs, 4 bytes and the number of the call, hence 2.00, and reads its vector twice. What
`all_gather_copied` and `ring` bring is used where it arrives. `zero_gather` runs the kernels of `all_gather`.
`zero_step`: with amsgrad and a cast. `multimem_all_reduce` is not here: a switch adds, and what it moves is no load or
store of a rank."""
BYTES_TRITON = """\
`all_reduce` pushes to itself, too, so that what a CUDA kernel takes from its vector goes through the own slot.
`vocab_cross_entropy` sends 3 numbers of each row, 4 with smoothing, where 2 must travel: the target's logits and the
sums of x could be added up over the rows first."""


def cuda_facts() -> str:
    if test_cuda_static.NVCC is None or test_cuda_static.PTXAS is None:
        return "nvcc was not here when this page was written."
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for target in CUDA_TARGETS:
            test_cuda_static.ptx_of(Path(folder), target, test_cuda_static.ALL_KERNELS)
            path = Path(folder) / f"kernels_{target}.ptx"
            command = [test_cuda_static.PTXAS, "-v", f"-arch=sm_{target}", str(path), "-o", f"{path}.cubin"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            for name, report in re.findall(r"Compiling entry function '(\w+)'.*?\n(.*?Used [^\n]*)", said, re.S):
                registers = int(re.search(r"Used (\d+) registers", report).group(1))
                spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
                rows.append([short(name), f"sm_{target}", registers, spilled, blocks(target, registers, 0, 256)])
    most: dict[tuple[str, str], list] = {}
    for row in rows:  # instances for the types: the one with the most registers
        key = (row[0], row[1])
        most[key] = max(most.get(key, row), row, key=lambda r: r[2])
    head = ["kernel", "target", "registers, at most", "spilled bytes", "blocks of 256 threads per multiprocessor"]
    return table(head, sorted(most.values(), key=lambda row: row[0]))


def short(mangled: str) -> str:
    """The function's name in a mangled one: the longest of its parts."""
    return max(re.findall(r"[a-z][a-z_]{5,}", mangled), key=len).strip("_")


def page(cells: list[Cell]) -> str:
    mutations = (HERE / "emulation" / "mutations.md").read_text().split("\n\n", 1)[1]
    mistakes = [[mistake, scene] for mistake, scene in test_triton_matmul_protocol.caught()]
    memory = [[mistake] for mistake in test_triton_matmul_static.MISTAKES]
    return "\n\n".join(
        [
            "# GPU kernels: what was executed, and what wasn't",
            f"Written by `make kernels-full`. Every kernel on this page: **{NOT_RUN}**.",
            "## The bits of plain torch, by executor",
            by_executor(cells),
            "Integer-valued data in float32, bfloat16 and float16, sizes around the number of ranks and odd ones, "
            "pauses in between (`zero_step`: within 1e-6). `never run`: no GPU was there.",
            "## Every check",
            by_file(cells),
            "## Mistakes made on purpose: CUDA",
            mutations.strip(),
            "## Mistakes made on purpose: Triton",
            table(["mistake", "seen by"], mistakes),
            "In the interpreter every access is ordered; that these are noticed is seen in the generated PTX:",
            table(["mistake"], memory),
            "## Bytes moved, against the least possible",
            bytes_moved(),
            "## What Triton makes of its kernels",
            TRITON,
            "### Matmuls",
            triton_facts(test_triton_matmul_static.facts()),
            "### all_reduce and the loss",
            triton_facts(test_triton_loss_static.facts()),
            "## What nvcc makes of the CUDA kernels",
            cuda_facts(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.docs.write_text(page(read(arguments.results)) + "\n")
    print(arguments.docs)


if __name__ == "__main__":
    main()
