"""The on-policy algorithms: the training loop that they share, and one file for each of them."""
