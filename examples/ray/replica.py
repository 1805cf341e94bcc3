"""A StellarByte server as a child process of a Ray Serve replica, and HTTP requests passed on to it. Needs no Ray."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

# The child's parent. However this process ends, the child gets SIGTERM: at the end of the guard's standard input, or
# from the kernel when the guard is killed, as Ray does with the children of its workers.
_GUARD = """
import ctypes, os, signal, subprocess, sys, threading
guard = os.getpid()
def follow_guard():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != guard:
            os._exit(1)
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, preexec_fn=follow_guard)
def end():
    os.read(0, 1)  # nothing is written: it returns at the end
    child.terminate()
threading.Thread(target=end, daemon=True).start()
sys.exit(child.wait())
"""
_OF_CONNECTIONS = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
_OF_THIS_SERVER = {"date", "server"}  # Serve's proxy writes its own


class ServerChild:
    """Started when made, on a free port of loopback; it ends when `close` is called or this process ends."""

    def __init__(self, command: Sequence[str]) -> None:
        with (
            socket.socket() as probe
        ):  # another program may take the port first: the child then ends, and Serve retries
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._guard = subprocess.Popen(
            [sys.executable, "-c", _GUARD, *command, "--host", "127.0.0.1", "--port", str(port)], stdin=subprocess.PIPE
        )
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=10), limits=httpx.Limits(max_connections=None), trust_env=False
        )

    def wait_ready(self, limit_s: float) -> None:
        """Until the server answers /ready with 200; RuntimeError if it ends before, or after `limit_s` seconds."""
        deadline_s = time.monotonic() + limit_s
        while True:
            if self._guard.poll() is not None:
                raise RuntimeError(f"The server ended with status {self._guard.returncode}; its log says why.")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"The server was not ready after {limit_s:.0f} s.")
            time.sleep(0.2)

    async def check(self) -> None:
        """RuntimeError with the server's reason unless it is healthy."""
        try:
            answer = await self._client.get(f"{self.url}/health", timeout=5)
        except httpx.TransportError as error:
            raise RuntimeError(f"The server does not answer: {type(error).__name__}.") from None
        if answer.status_code != 200:
            raise RuntimeError(f"The server is not healthy: {answer.text}")

    async def pass_on(self, request: Request, own_headers: Mapping[str, str]) -> Response:
        """The server's answer to a request, as it comes, with `own_headers` added.

        Header and body of the request stay as they are, `Host` included, so that keys and the check of host names work
        as in front of the server itself.
        """
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        passed_on = httpx.Request(
            request.method,
            httpx.URL(self.url, raw_path=_target(request)),
            headers=[pair for pair in request.headers.items() if pair[0] not in _OF_CONNECTIONS],
            content=request.stream() if has_body else None,
        )
        try:
            answer = await self._client.send(passed_on, stream=True)
        except httpx.TransportError:
            return JSONResponse(_GONE, status_code=503, headers={"Retry-After": "5", **own_headers})
        dropped = _OF_CONNECTIONS | _OF_THIS_SERVER
        headers = {name: value for name, value in answer.headers.items() if name not in dropped}
        return StreamingResponse(_body(answer), status_code=answer.status_code, headers={**headers, **own_headers})

    def close(self, limit_s: float = 60) -> None:
        """End the server, and wait until it has ended."""
        self._guard.communicate(timeout=limit_s)


_GONE = {
    "error": {
        "message": "The server of this replica has ended; another one replaces it.",
        "type": "server_error",
        "param": None,
        "code": "engine_unavailable",
    }
}


def _target(request: Request) -> bytes:
    """Path and query as the client wrote them."""
    path: bytes = request.scope.get("raw_path") or request.url.path.encode()
    query: bytes = request.scope["query_string"]
    return path.partition(b"?")[0] + (b"?" + query if query else b"")


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The bytes of an answer; a stream of events that breaks off ends with an error event, as the server's own do."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    except httpx.TransportError:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise
        yield f"data: {json.dumps(_GONE)}\n\n".encode()
    finally:
        await answer.aclose()
