"""The CPU backend: compiled kernels over packed weights. `model.CpuModel` is the way in.

Compiled code is kept in the user's cache, in a folder named by the sources it came from: numba's own check looks only
at the file a function stands in, not at those of the functions it calls.
"""

import hashlib
from pathlib import Path

import numba

from stellarbyte.user_cache import cache_folder


def _folder_of_compiled_code() -> Path:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sources:
        digest.update(source.read_bytes())
    return cache_folder() / "compiled" / digest.hexdigest()[:16]


numba.config.CACHE_DIR = str(_folder_of_compiled_code())
