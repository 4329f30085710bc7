"""What a GPU makes of all this, in one command of under ten minutes: ``python -m benchmarks.gpu``."""
