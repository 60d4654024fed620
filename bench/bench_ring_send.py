"""ring_send and ring_recv, one way: python -m bench.bench_ring_send [--sizes 64,1M] [--no-peers]"""

import sys

from bench.ring_ops import main

if __name__ == "__main__":
    sys.exit(main("ring_send"))
