"""Adapters in --data-dir: the contents that were loaded over HTTP, and the versions of each name."""
