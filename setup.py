"""The extension only: metadata is in pyproject.toml."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup


def extensions():
    if os.environ.get("PYPAR_NO_EXTENSION") == "1" or shutil.which(os.environ.get("CXX", "g++")) is None:
        print("pypar: no C++ compiler: installing without the compiled extension; the plain-torch reference serves")
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    root = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    commit = git.stdout.strip() or "unknown"
    # Beside the extension, to be read when it can't be loaded.
    (root / "pypar" / "_build.py").write_text(f'TORCH_VERSION = "{torch.__version__}"\nCOMMIT = "{commit}"\n')
    sources = sorted(str(p.relative_to(root)) for d in ("comm", "cpu") for p in (root / "csrc" / d).glob("*.cpp"))
    extension = CppExtension(
        "pypar._C",
        [*sources, "csrc/bindings.cpp"],
        include_dirs=[str(root / "csrc" / "include"), str(root / "csrc")],
        extra_compile_args=["-O3", "-Wall", "-fvisibility=hidden", "-g0"],
    )

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Not the temporary folder of an editable install: ninja compiles only what has changed since the last one.
            self.build_temp = str(root / "build" / "temp")

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**extensions())
