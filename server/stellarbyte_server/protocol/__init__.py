"""What crosses the border between HTTP processes and the engine process."""
