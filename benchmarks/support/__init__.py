"""Shared code: timing, processes controlled by commands, and a NumPy simulator."""
