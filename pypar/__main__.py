"""`python -m pypar` is the command `pypar`."""

import sys

from pypar.cli import main

if __name__ == "__main__":
    sys.exit(main())
