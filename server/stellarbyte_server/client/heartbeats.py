"""Tells the engine that an HTTP process lives, from a thread that its event loop does not hold up.

The rule: the engine drops the requests of a process from which it has heard nothing for `PEER_SILENCE_LIMIT_S`. A
process that was stopped falls silent at once; one whose event loop does not turn goes on for `LOOP_LIMIT_S` first, in
which the loop may come back to its streams.
"""

import contextlib
import threading
import time
from collections.abc import Callable

import msgspec
import zmq

from stellarbyte_server.protocol.messages import HEARTBEAT_INTERVAL_S, Heartbeat

LOOP_LIMIT_S = 30.0


class Heartbeats:
    """Heartbeats to an engine process until `stop`."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        endpoint: str,
        peer_id: bytes,
        turned_s: Callable[[], float],
    ) -> None:
        """`peer_id`: the identity of the socket they speak for; `turned_s`: when the event loop last turned."""
        self._beat = msgspec.msgpack.encode(Heartbeat(peer_id))
        self._turned_s = turned_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(context, endpoint), name="heartbeats", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send no more; returns once the socket is closed, which is at once."""
        self._stopped.set()
        self._thread.join()

    def _run(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> None:
        with context.socket(zmq.DEALER) as socket:  # sockets belong to one thread
            socket.setsockopt(zmq.SNDHWM, 1)  # an engine that does not read needs no more than one
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            while True:
                if time.monotonic() - self._turned_s() < LOOP_LIMIT_S:
                    with contextlib.suppress(zmq.Again):
                        socket.send(self._beat, zmq.NOBLOCK)
                if self._stopped.wait(HEARTBEAT_INTERVAL_S):
                    return
