"""The error of this package."""

import sys


class TrainError(ValueError):
    """A setting, a text or a file that training cannot use. str() is one sentence for the user, naming it."""


def missing_library(name: str, purpose: str) -> TrainError:
    """The error for a library of the extra `train` that is not installed."""
    return TrainError(f"{purpose} needs {name}: {sys.executable} -m pip install 'stellarbyte[train]'.")
