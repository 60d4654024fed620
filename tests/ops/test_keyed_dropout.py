"""The mask is a function of (seed, site, index in the full tensor): known numbers, parts, gradients, errors."""

import pytest
import torch

from pypar.ops import keyed_dropout
from pypar.reference import keyed_dropout as reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEED, SITE = -0x123456789ABCDEF, 0x7A5C3E1F00112233


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def parts_of(x, dim, cuts):
    """(part, ranges) for each list of ranges."""
    for ranges in cuts:
        held = [i for a, b in zip(ranges[::2], ranges[1::2], strict=True) for i in range(a, b)]
        yield x.index_select(dim, torch.tensor(held, dtype=torch.int64)), ranges


def test_philox_gives_the_published_numbers():
    """The known answers of Random123, the authors' own code, for philox4x32 10."""
    for block, site, seed, words in (
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, -1, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        block = torch.tensor([block - (1 << 64) if block >> 63 == 1 else block], dtype=torch.int64)
        assert reference.philox(block, site, seed).tolist() == [list(words)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_of_the_reference(dtype):
    seed = torch.tensor(SEED)
    for shape in ((0,), (1,), (3,), (5, 7), (2, 3, 1031), (70000,)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for p in (0.0, 0.1, 0.5, 1.0):
            key = (seed, SITE, p, 0, shape[0], [0, shape[0]])
            y = torch.ops.pypar.keyed_dropout(x, *key)
            assert same_bits(y, reference.keyed_dropout(x, *key)), (shape, p)
            if p in (0, 1):
                assert torch.equal(y, x * (1 - p))
    wide = torch.randn(6, 10, 4).to(dtype).transpose(0, 2)[:, ::3]
    key = (seed, SITE, 0.3, 1, 9, [1, 3, 7, 9])
    assert same_bits(torch.ops.pypar.keyed_dropout(wide, *key), reference.keyed_dropout(wide, *key))


@pytest.mark.parametrize("threads", [1, 2])
def test_parts_drop_what_the_full_tensor_drops(threads):
    """Heads, features in several ranges, rows; even, uneven, empty."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for shape, dim, cuts in (
        ((2, 6, 5, 5), 1, [[0, 2], [2, 4], [4, 6]]),
        ((2, 6, 5, 5), -3, [[0, 5], [5, 6], [6, 6]]),
        ((3, 7, 10), 2, [[0, 3, 5, 7], [3, 5, 7, 10]]),
        ((3, 7, 10), -1, [[7, 10, 0, 1], [1, 7], []]),
        ((1, 13, 6), 1, [[0, 7], [7, 13]]),
        ((8, 64, 400), 2, [[0, 200], [200, 400]]),
    ):
        x = torch.randn(shape)
        y = keyed_dropout(x, SEED, SITE, 0.3)
        assert 0.2 < (y == 0).double().mean() < 0.4 or x.numel() < 1000
        full = shape[dim]
        expected = parts_of(y, dim, cuts)
        for (part, ranges), (wanted, _) in zip(parts_of(x, dim, cuts), expected, strict=True):
            assert torch.equal(keyed_dropout(part, SEED, SITE, 0.3, dim, full, ranges), wanted), (shape, ranges)
    torch.set_num_threads(before)


def test_masks_look_random():
    """Kept share of each seed and site, and of pairs: within 5 standard deviations of independent draws."""
    n, p = 1 << 20, 0.3
    ones = torch.ones(n)
    masks = [keyed_dropout(ones, seed, site, p) != 0 for seed in (1, 2) for site in (1, 2)]
    masks.append(masks[0].roll(1))
    for i, mask in enumerate(masks):
        assert abs(mask.sum() - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
        for other in masks[i + 1 :]:
            both, q = (mask & other).sum(), (1 - p) ** 2
            assert abs(both - n * q) < 5 * (n * q * (1 - q)) ** 0.5


def test_gradients():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def f(x):
        return keyed_dropout(x, SEED, SITE, 0.4, 1, 13, [2, 5, 9, 12])

    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)
    y = f(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad != 0, y != 0)
    scalar = torch.tensor(2.0, requires_grad=True)
    assert keyed_dropout(scalar, SEED, SITE, 0.0).shape == ()
    x.grad[0, 0] = torch.inf
    assert torch.isfinite(keyed_dropout(torch.full((100,), torch.inf), 1, 2, 1.0)).all(), "what is dropped is 0"


def test_opcheck_and_compile():
    x = torch.randn(4, 6)
    key = (torch.tensor(SEED), SITE, 0.4, 1, 13, [2, 5, 9, 12])
    torch.library.opcheck(torch.ops.pypar.keyed_dropout.default, (x, *key))

    def f(x, seed):
        return keyed_dropout(x * 2, seed, SITE, 0.4, 1, 13, [2, 5, 9, 12])

    def run(f, seed):
        leaf = x.clone().requires_grad_()
        y = f(leaf, seed)
        y.sum().backward()
        return y, leaf.grad

    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(f, fullgraph=True, backend=backend)
        for seed in (torch.tensor(1), torch.tensor(2)):
            for found, wanted in zip(run(compiled, seed), run(f, seed), strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("op", [torch.ops.pypar.keyed_dropout, reference.keyed_dropout])
def test_errors(op):
    x, seed = torch.randn(4, 6), torch.tensor(1)
    for match, args in (
        (r"p is 1\.5, expected a probability", (x, seed, 1, 1.5, 0, 4, [0, 4])),
        (r"ranges \[0, 5\]", (x, seed, 1, 0.5, 0, 4, [0, 5])),
        (r"ranges \[0, 3\]", (x, seed, 1, 0.5, 0, 4, [0, 3])),
        (r"ranges \[0, 3, 3\]", (x, seed, 1, 0.5, 0, 4, [0, 3, 3])),
        (r"dim", (x, seed, 1, 0.5, 2, 4, [0, 4])),
    ):
        with pytest.raises(ValueError, match=match):
            op(*args)
