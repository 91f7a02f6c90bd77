"""A model in Megatron-Core's terms: its settings, the names of its weights, its checkpoints. Needs no Megatron itself."""
