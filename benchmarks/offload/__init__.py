"""Chats that return after their blocks were evicted, and after a restart."""
