"""The error of this package."""


class AnalysisError(ValueError):
    """A model, a text or a folder that cannot be analysed. str() is one sentence for the user, naming it."""
