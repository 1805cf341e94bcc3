"""Attention and other operations; reference.py defines their meaning."""
