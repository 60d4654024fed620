"""Each op in plain torch: the specification, the fallback, the oracle of the tests and the baseline of the benches."""
