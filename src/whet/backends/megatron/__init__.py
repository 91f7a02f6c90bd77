"""The backend of Megatron-Core: tensor, sequence, pipeline, context and expert parallelism."""

from whet.backends.megatron.backend import MegatronBackend

__all__ = ["MegatronBackend"]
