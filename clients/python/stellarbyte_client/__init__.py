"""Client of a StellarByte server's API beyond OpenAI's: adapters, tokens, metrics, health. Uses HTTP only."""

from stellarbyte_client.answers import (
    Adapter,
    AdapterHistory,
    AdapterProbe,
    AdapterVersion,
    Health,
    LoadedAdapter,
    MetricSample,
    Model,
    Tokenized,
    UnloadedAdapter,
)
from stellarbyte_client.async_client import AsyncStellarByte
from stellarbyte_client.client import StellarByte
from stellarbyte_client.errors import ConnectionFailed, ServerError, StellarByteError, UnexpectedAnswer

__all__ = [
    "Adapter",
    "AdapterHistory",
    "AdapterProbe",
    "AdapterVersion",
    "AsyncStellarByte",
    "ConnectionFailed",
    "Health",
    "LoadedAdapter",
    "MetricSample",
    "Model",
    "ServerError",
    "StellarByte",
    "StellarByteError",
    "Tokenized",
    "UnexpectedAnswer",
    "UnloadedAdapter",
]
