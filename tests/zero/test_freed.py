"""Parameters that are not whole at stage 3: what they still tell, and what they refuse."""

import copy
import io

import pytest
import torch
from torch import nn
from zero.test_zero_parity import Model, batch, loss_of

import pypar
from pypar.testing import run_ranks
from pypar.zero import freed

USES = [
    lambda p: p + 1,
    lambda p: torch.relu(p),
    lambda p: torch.cat([torch.zeros(33, 20), p]),
    lambda p: nn.functional.linear(torch.zeros(2, 20), p),
    lambda p: p.detach(),
    lambda p: p.data,
    lambda p: p.T,
    lambda p: p[0, 0],
    lambda p: p.sum(),
    lambda p: p.tolist(),
    lambda p: p.copy_(torch.zeros(33, 20)),
    lambda p: p.fill_(0),
    lambda p: p.data_ptr(),
    lambda p: p.numpy(),
    lambda p: torch.ops.aten.mul(p, 2),
    lambda p: copy.deepcopy(p),
    lambda p: torch.save(p, io.BytesIO()),
    lambda p: nn.init.zeros_(p),
    lambda p: p.__setitem__(0, 1.0),
    lambda p: Double.apply(p),
]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x) * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def refuses(use, parameter, name):
    with pytest.raises(RuntimeError, match=rf"of '{name}', whose values are not on this rank.*full_params"):
        use(parameter)


def check(rank, world):
    model = pypar.Zero(Model(), stage=3)
    weight = model.module.layers[0].up.weight

    def check_freed():
        assert weight.shape == (33, 20) and weight.numel() == 660 and weight.dtype == torch.float32
        assert weight.requires_grad and weight.is_leaf and weight.device.type == "cpu" and weight.grad is None
        assert isinstance(weight, nn.Parameter) and weight.ndim == 2 and len({weight, weight}) == 1
        assert "layers.0.up.weight" in repr(weight) and "(33, 20)" in repr(model.module.layers[0].up.weight)
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in Model().parameters())
        for use in USES:
            refuses(use, weight, "layers.0.up.weight")
        refuses(lambda p: model.module.embed(torch.tensor([1])), weight, "embed.weight")
        refuses(lambda p: copy.deepcopy(model.module), weight, ".*")
        refuses(lambda p: torch.nn.utils.parameters_to_vector([p]), weight, "layers.0.up.weight")

    check_freed()  # before the first step
    for number in range(2):
        loss = loss_of(model, batch(world, number)[rank * 4 : rank * 4 + 4])
        refuses(USES[0], weight, "layers.0.up.weight")  # between forward and backward
        loss.backward()
        check_freed()
        model.optimizer.step()
        check_freed()
        model.optimizer.zero_grad()
    with model.full_params():
        assert type(weight) is nn.Parameter and (weight + 1).shape == (33, 20)
        copy.deepcopy(model.module)
    check_freed()


def test_use_of_a_freed_parameter():
    run_ranks(check, 2, backend="gloo")


def hooked(rank, world):
    module, seen = Model(), []
    for layer in module.layers:  # units of their own
        layer.register_forward_pre_hook(lambda layer, _args: seen.append(layer.up.weight.detach().sum().item()))
    wanted = [layer.up.weight.sum().item() for layer in module.layers]
    model = pypar.Zero(module, stage=3)
    loss_of(model, batch(world, 0)[rank * 4 : rank * 4 + 4]).backward()
    assert seen == pytest.approx(wanted, rel=1e-6)


def test_a_hook_from_before_reads_the_values_of_its_unit():
    run_ranks(hooked, 2, backend="gloo")


class Marked(nn.Parameter):
    pass


def test_a_parameter_is_itself_again():
    for kind in (nn.Parameter, Marked):
        parameter = kind(torch.ones(3))
        parameter.grad = torch.full((3,), 2.0)
        parameter.mark = "kept"
        fired, node = [], torch.autograd.graph.get_gradient_edge(parameter).node
        parameter.register_hook(lambda g, fired=fired: fired.append(g) and None)
        freed.free(parameter, "a")
        freed.free(parameter, "a")
        assert torch.equal(parameter.grad, torch.full((3,), 2.0)) and parameter.mark == "kept"
        parameter.grad = None
        assert torch.autograd.graph.get_gradient_edge(parameter).node is node
        parameter.requires_grad_(False).requires_grad_(True)
        values = torch.arange(3.0)
        freed.restore(parameter, values)
        assert type(parameter) is kind and parameter.mark == "kept" and not hasattr(parameter, "_zero_name")
        assert parameter.data_ptr() == values.data_ptr()
        (parameter * 2).sum().backward()
        assert torch.equal(parameter.grad, torch.full((3,), 2.0)) and len(fired) == 1
        freed.restore(parameter, values)
