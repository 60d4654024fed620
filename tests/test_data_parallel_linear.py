"""The gradients of nn.Linear that are computed into the bucket: the same as elsewhere, or left to autograd."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pypar
from pypar.gradients import linear

BACKEND = "pypar"


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def fused(monkeypatch):
    """What each weight-gradient computation did: True where it wrote into the bucket."""
    calls, weight_grad = [], linear._weight_grad

    def spy(*args):
        result = weight_grad(*args)
        calls.append(result is None)
        return result

    monkeypatch.setattr(linear, "_weight_grad", spy)
    return calls


def build(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 2, bias=bias))


def x(*shape):
    return torch.randn(*(shape or (3, 4)), generator=torch.Generator().manual_seed(1))


def grads(module):
    return [p.grad for p in module.parameters()]


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4), (2, 1, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_bits_as_autograd(shape, bias, fused):
    plain, wrapped = build(bias), pypar.DataParallel(build(bias))
    inputs = [x(*shape).requires_grad_() for _ in range(2)]
    for module, value in zip((plain, wrapped), inputs, strict=True):
        module(value).square().sum().backward()
    equal(grads(wrapped), grads(plain))
    equal(inputs[0].grad, inputs[1].grad)
    assert fused == [True, True]


def test_accumulation(fused):
    plain, wrapped = build(), pypar.DataParallel(build())
    for module in (plain, wrapped):
        for _ in range(3):
            module(x()).square().sum().backward()
    torch.testing.assert_close(grads(wrapped), grads(plain))
    assert fused == [True] * 6


def test_switched_off(fused):
    pypar.DataParallel(build(), fuse_linear_grads=False)(x()).sum().backward()
    assert not fused


def test_only_exact_linear_layers(fused):
    class Mine(nn.Linear):
        pass

    plain = nn.Linear(4, 4)
    plain.forward = lambda v: F.linear(v, plain.weight) * 2
    for layer in (Mine(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), plain):
        pypar.DataParallel(layer)(x()).sum().backward()
    assert not fused


def test_frozen_weight_and_shared_weight(fused):
    def make():
        module = build()
        module.append(nn.Linear(6, 2))
        module[3].weight = module[2].weight
        module[0].weight.requires_grad_(False)
        return module

    def run(module):
        m = getattr(module, "module", module)
        hidden = m[1](m[0](x()))
        (m[2](hidden).square().sum() + m[3](hidden).pow(3).sum()).backward()

    plain, wrapped = make(), pypar.DataParallel(make())
    run(plain), run(wrapped)
    torch.testing.assert_close(grads(wrapped), grads(plain))
    assert fused == [True, True]


def test_frozen_after_wrapping(fused):
    wrapped = pypar.DataParallel(build(), find_unused_parameters=True)
    wrapped.module[0].weight.requires_grad_(False)
    wrapped(x()).sum().backward()
    assert wrapped.module[0].weight.grad is None and fused == [True]


def test_hooks_see_the_gradient(fused):
    plain, wrapped = build(), pypar.DataParallel(build())
    seen: dict = {}
    for module in (plain, wrapped):
        weight = getattr(module, "module", module)[0].weight
        weight.register_hook(lambda g: g * 3)
        weight.register_post_accumulate_grad_hook(lambda p, k=module: seen.update({k: p.grad.clone()}))
        module(x()).square().sum().backward()
        module(x()).square().sum().backward()
    equal(seen[wrapped], seen[plain])
    torch.testing.assert_close(grads(wrapped), grads(plain))
    assert fused == [True, False, True, False]


def test_autocast():
    plain, wrapped = build(), pypar.DataParallel(build())
    for module in (plain, wrapped):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x()).float().square().sum()
        loss.backward()
    equal(grads(wrapped), grads(plain))


def test_double_backward():
    results = []
    for module in (build(), pypar.DataParallel(build())):
        value = x().requires_grad_()
        (slope,) = torch.autograd.grad(module(value).square().sum(), value, create_graph=True)
        slope.square().sum().backward()
        results.append((grads(module), value.grad))
    torch.testing.assert_close(results[1], results[0])


def test_autograd_grad_and_inputs_leave_the_rest_alone(fused):
    wrapped = pypar.DataParallel(build(), find_unused_parameters=True)
    wrapped(x()).square().sum().backward()
    before = [g.clone() for g in grads(wrapped)]
    value = x().requires_grad_()
    weight = wrapped.module[0].weight
    (grad,) = torch.autograd.grad(wrapped(value).square().sum(), weight)
    torch.testing.assert_close(grad, before[0])
    wrapped(value).square().sum().backward(inputs=[value])
    equal(grads(wrapped), before)
    grad.zero_()
    equal(grads(wrapped), before)


def test_torch_func():
    plain, wrapped = build(), pypar.DataParallel(build())
    params = {n: p.detach() for n, p in plain.named_parameters()}

    def loss(p, value, module):
        return torch.func.functional_call(module, p, (value,)).square().sum()

    expected = torch.func.grad(loss)(params, x(), plain)
    actual = torch.func.grad(loss)(params, x(), wrapped.module)
    torch.testing.assert_close(actual, expected)
    rows = torch.func.vmap(lambda v: wrapped.module(v))(x())
    torch.testing.assert_close(rows, plain(x()))
    _, tangent = torch.func.jvp(wrapped.module, (x(),), (torch.ones(3, 4),))
    torch.testing.assert_close(tangent, torch.func.jvp(plain, (x(),), (torch.ones(3, 4),))[1])


def test_copies_compute_on_their_own():
    wrapped = pypar.DataParallel(build())
    wrapped(x()).sum().backward()
    before = [g.clone() for g in grads(wrapped)]
    for other in (copy.deepcopy(wrapped.module), pickle.loads(pickle.dumps(wrapped.module))):
        other.zero_grad()
        other(x()).square().sum().backward()
        equal(grads(wrapped), before)
        plain = build()
        plain(x()).square().sum().backward()
        equal(grads(other), grads(plain))


def test_the_module_outlives_its_wrapper(fused):
    wrapped = pypar.DataParallel(build())
    module = wrapped.module
    wrapped(x()).sum().backward()
    del wrapped
    gc.collect()
    fused.clear()
    module.zero_grad()
    module(x()).square().sum().backward()
    plain = build()
    plain(x()).square().sum().backward()
    equal(grads(module), grads(plain))
    assert not fused


def test_wrapped_again(fused):
    pypar.DataParallel(module := build())
    wrapped = pypar.DataParallel(module)
    wrapped(x()).sum().backward()
    assert fused == [True, True]
    assert all(slot.is_home(slot.param.grad) for slot in wrapped._reducer.slots)


@pytest.mark.slow
def test_compiled():
    expected = build()
    expected(x()).square().sum().backward()
    inside = build()
    inside.compile(backend="aot_eager")
    for module in (
        pypar.DataParallel(torch.compile(build(), backend="aot_eager")),
        pypar.DataParallel(inside),
        torch.compile(pypar.DataParallel(build()), backend="aot_eager"),
    ):
        module(x()).square().sum().backward()
        torch.testing.assert_close(grads(module), grads(expected))
        wrapper = getattr(module, "_orig_mod", module)
        assert all(slot.is_home(slot.param.grad) for slot in wrapper._reducer.slots)
