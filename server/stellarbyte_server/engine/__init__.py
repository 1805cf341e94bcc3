"""The engine: scheduling, the model and text. Knows nothing of HTTP."""
