"""The HTTP application without an engine process."""

import functools
from typing import Any

from fastapi import FastAPI

from stellarbyte_server.access.keys import Keyring
from stellarbyte_server.access.rules import RouteTable, rules_of
from stellarbyte_server.api.service import Service
from stellarbyte_server.config.settings import EngineSettings, ServerSettings
from stellarbyte_server.http.app import create_app


def make_app(
    client: Any = None, info: Any = None, tokenizer: Any = None, registry: Any = None, **settings: Any
) -> FastAPI:
    """An application with those settings of the server, for routes that need no more of a service than is given."""
    service = Service(
        settings=ServerSettings(**{"engine": EngineSettings(model="m"), **settings}),
        client=client,
        info=info,
        tokenizer=tokenizer,
        sampling_defaults={},
        started_at=0,
        registry=registry,
    )
    return create_app(service, Keyring(service.settings))


@functools.cache
def route_table() -> RouteTable:
    """The routes of the server."""
    return RouteTable(rules_of(make_app()))
