"""Plans x models x settings against one process: a set of cells that covers every pair of values; `make verify-matrix`
runs all."""

from __future__ import annotations

import pytest
from hybrid.matrix import Cell, batches_of, check, pairs

GROUPS = batches_of(pairs(), 8)


@pytest.mark.parametrize("cells", GROUPS, ids=[f"{g[0].plan.world_size}-ranks-{n}" for n, g in enumerate(GROUPS)])
def test_loss_gradients_and_weights_are_those_of_one_process(cells: list[Cell]):
    wrong = {str(cell): what for cell, what in zip(cells, check(cells), strict=True) if what}
    assert not wrong, "\n".join(f"{cell}: {what}" for cell, what in wrong.items())


def test_the_cells_cover_what_the_matrix_has():
    cells = pairs()
    assert {cell.layout for cell in cells} >= {(2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)}
    assert any(cell.zero == 3 and cell.layout[0] > 1 and cell.tied for cell in cells)
    assert all(any(c.zero == z and c.schedule == s for c in cells) for z in (1, 2, 3) for s in ("gpipe", "zbv"))
