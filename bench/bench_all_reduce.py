"""all_reduce against gloo, plain C and the MPIs: python -m bench.bench_all_reduce [--quick] [--ranks 4]"""

import sys

from bench.collectives import main

if __name__ == "__main__":
    sys.exit(main("all_reduce"))
