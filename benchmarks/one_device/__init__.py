"""Benchmarks in one process, with all workers on one device or fake CPU devices."""
