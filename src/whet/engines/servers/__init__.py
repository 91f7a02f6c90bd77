"""Engines that are servers: found or started, watched over, asked for tokens, and given new weights."""
