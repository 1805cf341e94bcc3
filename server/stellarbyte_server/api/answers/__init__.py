"""Answers are written from the engine's deltas."""
