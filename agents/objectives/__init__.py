"""The mathematics of the algorithms, as pure functions: advantages, losses, and the KL divergence."""
