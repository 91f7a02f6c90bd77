"""Environments: what a completion is answered with, one per file."""

from whet.rollout.protocols import Env, EnvFactory, Observation, Turn

__all__ = ["Env", "EnvFactory", "Observation", "Turn"]
