"""Whole episodes: how they are collected and stored, and the environment with Stable-Baselines3's interface."""
