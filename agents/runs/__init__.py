"""A training run, from its configuration to the directory that it leaves behind."""
