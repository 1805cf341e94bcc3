"""A server that is told to sends its traces to a collector, here one on 127.0.0.1; one that is not sends nothing."""

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.support.cases import each_value_once
from tests.support.servers.server_process import FAKE, ServerProcess, free_port, running

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install '.[otel]'")

TRACE = "0af7651916cd43dd8448eb211c80319c"


@contextlib.contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Its URL, and the (path, spans) it got."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = ExportTraceServiceRequest()
            message.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
            received.append((self.path, message))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", received
    finally:
        http.shutdown()
        http.server_close()


def ask(server: ServerProcess, stream: bool) -> None:
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    body = {"model": "fake", "prompt": "a secret", "max_tokens": 5, "stream": stream}
    httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=30).raise_for_status()


@pytest.mark.parametrize(("how", "num_workers"), each_value_once(["flag", "variable"], [1, 2]))
def test_every_request_has_its_span_at_the_collector(fake_model: str, monkeypatch, how: str, num_workers: int) -> None:
    with collector() as (url, received):
        if how == "variable":
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
            monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        flags = ("--otlp-endpoint", url) if how == "flag" else ()
        with running(FAKE, "--model", fake_model, "--http-workers", str(num_workers), *flags) as server:
            for number in range(8):
                ask(server, stream=number % 2 == 0)
        # What was left was sent when the server ended.
        groups = [group for path, message in received for group in message.resource_spans if path == "/v1/traces"]
        spans = [span for group in groups for scope in group.scope_spans for span in scope.spans]
        assert len(spans) == 8, server.log()
        for span in spans:
            assert span.name == "POST /v1/completions" and span.trace_id.hex() == TRACE
            assert [event.name for event in span.events] == ["queued", "started", "first token", "end"]
            times = [event.time_unix_nano for event in span.events]
            assert span.start_time_unix_nano <= times[0] and times == sorted(times)
        names = {
            attribute.value.string_value
            for group in groups
            for attribute in group.resource.attributes
            if attribute.key == "service.name"
        }
        assert names == {"stellarbyte" if how == "flag" else "mine"}
        assert b"a secret" not in b"".join(message.SerializeToString() for _, message in received)


def test_a_collector_that_is_not_there_holds_up_neither_answers_nor_the_end(fake_model: str) -> None:
    with running(FAKE, "--model", fake_model, "--otlp-endpoint", f"http://127.0.0.1:{free_port()}") as server:
        started_s = time.monotonic()
        ask(server, stream=True)
        assert time.monotonic() - started_s < 2
        started_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started_s < 6
