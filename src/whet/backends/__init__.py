"""Training backends: what computes losses and updates weights."""
