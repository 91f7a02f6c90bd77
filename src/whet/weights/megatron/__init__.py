"""A model in Megatron-Core's terms: settings, names of weights, checkpoints. None of it needs Megatron itself."""
