"""The error of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, converted or written. str() is one sentence for the user, naming the file."""


def one_line(error: Exception) -> str:
    """An exception's message without line breaks and final full stop, for use in a sentence."""
    return " ".join(str(error).split()).rstrip(".")
