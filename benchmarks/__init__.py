"""Side-by-side measurements: run one by one as `python -m benchmarks.FOLDER.NAME`."""
