"""The HTTP API. Knows the engine only through its client."""
