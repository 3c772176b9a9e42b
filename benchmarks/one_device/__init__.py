"""Benchmarks in one process: all workers on one device or on fake CPU devices."""
