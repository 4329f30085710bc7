"""PPO and its competitors on one task: ``python -m benchmarks.algorithms``."""
