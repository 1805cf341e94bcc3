"""The file with the adapters that all replicas have to have."""

import asyncio
import subprocess
import sys
from pathlib import Path

from stellarbyte_server.client.replicas.journal import AdapterJournal, JournalEntry

HOLDER = """
import asyncio, sys
from pathlib import Path
from stellarbyte_server.client.replicas.journal import AdapterJournal
async def hold():
    async with AdapterJournal(Path(sys.argv[1])).locked():
        print("locked", flush=True)
        await asyncio.sleep(60)
asyncio.run(hold())
"""


def test_the_last_change_of_each_name_is_kept(tmp_path: Path) -> None:
    journal = AdapterJournal(tmp_path)
    assert journal.read() == {}
    journal.note("a", JournalEntry("path/of/a", "hash"))
    journal.note("b", JournalEntry("b", "other"))
    journal.note("a", JournalEntry())
    assert AdapterJournal(tmp_path).read() == {"a": JournalEntry(), "b": JournalEntry("b", "other")}


def test_one_change_at_a_time_in_a_process(tmp_path: Path) -> None:
    inside = 0
    most: list[int] = []

    async def change(journal: AdapterJournal) -> None:
        nonlocal inside
        async with journal.locked():
            inside += 1
            most.append(inside)
            try:
                await asyncio.sleep(0.01)
            finally:
                inside -= 1

    async def all_of_them() -> None:
        journal = AdapterJournal(tmp_path)
        cancelled = asyncio.create_task(change(journal))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(*(change(journal if i % 2 else AdapterJournal(tmp_path)) for i in range(10)))

    asyncio.run(asyncio.wait_for(all_of_them(), 30))
    assert most == [1] * 11


def test_the_lock_of_another_process_ends_with_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"

    async def lock() -> None:
        async with AdapterJournal(tmp_path).locked():
            pass

    async def lock_after_its_end() -> None:
        waiting = asyncio.create_task(lock())
        await asyncio.sleep(0.2)
        assert not waiting.done()
        holder.kill()
        await asyncio.wait_for(waiting, 30)

    asyncio.run(lock_after_its_end())
    holder.wait()
