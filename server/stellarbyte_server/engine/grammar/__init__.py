"""Grammars as masks over the vocabulary."""
