"""Texts as tokens: from files to token shards, and from shards and chats to training batches."""
