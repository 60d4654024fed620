"""reduce_scatter against gloo, plain C and the MPIs: python -m bench.bench_reduce_scatter [--quick] [--ranks 4]"""

import sys

from bench.collectives import main

if __name__ == "__main__":
    sys.exit(main("reduce_scatter"))
