"""Measures the two packages beside their peers: ``python -m benchmarks.throughput``."""
