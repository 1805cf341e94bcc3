"""An HTTP server that has a model and answers every chat in one prepared way, right or wrong."""

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = {"id": "m", "created": 0, "owned_by": "", "root": "m", "parent": None, "max_model_len": 9, "content_hash": None}


@dataclass
class Prepared:
    status: int
    body: str
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def error(cls, status: int, message: str, **headers: str) -> "Prepared":
        """OpenAI's error object; an underscore in a header's name stands for a dash."""
        body = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
        return cls(status, json.dumps(body), {name.replace("_", "-"): value for name, value in headers.items()})

    @classmethod
    def stream(cls, *events: object) -> "Prepared":
        return cls(200, "".join(f"data: {json.dumps(event)}\n\n" for event in events))

    @classmethod
    def whole_stream(cls, *events: object) -> "Prepared":
        return cls(200, cls.stream(*events).body + "data: [DONE]\n\n")


def text_event(text: str) -> object:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}


@contextlib.contextmanager
def answering(prepared: Prepared, received: list[bytes] | None = None, most_answers: float = math.inf) -> Iterator[str]:
    """The address of a server that does, `most_answers` times and then never.

    `received` gets the bodies of what it was asked.
    """
    bodies = [] if received is None else received
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(Prepared(200, json.dumps({"object": "list", "data": [MODEL], "version": "0"})))

        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            if len(bodies) > most_answers:
                is_over.wait()
            else:
                self._send(prepared)

        def _send(self, answer: Prepared) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            is_over.set()
            server.shutdown()
            thread.join()
