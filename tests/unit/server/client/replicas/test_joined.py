"""The file with the engine processes that have the adapters of the record, and its lock."""

import asyncio
import subprocess
import sys
from pathlib import Path

from stellarbyte_server.client.replicas.joined import JoinedEngines

HOLDER = """
import asyncio, sys
from pathlib import Path
from stellarbyte_server.client.replicas.joined import JoinedEngines
async def hold():
    async with JoinedEngines(Path(sys.argv[1])).locked():
        print("locked", flush=True)
        await asyncio.sleep(60)
asyncio.run(hold())
"""


def test_the_newest_process_of_each_replica_is_kept(tmp_path: Path) -> None:
    joined = JoinedEngines(tmp_path)
    assert joined.read() == {}
    joined.note(0, "first")
    joined.note(1, "other")
    joined.note(0, "second")
    assert JoinedEngines(tmp_path).read() == {0: "second", 1: "other"}


def test_one_change_at_a_time_in_a_process(tmp_path: Path) -> None:
    inside = 0
    most: list[int] = []

    async def change(joined: JoinedEngines) -> None:
        nonlocal inside
        async with joined.locked():
            inside += 1
            most.append(inside)
            try:
                await asyncio.sleep(0.01)
            finally:
                inside -= 1

    async def all_of_them() -> None:
        joined = JoinedEngines(tmp_path)
        cancelled = asyncio.create_task(change(joined))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(*(change(joined if i % 2 else JoinedEngines(tmp_path)) for i in range(10)))

    asyncio.run(asyncio.wait_for(all_of_them(), 30))
    assert most == [1] * 11


def test_the_lock_of_another_process_ends_with_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"

    async def lock() -> None:
        async with JoinedEngines(tmp_path).locked():
            pass

    async def lock_after_its_end() -> None:
        waiting = asyncio.create_task(lock())
        await asyncio.sleep(0.2)
        assert not waiting.done()
        holder.kill()
        await asyncio.wait_for(waiting, 30)

    asyncio.run(lock_after_its_end())
    holder.wait()
