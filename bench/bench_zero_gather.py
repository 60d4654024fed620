"""zero_gather: python -m bench.bench_zero_gather [--sizes 1M,128M] [--ranks 4]"""

import sys

from bench.zero_ops import main

if __name__ == "__main__":
    sys.exit(main("zero_gather"))
