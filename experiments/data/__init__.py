"""Data sets: images, text, and tables, from scikit-learn or from local files."""
