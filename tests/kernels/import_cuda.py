"""Run by `make cuda-build` in the environment of the CUDA build: does it load without a GPU, and is every op there?"""

from pathlib import Path

import torch

from pypar import _build, backend

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


def main() -> None:
    assert torch.version.cuda, f"torch {torch.__version__} was built without CUDA"
    assert backend.available() and _build.CUDA, "pypar was built without its CUDA part"
    for source in sorted(SOURCES.glob("*.cu")):
        ops = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeExplicitAutograd")
        assert any(op.split(".")[0] == f"pypar_cuda::{source.stem}" for op in ops), f"{source.name} registers no op"
    print(
        f"pypar built for sm_{_build.CUDA.replace(' ', ', sm_')} against torch {torch.__version__}: loads without a GPU"
    )


if __name__ == "__main__":
    main()
