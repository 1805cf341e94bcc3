"""Disconnects a client that does not read its output."""

import asyncio
import logging
import socket
import struct

logger = logging.getLogger("server.access")


class SendTimeout:
    """While running, the output buffered in this process must shrink in every `timeout_s`.

    The kernel takes more only after the client has read a good part of the kernel's buffer, so reading single bytes is
    not enough. `tcp` is the transport below `transport`: the same without TLS.
    """

    def __init__(self, transport: asyncio.Transport, tcp: asyncio.Transport, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._transports = {transport, tcp}
        self._tcp = tcp
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._unsent_bytes_then = 0

    def start(self) -> None:
        """Start, unless it is running."""
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
        """Check the buffers: answers are paused, so they shrink if the client reads."""
        unsent_bytes = self._unsent_bytes()
        if unsent_bytes < self._unsent_bytes_then:
            self._look_again_later()
            return
        if unsent_bytes > 0:  # otherwise only the end of TLS is unconfirmed
            logger.info("disconnected a client that did not read for %g s", self._timeout_s)
            # With a reset, so that the kernel also drops its buffer.
            linger = struct.pack("ii", 1, 0)
            self._tcp.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._tcp.abort()
