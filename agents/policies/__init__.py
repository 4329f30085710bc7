"""Language models as Stable-Baselines3 policies, and token contexts as features for SB3's own policies."""
