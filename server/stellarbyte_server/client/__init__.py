"""The HTTP processes' side of the protocol: start the engine, send requests, read deltas."""
