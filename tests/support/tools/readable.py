"""Waiting for file descriptors, which `select.select` cannot do in a process that has more than 1024."""

import select
from collections.abc import Iterable


def readable(fds: Iterable[int], limit_s: float) -> list[int]:
    """Those that can be read, as soon as there are some."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(limit_s * 1000)]
