"""State of requests, keys and cache blocks."""
