"""Rewards: functions of an episode, one per file, and the scorer that combines them."""
