"""Compiled CPU kernels over packed weights, for `backends.cpu_model`.

Compiled code is stored in the user's cache, in a folder named by a hash of all sources: numba's own check covers only
a function's file, not those of the functions that it calls.
"""

import contextlib
import fcntl
import hashlib
import logging
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from numba.core import caching

from stellarbyte.user_cache import cache_folder

logger = logging.getLogger(__name__)


def _make_folder() -> Path | None:
    """The folder of these sources' code for this kind of processor; None if it cannot be written."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.binding.get_host_cpu_name()}".encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    try:
        base = Path(numba.config.CACHE_DIR) if numba.config.CACHE_DIR else cache_folder() / "compiled"
        folder = base / digest.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        logger.warning("compiled CPU kernels cannot be stored, so every start compiles them: %s", error)
        return None
    numba.config.CACHE_DIR = str(folder)
    return folder


def _name_by_chance(file: Any, _number: int) -> str:
    name: str = file._data_name_pattern.replace("{number:d}", uuid.uuid4().hex)
    return name


# numba numbers the files of compiled code. Of two processes that compile at once, both would take the same number, and
# the index could then name one kind of model's code as another's, for ever: a segmentation fault.
caching.IndexDataCacheFile._data_name = _name_by_chance

# Kernels' arithmetic. Sums may be reordered, which vectors need. Divisions and roots may not be approximated: only
# vector code would be, and whether a loop's vector code runs depends on where its arrays lie in memory.
FAST_MATH = {"nnan", "ninf", "nsz", "reassoc", "contract"}

_folder = _make_folder()
KEEP_COMPILED = _folder is not None


@contextlib.contextmanager
def one_compiles() -> Iterator[None]:
    """Let one process compile at a time: the others then load its code."""
    if _folder is None:
        yield
        return
    with (_folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        yield
