"""State as data: arguments, schedules, random generators and checkpoints. Loading them runs no code."""
