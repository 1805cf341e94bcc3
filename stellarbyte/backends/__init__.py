"""Models that run serving steps."""
