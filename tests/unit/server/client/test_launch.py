"""What the engine process is started with."""

import asyncio
import os

from stellarbyte_server.client.launch import EngineProcess, engine_environment
from stellarbyte_server.config.settings import EngineSettings
from tests.support.servers.fake_engine import make_model_folder


def test_threads_wait_briefly_unless_the_user_decided() -> None:
    assert engine_environment({"A": "1"}) == {"A": "1", "GOMP_SPINCOUNT": "1000"}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        assert engine_environment({name: "x"}) == {name: "x"}


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
