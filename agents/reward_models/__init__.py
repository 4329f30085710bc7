"""Training a reward model on preferences, and a report on how good it is."""
