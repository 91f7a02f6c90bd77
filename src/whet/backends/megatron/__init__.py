"""The backend of Megatron-Core: tensor, sequence, pipeline, context and expert parallelism."""
