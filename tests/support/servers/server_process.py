"""A real server process on a free port of 127.0.0.1, for tests that talk to it over sockets."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import httpx

ROOT = Path(__file__).parents[3]
FAKE = "tests.support.servers.fake_server"  # the real HTTP process in front of the fake engine
FAKE_MODEL = "fake"  # the name of the fake engine's model
REASONING = "tests.support.servers.reasoning_server"
HARMONY = "tests.support.servers.harmony_server"
TUNING = "tests.support.tuning.tuning_server"
REAL = "stellarbyte_server"
START_LIMIT_S = 600  # the first server of a machine compiles its kernels
NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_server(url: str, process: subprocess.Popen[bytes], log: Callable[[], str] = lambda: "") -> None:
    """Until it answers /ready with 200."""
    deadline_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise AssertionError(f"the server ended with status {process.returncode}:\n{log()}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server was not ready after {START_LIMIT_S} s:\n{log()}")


class ServerProcess:
    """Started when made; `wait_ready` before use, `stop` in any case."""

    def __init__(
        self,
        module: str,
        *flags: str,
        port: int | None = None,
        cwd: Path = ROOT,
        environment: Mapping[str, str] = NO_VARIABLES,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", str(self.port), *flags],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={name: value for name, value in os.environ.items() if not name.startswith("STELLARBYTE_")}
            | dict(environment),
        )

    def log(self) -> str:
        """Everything printed so far, by both processes."""
        file = self._log.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")  # seeking would move the writers, too

    def wait_ready(self) -> "ServerProcess":
        wait_for_server(self.url, self.process, self.log)
        return self

    def wait_logged(self, text: str, limit_s: float = 60) -> None:
        deadline_s = time.monotonic() + limit_s
        while text not in self.log():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline_s, f"{text!r} is not in the log after {limit_s} s:\n{self.log()}"
            time.sleep(0.02)

    def wait_listening(self) -> None:
        """Until all HTTP processes listen; /ready is answered by the first that does."""
        self.wait_logged("StellarByte serves")

    def wait(self, limit_s: float = 15) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(limit_s)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()

    def engine_pid(self) -> int:
        """The one child of the HTTP process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = children
        return int(pid)

    def metric(self, name: str) -> float:
        """The value of one metric that has only the model's label."""
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(name + "{"):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")


@contextlib.contextmanager
def running(
    module: str, *flags: str, cwd: Path = ROOT, environment: Mapping[str, str] = NO_VARIABLES
) -> Iterator[ServerProcess]:
    server = ServerProcess(module, *flags, cwd=cwd, environment=environment)
    try:
        server.wait_ready()
        if "--http-workers" in flags:
            server.wait_listening()
        yield server
    finally:
        server.stop()


def the_error_line(server: ServerProcess) -> str:
    """The one line a failed start prints for the user."""
    assert server.wait(60) in (1, 2)
    log = server.log()
    assert "Traceback" not in log
    lines = log.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]
