"""The HTTP processes' side of that border: starting the engine, sending requests, reading deltas."""
