"""matmul_reduce_scatter against torch.distributed around the matmul: python -m bench.bench_matmul_reduce_scatter."""

import sys

from bench.matmuls import main

if __name__ == "__main__":
    sys.exit(main("matmul_reduce_scatter"))
