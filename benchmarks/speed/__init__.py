"""The bounds that `benchmarks/bench.py` checks: one file per topic, and how to measure and report them."""
