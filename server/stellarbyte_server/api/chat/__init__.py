"""A chat becomes requests to the engine."""
