"""Benchmarks of speed and memory, used only by tools/benchmark_*."""
