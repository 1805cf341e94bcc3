"""The error of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, converted or written. str() is one sentence for the user, naming the file."""
