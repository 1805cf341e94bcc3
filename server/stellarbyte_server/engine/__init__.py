"""The engine: scheduling, the model and text."""
