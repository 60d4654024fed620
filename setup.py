"""The extension only: metadata is in pyproject.toml."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# Ampere; Hopper and Blackwell with the instructions that only they have.
TARGETS = ["80", "90a", "100a"]


def wants_cuda(torch):
    """PYPAR_CUDA: 0 never, 1 or an error, auto where nvcc is here and torch was built for CUDA; a GPU needn't be."""
    asked = os.environ.get("PYPAR_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"PYPAR_CUDA is '{asked}', expected auto, 0 or 1")
    lacks = [
        text
        for text, there in (
            ("nvcc is not in PATH and CUDA_HOME is not set", shutil.which("nvcc") or os.environ.get("CUDA_HOME")),
            (f"torch {torch.__version__} was built without CUDA", torch.version.cuda),
        )
        if not there
    ]
    if asked == "1" and lacks:
        raise SystemExit(f"PYPAR_CUDA=1, but {' and '.join(lacks)}; install both, or build with PYPAR_CUDA=0")
    return asked != "0" and not lacks


def find_toolkit():
    """Sets CUDA_HOME to where nvcc says it lives: the one in PATH may be a script that stands elsewhere."""
    if "CUDA_HOME" in os.environ:
        return
    told = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    here = next((line.split("=", 1)[1] for line in told.splitlines() if line.startswith("#$ _HERE_=")), None)
    if here:
        os.environ["CUDA_HOME"] = str(Path(here).parent)


def cuda_arguments():
    """Includes, libraries and nvcc's flags. A toolkit of parts has its math libraries' headers in site-packages."""
    parts = next(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu[0-9]*/include"), None)
    codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS]
    return (
        [str(parts)] if parts else [],
        [str(parts.parent / "lib")] if parts else [],
        ["-O3", "-lineinfo", "--expt-relaxed-constexpr", *codes],
    )


def extensions():
    if os.environ.get("PYPAR_NO_EXTENSION") == "1" or shutil.which(os.environ.get("CXX", "g++")) is None:
        print("pypar: no C++ compiler: installing without the compiled extension; the plain-torch reference serves")
        return {}
    import torch

    cuda = wants_cuda(torch)
    if cuda:
        find_toolkit()
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # reads CUDA_HOME

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = git.stdout.strip() or "unknown"
    # Beside the extension, to be read when it can't be loaded.
    facts = {"TORCH_VERSION": torch.__version__, "COMMIT": commit, "CUDA": " ".join(TARGETS) if cuda else ""}
    (ROOT / "pypar" / "_build.py").write_text("".join(f'{name} = "{value}"\n' for name, value in facts.items()))
    folders = ("comm/*.cpp", "cpu/*.cpp", *(["cuda/*.cu"] if cuda else []))
    sources = sorted(str(p.relative_to(ROOT)) for pattern in folders for p in (ROOT / "csrc").glob(pattern))
    flags = {"cxx": ["-O3", "-Wall", "-fvisibility=hidden", "-g0"]}
    includes, libraries = [str(ROOT / "csrc" / "include"), str(ROOT / "csrc")], []
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")  # unused beside -gencode, but asked for without a GPU
        more_includes, libraries, flags["nvcc"] = cuda_arguments()
        includes += more_includes
    extension = (CUDAExtension if cuda else CppExtension)(
        "pypar._C",
        [*sources, "csrc/bindings.cpp"],
        include_dirs=includes,
        library_dirs=libraries,
        extra_compile_args=flags,
    )

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Not the temporary folder of an editable install: ninja compiles only what has changed since the last one.
            self.build_temp = str(ROOT / "build" / (f"temp-{torch.__version__}" if cuda else "temp"))

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**extensions())
