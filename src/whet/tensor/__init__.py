"""Tensor work beneath the losses: attention over shared prefixes, token logprobs, KL estimates."""
