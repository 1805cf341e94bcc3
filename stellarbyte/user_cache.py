"""The user's cache folder, for files that can be recomputed."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$STELLARBYTE_CACHE, or stellarbyte in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    if own := os.environ.get("STELLARBYTE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stellarbyte"


def adapter_cache() -> Path:
    """Adapters of other hosts, a folder for each version."""
    return cache_folder() / "adapters"
