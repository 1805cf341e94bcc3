"""The store of compiled kernels, when two processes write into it at once."""

from pathlib import Path
from typing import Any

from numba.core.caching import IndexDataCacheFile

import stellarbyte.ops.cpu  # noqa: F401 - names the files of numba's stores


def test_no_code_is_taken_for_that_of_a_process_which_compiled_at_the_same_time(tmp_path: Path) -> None:
    class Late(IndexDataCacheFile):  # has read the index before the other process wrote into it
        def _load_index(self) -> dict[Any, str]:
            return {}

    class Interrupted(IndexDataCacheFile):  # between its index and its code, the other process stores both of its own
        def _save_data(self, name: str, data: Any) -> None:
            late.save("second", "code of the second")
            super()._save_data(name, data)

    late = Late(str(tmp_path), "kernel", "stamp")
    Interrupted(str(tmp_path), "kernel", "stamp").save("first", "code of the first")
    store = IndexDataCacheFile(str(tmp_path), "kernel", "stamp")
    assert store.load("second") == "code of the second"
    assert store.load("first") in (None, "code of the first")
