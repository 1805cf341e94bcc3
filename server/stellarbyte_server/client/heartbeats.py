"""Sends an HTTP process's heartbeats to the engine, from a thread independent of the event loop.

The engine drops the requests of a process that it has not heard from for `PEER_SILENCE_LIMIT_S`. A stopped process
is silent at once. If the event loop is blocked, heartbeats continue for `LOOP_LIMIT_S`, in which the loop may recover.
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
        """`peer_id`: identity of the client's socket; `turned_s`: time of the event loop's last turn."""
        self._beat = msgspec.msgpack.encode(Heartbeat(peer_id))
        self._turned_s = turned_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(context, endpoint), name="heartbeats", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop sending; returns when the socket is closed, without delay."""
        self._stopped.set()
        self._thread.join()

    def _run(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> None:
        with context.socket(zmq.DEALER) as socket:  # sockets belong to one thread
            socket.setsockopt(zmq.SNDHWM, 1)  # one is enough for an engine that does not read
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            while True:
                if time.monotonic() - self._turned_s() < LOOP_LIMIT_S:
                    with contextlib.suppress(zmq.Again):
                        socket.send(self._beat, zmq.NOBLOCK)
                if self._stopped.wait(HEARTBEAT_INTERVAL_S):
                    return
