"""Writes answers from the engine's deltas."""
