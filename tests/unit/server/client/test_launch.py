"""What the engine process is started with."""

import asyncio
import os
import subprocess
import sys

from stellarbyte_server.client.launch import EngineProcess, engine_environment
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.import_path import leave_current_folder
from tests.support.servers.fake_engine import make_model_folder

SAFE = {"PYTHONSAFEPATH": "1"}


def test_threads_wait_briefly_unless_the_user_decided() -> None:
    assert engine_environment({"A": "1"}) == {"A": "1", "GOMP_SPINCOUNT": "1000", **SAFE}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        assert engine_environment({name: "x"}) == {name: "x", **SAFE}


def test_the_engine_process_has_that_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    engine = EngineProcess(
        EngineSettings(model=str(make_model_folder(tmp_path))), "info", "tests.support.servers.fake_engine"
    )
    try:
        asyncio.run(engine.ready())
        with open(f"/proc/{engine._process.pid}/environ", "rb") as environment:
            assert b"GOMP_SPINCOUNT=1000" in environment.read().split(b"\0")
    finally:
        engine.stop()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_modules_are_never_those_of_the_current_folder(monkeypatch, tmp_path) -> None:
    """Also where PYTHONPATH has an empty entry, which stands for that folder."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "planted.py").touch()
    monkeypatch.chdir(tmp_path / "here")
    find = "import importlib.util; print(importlib.util.find_spec('planted') is not None)"
    (tmp_path / "finder.py").write_text(find)

    def finds(path: str) -> str:
        environment = engine_environment(os.environ | {"PYTHONPATH": path})
        return subprocess.run(
            [sys.executable, "-m", "finder"], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert finds(f":{tmp_path}:") == "False"
    assert finds(f"{tmp_path}:{tmp_path / 'here'}") == "True"  # it is named


def test_what_python_m_has_put_on_the_path_is_taken_off(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), "/elsewhere"])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:/elsewhere")
    leave_current_folder()
    assert sys.path == ["", str(tmp_path), "/elsewhere"]
    monkeypatch.setenv("PYTHONPATH", ":/elsewhere")
    leave_current_folder()
    assert sys.path == ["/elsewhere"]
