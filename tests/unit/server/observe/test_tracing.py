"""Traces: off unless an endpoint is named; then a span says when things happened to a request, and nothing secret."""

import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from stellarbyte_server.config.command_line import parse_settings
from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.config.settings import EngineSettings, ServerSettings
from stellarbyte_server.observe import tracing
from stellarbyte_server.observe.record import RequestRecord, TokenCount
from stellarbyte_server.observe.tracing import check_tracing, is_wanted, make_tracing
from tests.support.application import route_table
from tests.support.servers.server_process import ROOT

SETTINGS = ServerSettings(engine=EngineSettings(model="m"))
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
ROUTES = route_table()


@pytest.mark.parametrize(
    ("flags", "environment", "wanted"),
    [
        ([], {}, False),
        ([], {"OTEL_SERVICE_NAME": "x"}, False),
        ([], {ENDPOINT: ""}, False),
        ([], {ENDPOINT: "http://127.0.0.1:4318"}, True),
        ([], {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        (["--otlp-endpoint", "http://127.0.0.1:4318"], {}, True),
        (["--otlp-endpoint", "http://127.0.0.1:4318"], {"OTEL_SDK_DISABLED": "true"}, False),
        ([], {ENDPOINT: "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_traces_are_made_only_where_an_endpoint_is_named(flags, environment, wanted) -> None:
    settings = parse_settings(flags, {})
    assert is_wanted(settings, environment) == wanted
    if not wanted:
        assert make_tracing(settings, environment) is None


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "grpc://x", "http://", "http://a b"])
def test_an_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(SettingsError, match="must be a URL"):
        parse_settings(["--otlp-endpoint", url], {})


def test_traces_without_opentelemetry_are_refused_and_it_is_said_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(tracing, "_NEEDED", ("opentelemetry.no_such.part",))
    check_tracing(SETTINGS, {})
    command = re.escape(f"{sys.executable} -m pip install 'stellarbyte[otel]'")
    with pytest.raises(SettingsError, match=rf"^{ENDPOINT}: .* {command}$"):
        check_tracing(SETTINGS, {ENDPOINT: "http://127.0.0.1:4318"})
    with pytest.raises(SettingsError, match=r"^--otlp-endpoint: "):
        check_tracing(parse_settings(["--otlp-endpoint", "http://127.0.0.1:4318"], {}), {})


def test_a_protocol_that_is_not_spoken_is_refused() -> None:
    with pytest.raises(SettingsError, match="'grpc' is not supported"):
        check_tracing(SETTINGS, {ENDPOINT: "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


def test_no_opentelemetry_is_imported_when_traces_are_off_but_what_fastapi_itself_needs() -> None:
    code = (
        "import sys, stellarbyte_server.__main__, stellarbyte_server.http.serving, stellarbyte_server.http.worker\n"
        "from stellarbyte_server.config.command_line import parse_settings\n"
        "from stellarbyte_server.observe.tracing import make_tracing\n"
        "assert make_tracing(parse_settings([], {}), {}) is None\n"
        "assert not [name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def spans_of(scope: dict, status: int | None, record: RequestRecord) -> list:
    pytest.importorskip("opentelemetry.sdk", reason="pip install '.[otel]'")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), tracing.make_provider({})
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.Tracing(provider, "m").note(scope, ROUTES, status, record)
    return list(exporter.get_finished_spans())


def scope_of(path: str = "/v1/chat/completions", method: str = "POST", **headers: str) -> dict:
    raw = [(name.encode(), text.encode()) for name, text in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": raw}


def a_record(finish_reason: str = "stop") -> RequestRecord:
    now_s = time.monotonic()
    times = {"sent_s": now_s - 0.9, "started_s": now_s - 0.5, "first_token_s": now_s - 0.3}
    stream = SimpleNamespace(**times, finish_reason=finish_reason)
    return RequestRecord(request_id="r-1", arrived_s=now_s - 1, tokens=TokenCount(7, 5), streams=[stream])


def test_a_span_has_the_times_of_its_request_and_continues_the_clients_trace() -> None:
    assert not spans_of(scope_of("/health", "GET"), 200, a_record())  # imports the SDK, which takes its time
    (span,) = spans_of(scope_of(traceparent=f"00-{TRACE}-{PARENT}-01"), 200, a_record())
    assert span.name == "POST /v1/chat/completions" and span.status.is_unset
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.resource.attributes["service.name"] == "stellarbyte"
    since = {event.name: (event.timestamp - span.start_time) / 1e9 for event in span.events}
    assert list(since) == ["queued", "started", "first token", "end"]
    *times_s, end_s = since.values()
    assert times_s == pytest.approx([0.1, 0.5, 0.7], abs=0.001) and end_s >= 1.0
    assert abs(span.end_time - time.time_ns()) < 5e9
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.response.model": "m",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("stop",),
        "stellarbyte.request_id": "r-1",
    }


@pytest.mark.parametrize("header", ["", "garbage", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"])
def test_without_a_good_parent_a_trace_of_its_own_begins(header: str) -> None:
    (span,) = spans_of(scope_of(traceparent=header), 200, a_record())
    assert span.parent is None


def test_a_client_that_does_not_want_to_be_traced_is_not() -> None:
    assert spans_of(scope_of(traceparent=f"00-{TRACE}-{PARENT}-00"), 200, a_record()) == []


@pytest.mark.parametrize(
    ("status", "finish_reason"), [(500, "stop"), (None, "stop"), (200, "abort"), (200, "error"), (200, "error,stop")]
)
def test_what_went_wrong_is_an_error(status: int | None, finish_reason: str) -> None:
    (span,) = spans_of(scope_of(), status, a_record(finish_reason))
    assert not span.status.is_ok and not span.status.is_unset


def test_probes_have_no_spans_and_a_path_is_shown_as_the_table_of_routes_has_it() -> None:
    assert spans_of(scope_of("/metrics", "GET"), 200, RequestRecord(request_id="r")) == []
    (span,) = spans_of(scope_of("/v1/models/secret", "GET"), 404, RequestRecord(request_id="r"))
    assert span.name == "GET /v1/models/{name:path}"
    (span,) = spans_of(scope_of("/secret", "GET"), 404, RequestRecord(request_id="r"))
    assert span.name == "GET" and "secret" not in str(span.attributes)
