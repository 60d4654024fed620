"""all_to_all against gloo, plain C and the MPIs: python -m bench.bench_all_to_all [--quick] [--ranks 4]"""

import sys

from bench.collectives import main

if __name__ == "__main__":
    sys.exit(main("all_to_all"))
