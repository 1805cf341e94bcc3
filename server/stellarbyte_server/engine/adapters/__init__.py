"""Adapters: names and versions, and the memory they lie in."""
