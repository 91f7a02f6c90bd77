"""Environments: what a completion is answered with, one per file."""
