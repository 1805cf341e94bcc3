"""From settings to a running engine: the model, its cache and its executor."""
