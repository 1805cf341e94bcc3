"""From deltas of the engine to bytes of an answer."""
