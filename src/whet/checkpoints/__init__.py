"""Checkpoints: folders that are either complete or not there, and the state that goes into them."""
