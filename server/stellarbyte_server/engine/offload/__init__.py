"""Tiers below the pool of cache blocks: host memory, then a folder of files."""
