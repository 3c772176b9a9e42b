"""The commands of `python -m experiments`: one module per paper or comparison."""
