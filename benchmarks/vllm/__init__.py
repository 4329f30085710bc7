"""A real server of vLLM: how it is installed, started and recorded, and trainings whose texts it writes."""
