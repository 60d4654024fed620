"""all_gather_matmul against torch.distributed around the matmul: python -m bench.bench_all_gather_matmul [--ranks 4]"""

import sys

from bench.matmuls import main

if __name__ == "__main__":
    sys.exit(main("all_gather_matmul"))
