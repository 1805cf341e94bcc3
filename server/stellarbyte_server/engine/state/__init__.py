"""What the engine keeps of requests, keys and cache blocks."""
