"""Benchmarks across processes on one machine."""
