"""Anthropic's requests: their bodies, and the chats that they ask for."""
