"""Whole episodes: how they are collected and stored, and the environment as Stable-Baselines3 sees it."""
