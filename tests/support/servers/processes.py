"""The processes below a server: which they are, whether they live, and what they hold."""

import contextlib
import os
import re
import time
from pathlib import Path

from tests.support.servers.server_process import ServerProcess


def child_pids(server: ServerProcess, module: str) -> list[int]:
    """The server's children that run `module`."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]


def worker_pids(server: ServerProcess) -> list[int]:
    return child_pids(server, "stellarbyte_server.http.worker")


def engine_pid(server: ServerProcess) -> int:
    (pid,) = child_pids(server, "tests.support.servers.fake_engine")
    return pid


def assert_gone(pids: list[int], limit_s: float = 30) -> None:
    deadline_s = time.monotonic() + limit_s
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, 0)
                assert time.monotonic() < deadline_s, f"process {pid} is still there"
                time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    with contextlib.suppress(FileNotFoundError):
        lists = [
            (task / "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()
        ]  # any thread's
        children = [int(child) for children in lists for child in children]
        return [*children, *(below for child in children for below in descendants(child))]
    return []


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def held_by(server: ServerProcess) -> dict[str, int]:
    """Descriptors and threads of both processes."""
    held = {}
    for name, pid in (("http", server.process.pid), ("engine", server.engine_pid())):
        held[f"{name} descriptors"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        held[f"{name} threads"] = len(list(Path(f"/proc/{pid}/task").iterdir()))
    return held


def settled(server: ServerProcess) -> dict[str, int]:
    """`held_by`, when what was closed a moment ago is gone."""
    held: dict[str, int] = held_by(server)
    before: dict[str, int] = {}
    while held != before:
        time.sleep(1)
        held, before = held_by(server), held
    return held


def resident_bytes(pid: int) -> int:
    return _size_bytes(pid, "VmRSS")


def peak_bytes(pid: int) -> int:
    """The most that was resident since the start or `forget_peak`."""
    return _size_bytes(pid, "VmHWM")


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _size_bytes(pid: int, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None, f"process {pid} has ended"
    return int(found[1]) * 1024
