"""Weights on their way from the trainer to whatever samples with them."""
