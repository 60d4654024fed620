"""all_to_all and broadcast of CUDA tensors, here of CPU tensors over gloo: what the reference gives, without a look."""

from __future__ import annotations

import pytest
import torch
from ops.collective_cases import FLOATS, INTEGERS, name, same_bits, tensor_of
from torch.utils._python_dispatch import TorchDispatchMode

from pypar.testing import run_ranks

TYPES = [*FLOATS, *INTEGERS, torch.bool, torch.complex64]


class NoLook(TorchDispatchMode):
    """What reads a value on the host, which waits for a GPU and ends the capture of a graph, raises."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
        return func(*args, **(kwargs or {}))


def check(rank, world):
    from pypar.ops.gpu import moves
    from pypar.reference.all_to_all import all_to_all
    from pypar.reference.broadcast import broadcast

    table = [[(3 * s + 5 * d) % 4 for d in range(world)] for s in range(world)]  # with zeros
    received = [table[s][rank] for s in range(world)]
    for dtype in TYPES:
        for shape in ((), (3,), (2, 0)):
            x = tensor_of(rank, 1, (sum(table[rank]), *shape), dtype)
            with NoLook():
                got = moves.all_to_all(x, received, table[rank], name())
            parts = [tensor_of(s, 1, (sum(table[s]), *shape), dtype).split(table[s])[rank] for s in range(world)]
            assert same_bits(got, torch.cat(parts)), (dtype, shape)
            even = tensor_of(rank, 2, (2 * world, *shape), dtype)
            out = torch.empty_like(even)
            moves.all_to_all_out(out, even, None, None, name())
            assert same_bits(out, moves.all_to_all(even, None, None, name()))
            full = [tensor_of(s, 2, (2 * world, *shape), dtype) for s in range(world)]
            assert same_bits(out, torch.cat([f.split(2)[rank] for f in full])), (dtype, shape)
        for shape in ((), (5,), (0, 2)):
            for root in range(world):
                x = tensor_of(rank, root, shape, dtype)
                with NoLook():
                    got = moves.broadcast(x, root, name())
                assert same_bits(got, tensor_of(root, root, shape, dtype)), (dtype, shape)
                moves.broadcast_(x, root, name())
                assert same_bits(x, got)
    x = tensor_of(rank, 3, (4, 2 * world), torch.float32).t()  # columns in line
    assert same_bits(moves.all_to_all(x, None, None, name()), all_to_all(x, None, None, name()))
    want = broadcast(x, world - 1, name())  # x as in broadcast_, which copies where x is not dense
    moves.broadcast_(x, world - 1, name())
    assert same_bits(x, want)
    with pytest.raises(AssertionError, match="a value was read on the host"), NoLook():
        broadcast(x, 0, name())
    check_errors(moves, world)


def check_errors(moves, world):
    x = torch.ones(world + 1, 2)
    for root in (-1, world):
        with pytest.raises(ValueError, match=f"root {root} is not a rank"):
            moves.broadcast(x, root, name())
    for wrong, match in (
        ((x, None, None), f"{world + 1} rows don't divide by {world} ranks; give in_splits"),
        ((x, None, [2] + [1] * (world - 1)), f"{world + 1} rows don't divide by {world} ranks; give out_splits"),
        ((x, [1] * world, [1] * world), "don't add up to the"),
        ((x, [1] * (world + 1), [2] + [1] * (world - 1)), "out_splits is"),
        ((torch.tensor(1.0), None, None), "no dim 0"),
    ):
        with pytest.raises(ValueError, match=match):
            moves.all_to_all(*wrong, name())


@pytest.mark.parametrize("world", [2, 3])
def test_moves_as_the_reference_does(world):
    run_ranks(check, world, backend="gloo")
