"""The embedded engine: continuous batching in this process, with the trainer's own model object."""
