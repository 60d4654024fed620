"""matmul_all_reduce against torch.distributed around the matmul: python -m bench.bench_matmul_all_reduce [--ranks 4]"""

import sys

from bench.matmuls import main

if __name__ == "__main__":
    sys.exit(main("matmul_all_reduce"))
