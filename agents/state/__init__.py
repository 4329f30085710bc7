"""State as data: schedules, random generators and checkpoints, none of which runs code when it is loaded."""
