"""Scheduling: decisions over counts, without torch."""
