"""The mathematics of the algorithms, as pure functions: advantages, losses, estimators of the KL divergence."""
