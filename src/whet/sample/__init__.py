"""Rejection sampling: prompts are answered several times, judged, and become rows of training data."""
