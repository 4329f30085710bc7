"""The on-policy algorithms: the loop that they share, and one file for each of them."""
