"""Several processes beside one: the same weights, how much memory each takes, how fast they are, and what is predicted
for machines that are not here.
"""
