"""The evaluation of a policy beside another one, and confidence intervals."""
