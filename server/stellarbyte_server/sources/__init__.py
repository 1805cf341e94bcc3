"""Adapters on other hosts: a child process of the HTTP process downloads them into the user's cache folder."""
