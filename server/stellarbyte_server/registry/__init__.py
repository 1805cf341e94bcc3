"""Adapters that were loaded over HTTP: their contents, and the versions of each name."""
