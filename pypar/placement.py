"""Where the parts of a model go: its blocks, their costs, and where it is cut. No ranks, no groups, no devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from torch import nn

from pypar.pieces import pieces_of


@dataclass
class Part:
    """A module that one stage runs whole: a block, a piece of one that is cut inside, or what lies outside of the
    blocks. cost: of its matmuls. block: name of the block whose piece it is."""

    name: str
    module: nn.Module
    is_block: bool
    cost: int
    stage: int = -1
    block: str = ""

    @property
    def is_inner(self) -> bool:
        """A block, or a piece of one."""
        return self.is_block or bool(self.block)


@dataclass
class Cut:
    """parts: all modules with parameters, each in one stage. shared: names of parameters that stand directly on a
    module around the blocks, which every stage keeps. boundary[k]: name of stage k's last block or piece, whose output
    goes on. beside[k]: where stage k ends inside a block, what else goes on: the output of the block before, and of the
    pieces behind it."""

    num_stages: int
    parts: list[Part]
    boundary: list[str]
    shared: list[str] = field(default_factory=list)
    beside: dict[int, list[str]] = field(default_factory=dict)

    def of_stage(self, stage: int) -> list[Part]:
        return [part for part in self.parts if part.stage == stage]

    def table(self) -> str:
        lines = []
        for stage in range(self.num_stages):
            blocks = [p.name for p in self.of_stage(stage) if p.is_inner]
            others = [p.name for p in self.of_stage(stage) if not p.is_inner]
            span = blocks[0] if len(blocks) == 1 else f"{blocks[0]} ... {blocks[-1]}"
            cost = sum(p.cost for p in self.of_stage(stage))
            lines.append(f"stage {stage}: {len(blocks)} blocks ({span}), {', '.join(others) or '-'}; cost {cost:,}")
        return "\n".join(lines)


def cut(root: nn.Module, num_stages: int, split: str | Sequence[str] | Sequence[int] = "auto") -> Cut:
    """Cuts `root` between its blocks: the entries of its outermost nn.ModuleLists and nn.Sequentials.

    split  "auto": the stages' costs as equal as they go; "balanced": the same, and a stage may end inside a block,
           behind one of its children with matrices, where its code calls them one after the other and adds their
           outputs up (pypar.pieces); numbers of blocks, one per stage; or names of the blocks, or of such children,
           with which stages 1, 2, ... begin

    What was registered before the blocks (an embedding) goes to stage 0, what came behind (a norm, a head) to the last.
    Raises ValueError: no blocks, fewer than stages, a split that doesn't fit.
    """
    lists = list(_block_lists(root))
    blocks = [
        Part(f"{n}.{c}" if n else c, m, True, cost_of(m)) for n, list_ in lists for c, m in list_.named_children()
    ]
    if not blocks:
        raise ValueError(
            f"{type(root).__name__} has no list of blocks to cut it at: put its blocks into an nn.ModuleList or "
            "nn.Sequential (an attribute such as 'layers', 'blocks', 'h')"
        )
    if num_stages > len(blocks):
        raise ValueError(
            f"{num_stages} stages for {len(blocks)} blocks ({blocks[0].name} ... {blocks[-1].name}): every stage needs "
            f"one; use up to {len(blocks)} stages"
        )
    before, behind, shared = _others(root, blocks)
    first, last = sum(p.cost for p in before), sum(p.cost for p in behind)
    runs = _runs(blocks, split)
    starts = _starts(runs, num_stages, split, first, last)
    if split == "balanced":  # cut inside only where that is worth it
        whole = [[block] for block in blocks]
        between = _starts(whole, num_stages, "auto", first, last)
        if _dearest(whole, between, first, last) <= _dearest(runs, starts, first, last):
            runs, starts = whole, between
    for index, run in enumerate(runs):
        for part in run:
            part.stage = sum(index >= start for start in starts) - 1
    for part in before:
        part.stage = 0
    for part in behind:
        part.stage = num_stages - 1
    inner, beside = _joined(blocks, [part for run in runs for part in run])
    final = {run[-1].block or run[-1].name: run[-1].name for run in runs}  # of every block
    ends = [runs[start - 1][-1] for start in starts[1:]]
    boundary = [p.block if p.block and final[p.block] == p.name else p.name for p in ends]
    kept = {stage: names for stage, names in beside.items() if stage < num_stages - 1}
    return Cut(num_stages, [*before, *inner, *behind], boundary, shared, kept)


def _runs(blocks: list[Part], split: str | Sequence[str] | Sequence[int]) -> list[list[Part]]:
    """Parts between which a stage may begin: blocks, and of those that are to be cut inside a piece with matrices and
    the small ones before it."""
    wanted = set() if isinstance(split, str) else {each for each in split if isinstance(each, str)}
    runs: list[list[Part]] = []
    for index, block in enumerate(blocks):
        pieces = pieces_of(block.module) if index > 0 and (split == "balanced" or _is_inside(wanted, block)) else []
        parts = [Part(f"{block.name}.{n}", m, False, cost_of(m), block=block.name) for n, m in pieces]
        if sum(part.cost > 0 for part in parts) < 2:
            runs.append([block])
            continue
        run: list[Part] = []
        for number, part in enumerate(parts):
            if run and run[-1].cost > 0 and any(p.cost > 0 for p in parts[number:]):
                runs.append(run)
                run = []
            run.append(part)
        runs.append(run)
    return runs


def _dearest(runs: list[list[Part]], starts: list[int], first: int, last: int) -> int:
    costs = [sum(part.cost for part in run) for run in runs]
    costs[0], costs[-1] = costs[0] + first, costs[-1] + last
    return max(sum(costs[a:b]) for a, b in pairwise([*starts, len(costs)]))


def _is_inside(names: set[str], block: Part) -> bool:
    return any(name.startswith(f"{block.name}.") for name in names)


def _joined(blocks: list[Part], parts: list[Part]) -> tuple[list[Part], dict[int, list[str]]]:
    """(parts, with the pieces of a block that one stage runs as that block again; what goes on beside the boundary)"""
    by_block: dict[str, list[Part]] = {}
    for part in parts:
        by_block.setdefault(part.block or part.name, []).append(part)
    inner: list[Part] = []
    beside: dict[int, list[str]] = {}
    for index, block in enumerate(blocks):
        pieces = by_block[block.name]
        stages = sorted({part.stage for part in pieces})
        if len(stages) == 1:
            block.stage = stages[0]
            inner.append(block)
            continue
        inner += pieces
        for stage in stages[:-1]:
            heavy = [part.name for part in pieces if part.cost > 0 and part.stage <= stage]
            beside[stage] = [blocks[index - 1].name, *heavy]
    return inner, beside


def cost_of(module: nn.Module) -> int:
    """Multiplications per token, about: the elements of its matrices, without those that are only looked up."""
    looked_up = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return sum(p.numel() for p in module.parameters() if p.dim() > 1 and id(p) not in looked_up)


def _block_lists(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost lists whose entries hold parameters and are more than a bag of small things: of all such lists
    those with at least a tenth of the parameters of the largest."""
    if isinstance(root, nn.Sequential):
        yield "", root
        return
    found: list[tuple[str, nn.Module]] = []
    for name, module in root.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and name and not inside and len(module):
            found.append((name, module))
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in found}
    yield from ((name, m) for name, m in found if sizes[name] and 10 * sizes[name] >= max(sizes.values()))


def _others(root: nn.Module, blocks: list[Part]) -> tuple[list[Part], list[Part], list[str]]:
    """(parts before the blocks, behind them, names of parameters on modules that contain blocks)"""
    names = {block.name for block in blocks}
    outputs = _module_of(root, "get_output_embeddings")
    inputs = _module_of(root, "get_input_embeddings")
    before: list[Part] = []
    behind: list[Part] = []
    shared: list[str] = []
    seen_blocks = False

    def visit(module: nn.Module, name: str) -> None:
        nonlocal seen_blocks
        if name in names:
            seen_blocks = True
            return
        if any(block.startswith(f"{name}.") or not name for block in names):
            shared.extend(f"{name}.{n}" if name else n for n, _ in module.named_parameters(recurse=False))
            for child_name, child in module.named_children():
                visit(child, f"{name}.{child_name}" if name else child_name)
        elif any(True for _ in module.parameters()):
            is_behind = (seen_blocks or module is outputs) and module is not inputs
            (behind if is_behind else before).append(Part(name, module, False, cost_of(module)))

    visit(root, "")
    return before, behind, shared


def _module_of(root: nn.Module, method: str) -> nn.Module | None:
    try:
        found = getattr(root, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _starts(
    runs: list[list[Part]], num_stages: int, split: str | Sequence[str] | Sequence[int], first: int, last: int
) -> list[int]:
    """Index of the run with which each stage begins."""
    blocks = [run[0] for run in runs]
    if isinstance(split, str):
        if split not in ("auto", "balanced"):
            raise ValueError(f"split={split!r}: give 'auto', 'balanced', numbers of blocks, or names of blocks")
        costs = [sum(part.cost for part in run) for run in runs]
        costs[0], costs[-1] = costs[0] + first, costs[-1] + last
        return contiguous(costs, num_stages)[0]
    given = list(split)
    names: dict[str, int] = {}
    for number, run in enumerate(runs):
        for part in run:
            names.setdefault(part.block or part.name, number)
            names.setdefault(part.name, number)
    if all(isinstance(each, int) for each in given):
        counts = [int(each) for each in split]
        if len(counts) != num_stages or sum(counts) != len(blocks) or min(counts) < 1:
            raise ValueError(
                f"split={given}: needs {num_stages} numbers of 1 or more, one per stage, that add up to the "
                f"{len(blocks)} blocks"
            )
        return [sum(counts[:stage]) for stage in range(num_stages)]
    start, end = blocks[0].name, blocks[-1].block or blocks[-1].name
    unknown = [each for each in given if each not in names]
    if unknown:
        raise ValueError(f"split: {unknown[0]!r} is no block, nor a child of one to cut at; they are {start} ... {end}")
    starts = [0, *(names[str(each)] for each in given)]
    if len(starts) != num_stages or any(a >= b for a, b in pairwise(starts)):
        raise ValueError(
            f"split={given}: needs {num_stages - 1} names in order, of the blocks with which stages 1 to "
            f"{num_stages - 1} begin; stage 0 begins with {start}"
        )
    return starts


def contiguous(
    costs: Sequence[float],
    num_places: int,
    *,
    sizes: Sequence[int] | None = None,
    limits: Sequence[int | None] | None = None,
    is_last_resort: Sequence[bool] | None = None,
    may_be_empty: bool = False,
) -> tuple[list[int], int]:
    """Cuts a sequence of parts into one run per place: (index of each run's first part, bytes over the limits).

    costs           of the parts; the dearest run is made as cheap as it goes, of equal cuts the most even one
    sizes, limits   bytes of the parts, and what each place holds (None: any number); kept above all else, so that the
                    second result is 0 wherever a cut fits
    is_last_resort  places that get no more cost than the limits of the others force on them
    may_be_empty    places may get no part
    """
    count = len(costs)
    limits = limits or [None] * num_places
    is_last_resort = is_last_resort or [False] * num_places
    cost_to, size_to = list(accumulate(costs, initial=0)), list(accumulate(sizes or [0] * count, initial=0))
    least = 0 if may_be_empty else 1
    # best[end] of the places so far: (bytes too many, cost on last resorts, dearest, sum of squares, starts)
    best: dict[int, tuple[int, float, float, float, list[int]]] = {0: (0, 0, 0, 0, [])}
    for place in range(num_places):
        limit = limits[place]
        now: dict[int, tuple[int, float, float, float, list[int]]] = {}
        for end in range(least * (place + 1), count - least * (num_places - 1 - place) + 1):
            for begin, (over, resort, dearest, squares, starts) in best.items():
                if begin + least > end:
                    continue
                cost = cost_to[end] - cost_to[begin]
                more = 0 if limit is None else max(0, size_to[end] - size_to[begin] - limit)
                option = (
                    over + more,
                    resort + (cost if is_last_resort[place] else 0),
                    max(dearest, cost),
                    squares + cost * cost,
                    [*starts, begin],
                )
                if end not in now or option < now[end]:
                    now[end] = option
        best = now
    return best[count][4], best[count][0]
