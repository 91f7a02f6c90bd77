"""What feeds a run: rows to learn from, or prompts to sample from; and how it is evaluated."""
