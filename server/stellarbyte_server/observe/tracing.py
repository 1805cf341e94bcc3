"""Optional traces by OpenTelemetry: a span for each request, sent to an endpoint that the operator names.

Off by default; OpenTelemetry's SDK is then not imported. A span contains a request's times and sizes, never its text or
key.
"""

import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from stellarbyte_server.access.paths import path_of
from stellarbyte_server.access.rules import Access, RouteTable
from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.observe.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger("server.tracing")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
_PROTOCOL = "http/protobuf"
_NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
_SHUTDOWN_LIMIT_S = 2.0  # for remaining spans, if the endpoint does not answer


def is_wanted(settings: ServerSettings, environment: Mapping[str, str]) -> bool:
    """Whether a flag or a standard variable names an endpoint, and no variable disables traces."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return False
    return settings.otlp_endpoint is not None or any(environment.get(name) for name in ENDPOINTS)


def check_tracing(settings: ServerSettings, environment: Mapping[str, str]) -> None:
    """SettingsError if traces are enabled but not possible."""
    if not is_wanted(settings, environment):
        return
    for name in _PROTOCOLS:
        if environment.get(name, _PROTOCOL) != _PROTOCOL:
            raise SettingsError(f"{name}: {environment[name]!r} is not supported; traces are sent by {_PROTOCOL}")
    if not all(map(_is_installed, _NEEDED)):
        source = "--otlp-endpoint" if settings.otlp_endpoint is not None else ENDPOINTS[0]
        command = f"{sys.executable} -m pip install 'stellarbyte[otel]'"
        raise SettingsError(f"{source}: traces need OpenTelemetry, which is not installed: {command}")


def make_tracing(settings: ServerSettings, environment: Mapping[str, str]) -> "Tracing | None":
    """Tracing by these settings, or None if off. Call `check_tracing` first."""
    if not is_wanted(settings, environment):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if settings.otlp_endpoint is None:
        exporter: SpanExporter = OTLPSpanExporter()  # configured by the standard variables
    else:
        exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint.rstrip("/") + "/v1/traces")
    provider = make_provider(environment)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, settings.model_name)


def make_provider(environment: Mapping[str, str]) -> "TracerProvider":
    """A provider for the service "stellarbyte", unless the standard variables name another."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    is_named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if is_named else {"service.name": "stellarbyte"})
    return TracerProvider(resource=resource, shutdown_on_exit=False)


class Tracing:
    """Creates a span for each completed request. A separate thread sends them."""

    def __init__(self, provider: "TracerProvider", model_name: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("stellarbyte")
        self._model_name = model_name

    def note(self, scope: Scope, routes: RouteTable, status: int | None, record: RequestRecord) -> None:
        """Record a request that has just ended. Probes and scrapes get no span."""
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind, Status, StatusCode

        path, method = path_of(scope), scope["method"]
        if routes.methods_of(path).get(method, Access.USER) is Access.OPEN:
            return
        route = routes.route_of(path)
        ended_s = time.monotonic()
        offset_ns = time.time_ns() - int(ended_s * 1e9)

        def moment(time_s: float) -> int:
            return int(time_s * 1e9) + offset_ns

        span = self._tracer.start_span(
            method if route is None else f"{method} {route}",
            context=propagate.extract(dict(Headers(scope=scope))),
            kind=SpanKind.SERVER,
            attributes={name: value for name, value in self._attributes(route, scope, status, record).items() if value},
            start_time=moment(record.arrived_s),
        )
        events = (
            ("queued", record.queued_s),
            ("started", record.started_s),
            ("first token", record.first_token_s),
            ("end", ended_s),
        )
        for name, time_s in events:
            if time_s is not None:
                span.add_event(name, timestamp=moment(time_s))
        reasons = set((record.finish_reason or "").split(","))
        if status is None or status >= 500 or reasons & {"error", "abort"}:
            span.set_status(Status(StatusCode.ERROR))
        span.end(moment(ended_s))

    def _attributes(self, route: str | None, scope: Scope, status: int | None, record: RequestRecord) -> dict[str, Any]:
        """The span's attributes, by OpenTelemetry's conventions where these exist, without empty ones."""
        tokens, finish_reason = record.tokens, record.finish_reason
        return {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": status,
            "error.type": record.error_code,
            "gen_ai.response.model": self._model_name if tokens is not None else None,
            "gen_ai.usage.input_tokens": None if tokens is None else tokens.prompt,
            "gen_ai.usage.output_tokens": None if tokens is None else tokens.completion,
            "gen_ai.response.finish_reasons": None if finish_reason is None else finish_reason.split(","),
            "stellarbyte.request_id": record.request_id,
            "stellarbyte.adapter": record.adapter,
        }

    def shutdown(self) -> None:
        """Send the remaining spans, within a time limit."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_SHUTDOWN_LIMIT_S)
        if sending.is_alive():
            logger.warning("the last spans could not be sent within %g s", _SHUTDOWN_LIMIT_S)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # also for a missing parent package
        return False
