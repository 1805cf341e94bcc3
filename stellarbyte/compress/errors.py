"""What cannot be compressed as asked; str() is one sentence for the user."""


class CompressError(ValueError):
    """A text, a model or a setting does not fit; the message names it."""
