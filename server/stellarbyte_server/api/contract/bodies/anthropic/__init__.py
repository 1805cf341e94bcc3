"""Anthropic's requests: their bodies, and their conversion to chats."""
