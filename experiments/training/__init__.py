"""Models and training loops, what they measure, and how results are kept."""
