"""Adapters: names, versions and memory."""
