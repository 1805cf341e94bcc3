"""The store of compiled kernels: what is compiled once, and two processes that write into it at once."""

import importlib
import pkgutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from numba.core import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

import stellarbyte.ops.cpu as kernels  # names the files of numba's stores
from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.ops.cpu.linear import linear
from stellarbyte.ops.cpu.moe import expert_linear
from tests.support.engines.engine import ModelEngine
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import EXPERT_VARIANTS, make_model, random_tokens


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


@pytest.mark.skipif(not kernels.KEEP_COMPILED, reason="nothing can be kept here")
def test_a_kernel_is_compiled_for_kinds_of_arrays_and_not_again_for_the_numbers_of_its_callers() -> None:
    """Of all that these sources have compiled on this machine."""
    model = make_model(**EXPERT_VARIANTS["experts, shared with a gate, some layers dense"])
    backend = partial(CpuModel, quantization="none", num_threads=2)
    engine = ModelEngine(model, backend=backend, adapters={"a": random_adapter(model.config, seed=1, dora=1.0)})
    engine.teacher_forced(random_tokens(8), 4, adapter="a")
    modules = [
        importlib.import_module(f"{kernels.__name__}.{name}") for _, name, _ in pkgutil.iter_modules(kernels.__path__)
    ]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)}
    stored = {
        kernel: [signature for signature, *_ in kernel._cache._cache_file._load_index()]
        for kernel in found
        if isinstance(kernel._cache, FunctionCache)
    }
    for kernel, signatures in stored.items():
        assert not any(isinstance(kind, types.Literal) for signature in signatures for kind in signature), kernel
    for kernel in (linear, expert_linear):
        kinds = {
            tuple(kind for kind in signature if isinstance(kind, types.Number | types.Boolean))
            for signature in stored[kernel]
        }
        assert len(kinds) == 1, kinds
