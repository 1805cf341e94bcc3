"""Turns chats into requests to the engine."""
