"""Benchmarks across processes of one machine."""
