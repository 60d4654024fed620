"""broadcast against gloo, plain C and the MPIs: python -m bench.bench_broadcast [--quick] [--sizes 8,1M] [--ranks 4]"""

import sys

from bench.collectives import main

if __name__ == "__main__":
    sys.exit(main("broadcast"))
