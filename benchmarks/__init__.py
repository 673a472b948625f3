"""Benchmarks against peers, each on the same weights, rows and machine."""
