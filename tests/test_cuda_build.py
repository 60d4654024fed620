"""PYPAR_CUDA says at once what a CUDA build lacks; doctor says what is there and why it is unused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pypar import doctor

ROOT = Path(__file__).parent.parent


def setup_py(value: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYPAR_CUDA": value}, capture_output=True, text=True)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
def test_a_cuda_build_without_cuda_is_refused_with_the_reason():
    before = (ROOT / "pypar" / "_build.py").read_text()
    done = setup_py("1")
    assert done.returncode != 0
    assert "PYPAR_CUDA=1, but" in done.stderr and "was built without CUDA" in done.stderr
    assert "PYPAR_CUDA=0" in done.stderr, "the remedy"
    assert (ROOT / "pypar" / "_build.py").read_text() == before, "facts of a build that was refused"


def test_another_value_is_refused():
    done = setup_py("yes")
    assert done.returncode != 0 and "PYPAR_CUDA is 'yes', expected auto, 0 or 1" in done.stderr


def test_doctor_says_what_is_there_and_why_it_is_unused():
    rows = dict(doctor.report())
    for part in ("CUDA kernels", "Triton kernels"):
        assert "compiled and executed under emulation; not yet run on a GPU" in rows[part]
    if torch.version.cuda is None:
        assert "absent" in rows["CUDA kernels"] and "torch was built without CUDA" in rows["CUDA kernels"]
    if not torch.cuda.is_available():
        assert "no GPU is visible" in rows["Triton kernels"] or "not installed" in rows["Triton kernels"]
        assert rows["NVLink multicast"] == "unused: no GPU is visible"
