"""Cuts off a client that leaves unread what is sent to it."""

import asyncio
import logging
import socket
import struct

logger = logging.getLogger("server.access")


class SendTimeout:
    """While it runs, each `timeout_s` must bring some of what waits in this process to the client's side.

    The kernel takes more only once the client has read a good part of what it keeps, so a client that reads a byte now
    and then brings nothing. `transport` is what is written to, `tcp` what carries it: the same unless there is TLS.
    """

    def __init__(self, transport: asyncio.Transport, tcp: asyncio.Transport, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._transports = {transport, tcp}
        self._tcp = tcp
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._unsent_bytes_then = 0

    def start(self) -> None:
        """Go on, if it runs."""
        if self._timer is None:
            self._look_again_later()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_again_later(self) -> None:
        self._unsent_bytes_then = self._unsent_bytes()
        self._timer = self._loop.call_later(self._timeout_s, self._look)

    def _unsent_bytes(self) -> int:
        return sum(transport.get_write_buffer_size() for transport in self._transports)

    def _look(self) -> None:
        """Answers wait meanwhile, so that the buffers shrink unless the client does not read."""
        unsent_bytes = self._unsent_bytes()
        if unsent_bytes < self._unsent_bytes_then:
            self._look_again_later()
            return
        if unsent_bytes > 0:  # else it has all, and only does not agree to the end of TLS
            logger.info("cut off a client that did not read for %g s", self._timeout_s)
            # With a reset, so that the kernel keeps nothing for it either.
            linger = struct.pack("ii", 1, 0)
            self._tcp.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._tcp.abort()
