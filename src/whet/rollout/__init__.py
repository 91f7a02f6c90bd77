"""Rollout: playing episodes, grouping and scoring them, and evaluating a policy by its samples."""
