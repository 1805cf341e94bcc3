"""What a start on a GPU needs of the machine, said in one sentence where it is not there."""

import importlib.util
import shutil

import pytest

from stellarbyte_server.engine.start.load import _require_triton
from stellarbyte_server.engine.start.serving_plan import StartupError


def test_a_gpu_needs_triton_and_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StartupError, match="needs the package triton"):
        _require_triton()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(StartupError, match="needs a C compiler"):
        _require_triton()
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    _require_triton()
