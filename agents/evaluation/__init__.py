"""A policy beside another one, and how sure a measured number is."""
