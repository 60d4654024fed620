"""Installed without a compiler and without triton: pypar imports, and the plain-torch references serve."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pypar._C" else find_spec(name, *rest)
sys.modules["triton"] = None
"""
USE = """
import torch, pypar
import torch.distributed as dist
assert not pypar.backend.available()
pypar.init()
assert dist.get_backend() == "gloo"
x = torch.arange(6.0).view(3, 2).requires_grad_()
y = pypar.ops.reduce_scatter(pypar.ops.all_reduce(x))
y.sum().backward()
assert torch.equal(y, x) and torch.equal(x.grad, torch.ones(3, 2))
model = pypar.DataParallel(torch.nn.Linear(2, 1))
model(x).sum().backward()
assert torch.equal(model.module.weight.grad, x.detach().sum(0, keepdim=True))
from pypar.doctor import main
main([])
"""


def test_without_the_extension_and_triton_the_references_serve():
    done = subprocess.run([sys.executable, "-c", BLOCKED + USE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("has no compiled extension") >= 1
    assert "plain-torch reference over torch.distributed" in done.stdout
