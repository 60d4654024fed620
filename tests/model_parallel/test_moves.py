"""Values of any structure on their way between devices, and what the code between modules does with them."""

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
from model_parallel.cpu_devices import cpu_devices, host
from torch import nn

import pypar
from pypar.model_parallel.moves import map_tensors, tensors_in

Pair = namedtuple("Pair", ["a", "b"])


@dataclasses.dataclass(frozen=True)
class Payload:
    hidden: torch.Tensor
    extra: dict
    note: object = None


def model_output():
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.ones(2), torch.ones(3)))


def test_map_tensors_keeps_the_structure():
    marker = object()
    value = {
        "list": [torch.ones(2), 3, "text"],
        "pair": Pair(torch.ones(1), None),
        "ordered": OrderedDict(x=torch.zeros(2)),
        "data": Payload(torch.ones(2), {"deep": (torch.ones(3),)}, marker),
        "max": torch.ones(2, 3).max(0),
        "output": model_output(),
    }
    found = map_tensors(lambda x: x + 1, value)
    assert [torch.equal(a, b + 1) for a, b in zip(tensors_in(found), tensors_in(value), strict=True)] == [True] * 10
    assert isinstance(found["pair"], Pair) and isinstance(found["ordered"], OrderedDict)
    assert found["data"].note is marker and isinstance(found["data"], Payload)
    assert type(found["output"]) is type(value["output"]) and found["output"].last_hidden_state[0] == 2
    assert found["max"].indices[0] == 1 and value["list"][0][0] == 1
    assert map_tensors(lambda x: x, value) is value


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, payload, *, scale, note):
        assert note == ["untouched", 3]
        first, second = payload.extra["both"]
        return {"sum": self.linear(payload.hidden) * scale + first, "all": Pair([second, first], note)}


class Mixed(nn.Module):
    """Every kind of mixing between two parts on two devices."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), Head()
        self.bias = nn.Parameter(torch.ones(4))
        self.register_buffer("steps", torch.zeros(4), persistent=False)

    def forward(self, x, scale, note):
        y = torch.tanh(self.first(x))
        out = self.head(Payload(y, {"both": (x, y)}), scale=scale, note=note)
        z = out["sum"]
        z = z + x + self.bias  # forward, from three devices
        z = torch.cat([z, y, self.bias.expand_as(z)], dim=-1)
        z = torch.where(torch.cat([x, x, y], -1) > 0, z, torch.zeros_like(z))
        w = x.clone()
        w += y  # in place: stays where w is
        w[:, 0] = z[:, 0]
        w.mul_(out["all"].a[0])
        self.steps.add_(z.detach()[0, :4])
        assert torch.equal(out["all"].a[1], x)
        return {"z": z, "w": w, "picked": y[torch.arange(2, device=z.device)], "note": note}


MAP = {"": "cpu:1", "first": "cpu:0", "head": "cpu:2"}


def run(model, x, scale):
    out = model(x, scale, note=["untouched", 3])
    loss = out["z"].square().sum() + out["w"].sum() + out["picked"].sum()
    loss.backward()
    return out


def test_mixing_between_modules():
    torch.manual_seed(0)
    plain = Mixed()
    x, scale = torch.randn(3, 4, requires_grad=True), torch.tensor(2.0)
    want = run(plain, x, scale)
    torch.manual_seed(0)
    with cpu_devices(3):
        model = pypar.ModelParallel(Mixed(), MAP)
        mine = x.detach().clone().requires_grad_()
        out = run(model, mine, scale)
        assert out["note"] == ["untouched", 3] and {v.device.index for v in tensors_in(out)} == {None}
        for name in ("z", "w", "picked"):
            torch.testing.assert_close(host(out[name]), want[name].detach())
        torch.testing.assert_close(mine.grad, x.grad)
        torch.testing.assert_close(host(model.module.steps), plain.steps)
        for (name, p), expected in zip(model.module.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(host(p.grad), expected.grad, msg=name)
            assert p.device == p.grad.device == torch.device(MAP.get(name.split(".")[0], "cpu:1"))


@pytest.mark.parametrize(("output_device", "index"), [("inputs", None), ("last", 2), ("cpu:1", 1)])
def test_output_device(output_device, index):
    with cpu_devices(3):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model = pypar.ModelParallel(model, {"0": "cpu:0", "1": "cpu:2"}, output_device=output_device)
        assert model(torch.ones(2, 4)).device.index == index


def test_a_module_that_changes_its_input_in_place():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))

        def forward(self, x):
            y = self.a(x)
            return self.b(y) + y  # y after the ReLU

    torch.manual_seed(0)
    plain, x = Root(), torch.randn(5, 4)
    want = plain(x)
    want.sum().backward()
    torch.manual_seed(0)
    with cpu_devices(2):
        model = pypar.ModelParallel(Root(), {"a": "cpu:0", "b": "cpu:1"})
        out = model(x)
        out.sum().backward()
        torch.testing.assert_close(host(out), want.detach())
        torch.testing.assert_close(host(model.module.a.weight.grad), plain.a.weight.grad)


def test_moves_are_made_again_where_a_value_changed_or_autograd_came_on():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.a(x)
            with torch.no_grad():
                first = self.b(y)
            second = self.b(y)  # has a gradient
            z = y * 1
            third = self.b(z)
            z = z.detach().clone()
            with torch.no_grad():
                fourth = self.b(z)
            z += 1
            return first + second + third + fourth + self.b(z)

    torch.manual_seed(0)
    plain, x = Root(), torch.randn(2, 3)
    want = plain(x)
    want.sum().backward()
    torch.manual_seed(0)
    with cpu_devices(2):
        model = pypar.ModelParallel(Root(), {"a": "cpu:0", "b": "cpu:1"})
        out = model(x)
        out.sum().backward()
        torch.testing.assert_close(host(out), want.detach())
        for (name, p), expected in zip(model.module.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(host(p.grad), expected.grad, msg=name)


def test_shared_modules_and_tied_parameters_stay_shared():
    shared = nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    other.weight = shared.weight
    with cpu_devices(2):
        model = pypar.ModelParallel(
            nn.Sequential(shared, nn.Linear(4, 4), shared, other), dict.fromkeys(["cpu:0", "cpu:1"])
        )
        inner = model.module
        assert inner[0] is inner[2] and inner[3].weight is inner[0].weight
        model(torch.ones(2, 4)).sum().backward()
        assert {p.grad.device for p in model.parameters()} == {torch.device("cpu", 0), torch.device("cpu", 1)}


def test_parameters_stay_the_objects_that_an_optimizer_holds():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = list(model.parameters())
    placed = pypar.ModelParallel(model, {"0": "cpu:0", "1": "cpu:1"})
    assert all(a is b for a, b in zip(before, placed.parameters(), strict=True))
    assert [n for n, _ in placed.named_parameters()] == [f"module.{n}" for n, _ in model.named_parameters()]
    state = {n: t + 1 for n, t in placed.state_dict().items()}
    placed.load_state_dict(state)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())


def test_methods_beside_forward_find_their_devices():
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 3)

        def encode(self, x):
            return self.up(x)

        def forward(self, x):
            return self.down(x)

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.coder, self.last = Coder(), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.coder(self.coder.encode(x)))

    with cpu_devices(2):
        model = pypar.ModelParallel(Root(), {"coder": "cpu:0", "last": "cpu:1"})
        assert model(torch.ones(2, 3)).shape == (2, 3)
        assert model.traffic[("cpu", "cpu:0")] == (1, 24) and ("cpu:0", "cpu:1") in model.traffic
