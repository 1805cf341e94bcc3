"""What a process has when it begins to serve is nothing that the garbage collector looks at."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.protocol.start import EngineStart
from tests.support.servers.fake_engine import make_model_folder
from tests.support.servers.server_process import ROOT, free_port

ENGINE = """
import gc, sys
from stellarbyte_server.engine import process
from tests.support.servers.fake_engine import build_fake_core

class Loop:
    def __init__(self, core, socket): ...
    def run(self):
        print("objects:", len(gc.get_objects()), file=sys.stderr, flush=True)

process.EngineLoop = Loop
process.main(build_fake_core)
"""
HTTP = """
import gc, os, signal, sys
from stellarbyte_server import __main__ as server

def announce(settings):
    print("objects:", len(gc.get_objects()), file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

server._announce = announce
server.main(engine_module="tests.support.servers.fake_engine")
"""
FEW = 3000  # what is made between the call and the count; without the call it is over 20,000


@pytest.mark.parametrize("process", [ENGINE, HTTP], ids=["engine", "http"])
def test_collections_look_at_nothing_that_was_loaded(process: str, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model")
    start = EngineStart(
        settings=EngineSettings(model=str(model)), endpoint=f"ipc://{tmp_path}/socket/engine", log_level="warning"
    )
    (tmp_path / "socket").mkdir()
    command = [sys.executable, "-c", process, "--model", str(model), "--port", str(free_port())]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdin is not None and running.stderr is not None
        running.stdin.write(msgspec.json.encode(start) + b"\n")
        running.stdin.flush()  # and left open: the engine ends with it
        told = running.stderr.read().decode()
    (line,) = (line for line in told.splitlines() if line.startswith("objects: "))
    assert int(line.removeprefix("objects: ")) < FEW
