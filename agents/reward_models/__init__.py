"""From preferences to a reward model, and a report on how good it is."""
