"""Configuration: frozen models, one per concern; importable without torch."""
