"""Speculative decoding, with and without."""
