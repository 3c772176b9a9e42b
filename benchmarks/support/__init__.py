"""What benchmarks share: timing, processes that obey commands, a NumPy simulator."""
