"""An OpenAI-compatible HTTP server over the embedded engine, so that any agent framework can drive it."""
