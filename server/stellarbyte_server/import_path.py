"""Where Python looks for modules: never in the current folder, which may hold a numpy.py beside a model.

`python -m` puts that folder first, and an empty entry of PYTHONPATH, such as `PYTHONPATH=$PYTHONPATH:dir` leaves, also
means it.
"""

import os
import sys
from collections.abc import Mapping


def safe_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """An environment whose Python processes, and those that they start, do not import from their current folder."""
    path = {"PYTHONPATH": os.pathsep.join(named)} if (named := _named(ours)) else {}
    return {name: value for name, value in ours.items() if name != "PYTHONPATH"} | path | {"PYTHONSAFEPATH": "1"}


def leave_current_folder() -> None:
    """Take the current folder off this process's path, unless PYTHONPATH names it."""
    here = os.getcwd()
    if here not in map(os.path.abspath, _named(os.environ)):
        sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]


def _named(environment: Mapping[str, str]) -> list[str]:
    """The entries of PYTHONPATH that name a folder."""
    return [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
