"""Benches: verify first, interleave, write machine and regime with every number. Run with `python -m bench`."""
