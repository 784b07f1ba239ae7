"""How fast, how much memory, against whom. Used by tools/benchmark_* alone."""
