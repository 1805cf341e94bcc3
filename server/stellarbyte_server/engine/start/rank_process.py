"""The process of a tensor-parallel rank other than 0. Run by `RankProcesses` of rank 0.

One thread computes; a second one reads what rank 0 sends, and ends the process when rank 0 has ended; others compile
and copy adapters.
"""

import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from stellarbyte_server.engine.ranks.messages import (
    Connect,
    FromRank,
    RankLoaded,
    RankMeasured,
    RankRefused,
    RankServes,
    RankStart,
    ServeCache,
    ToRank,
    read_message,
    write_message,
)
from stellarbyte_server.garbage import keep_for_good

if TYPE_CHECKING:
    from stellarbyte_server.engine.ranks.follower import Follower


def _read_all(stdin: BinaryIO, inbox: "queue.SimpleQueue[ToRank]") -> None:
    while (message := read_message(stdin, ToRank)) is not None:  # type: ignore[arg-type]
        inbox.put(message)
    os._exit(0)  # at once: a step may wait for rank 0


def main() -> int:
    """Load the rank's part of the model and follow rank 0; returns the exit status if it cannot start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which lets requests finish
    logging.disable(logging.WARNING)  # rank 0 says the same
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # other output goes to stderr
    inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
    stdin = os.fdopen(os.dup(0), "rb")
    threading.Thread(target=_read_all, args=(stdin, inbox), daemon=True).start()

    replying = threading.Lock()

    def reply(message: FromRank) -> None:
        with replying:
            write_message(stdout, message)

    start = inbox.get()
    assert isinstance(start, RankStart)
    try:
        follower = _load(start, inbox, reply)
    except Exception as error:
        ranks = start.settings.tensor_parallel_size
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        reply(RankRefused(f"tensor-parallel rank {start.rank} of {ranks} could not start: {reason}"))
        return 1
    keep_for_good()
    while True:
        follower.take(inbox.get())


def _load(start: RankStart, inbox: "queue.SimpleQueue[ToRank]", reply: Callable[[FromRank], None]) -> "Follower":
    """The rank with its model and cache."""
    import torch  # only after the parent is watched

    from stellarbyte_server.engine.ranks.captures import FollowingOrder
    from stellarbyte_server.engine.ranks.follower import Follower
    from stellarbyte_server.engine.start.model_folder import open_model_folder
    from stellarbyte_server.engine.start.ranks import device_of_rank, load_rank, make_group

    torch.set_num_threads(start.num_threads)
    settings = start.settings
    device = device_of_rank(settings.device, start.rank)
    group = make_group(start.rank, settings.tensor_parallel_size, device)
    folder = open_model_folder(Path(settings.model), is_dummy=settings.load_format == "dummy")
    loaded = load_rank(settings, folder, getattr(torch, settings.dtype), group, device)
    reply(RankLoaded())
    connect = inbox.get()  # other ranks may still load
    assert isinstance(connect, Connect)
    group.connect(Path(connect.store))
    reply(RankMeasured(loaded.start.cache_bytes(), group.no_symmetric_memory))
    cache = inbox.get()
    assert isinstance(cache, ServeCache)
    executor = loaded.start.executor(cache.max_model_len, cache.num_blocks, FollowingOrder(reply))
    reply(RankServes())
    return Follower(executor, loaded.bank, reply)


if __name__ == "__main__":
    sys.exit(main())
