"""A training run: its configuration, and the directory of its results."""
