"""Models, training loops, measurements, and the storage of results."""
