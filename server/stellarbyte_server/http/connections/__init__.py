"""A connection of an HTTP process: its parser, TLS, limits and time limits."""
