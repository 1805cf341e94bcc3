"""The server's settings: frozen, made once from flags and environment, never changed after. Knows no torch.

Every field of `EngineSettings` and `ServerSettings` but `engine` is a flag (`max_model_len` is `--max-model-len`) and a
variable (`STELLARBYTE_MAX_MODEL_LEN`); the flag wins.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from stellarbyte_server.config.setting_values import (
    byte_count,
    byte_count_or_auto,
    existing_file,
    existing_folder,
    host_names,
    http_url,
    named_paths,
    not_empty,
    one_of,
    origins,
    path_prefix,
    seconds,
    secret,
    secrets,
    share,
    some_seconds,
    switch,
    whole_number,
    window_size,
)

DEMO_MODEL = "demo"
DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"


def option(
    parse: Callable[[Any], Any],
    metavar: str,
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    many: bool = False,
    is_secret: bool = False,
) -> Any:
    """A dataclass field that is also a flag; `parse` raises SettingsError.

    With `many` the flag takes several values, and its variable several words; `parse` gets them as a list. What is
    secret is not in the settings' repr, and `parse` must not show it.
    """
    metadata = {"parse": parse, "metavar": metavar, "help": help, "many": many, "is_secret": is_secret}
    return dataclasses.field(default=default, metadata=metadata, repr=not is_secret)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the engine process needs to load a model and run it.

    None means "decide from the model or the machine"; what was decided is reported in `EngineInfo`, never written here.
    """

    model: str = option(
        not_empty, "PATH|demo", "folder of a converted model; demo: a small model that comes with the install"
    )
    device: str = option(one_of("auto", "cpu", "cuda"), "auto|cpu|cuda", "where the model runs", "auto")
    dtype: str = option(
        one_of("auto", "float32", "bfloat16"), "auto|float32|bfloat16", "number format of weights and cache", "auto"
    )
    quantization: str = option(
        one_of("none", "int8", "int4", "fp8"),
        "none|int8|int4|fp8",
        "number format of the weights: int8 anywhere, int4 on a CPU, fp8 on a GPU",
        "none",
    )
    kv_cache_dtype: str = option(
        one_of("auto", "fp8"),
        "auto|fp8",
        "number format of the cache: auto: as --dtype; fp8, on a GPU: half the memory and less to read",
        "auto",
    )
    load_format: str = option(
        one_of("auto", "dummy"),
        "auto|dummy",
        "dummy: random weights for a folder with at least a config.json, for benchmarks",
        "auto",
    )
    max_model_len: int | None = option(
        whole_number(1), "N", "most tokens of prompt and answer together (default: the model's own limit)", None
    )
    max_num_seqs: int | None = option(
        whole_number(1), "N", "most requests that run at once (default: 256, on a CPU 64)", None
    )
    max_num_batched_tokens: int | None = option(
        whole_number(1), "N", "most tokens computed in one step (default: 8192, on a CPU 128)", None
    )
    max_prefill_tokens: int | None = option(
        whole_number(1),
        "N",
        "most of them that prompts take while other requests generate (default: no limit, on a CPU 32)",
        None,
    )
    kv_cache_memory: int | None = option(
        byte_count_or_auto, "BYTES|auto", "memory for keys and values, such as 2GiB (default: by what is free)", None
    )
    gpu_memory_utilization: float = option(
        share, "SHARE", "share of the GPU's memory to use when --kv-cache-memory is auto", 0.9
    )
    block_size: int | None = option(
        whole_number(1, 1024), "N", "tokens in one block of the cache (default: 64, on a CPU 16)", None
    )
    sliding_window: int | str | None = option(
        window_size, "N|none", "tokens each layer looks back (default: as the model says)", "model"
    )  # "model": as the checkpoint says; None: no window
    sink_tokens: int | None = option(
        whole_number(0),
        "N",
        "first tokens that stay in view when the context slides (default: as the model says, or 4 if no layer has a"
        " window)",
        None,
    )
    enable_prefix_caching: bool = option(
        switch, "", "keep computed tokens for later requests that begin with the same ones", True
    )
    adapter_dir: str | None = option(
        existing_folder, "DIR", "folder whose adapter folders are offered by their names, read on first use", None
    )
    lora_modules: tuple[tuple[str, str], ...] = option(
        named_paths,
        "NAME=PATH",
        "adapters to load at the start, wherever they lie; its variable takes paths without spaces",
        (),
        many=True,
    )
    max_loras: int = option(whole_number(1, 1000), "N", "most adapters that one step can use", 8)
    max_lora_rank: int = option(whole_number(1, 1024), "N", "largest rank of an adapter", 64)
    max_cpu_loras: int | None = option(
        whole_number(2), "N", "most adapters kept in CPU memory, over --max-loras (default: 4 times --max-loras)", None
    )
    max_queued_requests: int = option(
        whole_number(0), "N", "most requests beyond --max-num-seqs; more are answered with 429", 1024
    )
    queue_timeout: float | None = option(
        seconds, "SECONDS", "most time a request waits before it is answered with 503 (default: no limit)", None
    )

    @property
    def serves_adapters(self) -> bool:
        """Whether there is a place to read adapters from."""
        return self.adapter_dir is not None or bool(self.lora_modules)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the HTTP process needs, and the engine's settings."""

    engine: EngineSettings
    served_model_name: str | None = option(
        not_empty, "NAME", "name of the model in the API (default: its folder's name)", None
    )
    host: str = option(not_empty, "HOST", "address to listen on", "127.0.0.1")
    port: int = option(whole_number(1, 65535), "PORT", "port to listen on", 8000)
    http_workers: int = option(whole_number(1, 64), "N", "HTTP processes that share the port and the engine", 1)
    context_overflow: Literal["error", "slide"] = option(
        one_of("error", "slide"),
        "error|slide",
        "requests longer than --max-model-len: refuse them, or let their oldest tokens go out of sight",
        "error",
    )
    allow_slide: bool = option(
        switch, "", "let requests slide: without it no answer goes on beyond the context (default: allowed)", True
    )
    max_tokens_per_request: int | None = option(
        whole_number(1),
        "N",
        "most tokens of one answer (default: those of the context; no limit if it slides)",
        None,
    )
    chat_template: str | None = option(existing_file, "FILE", "Jinja chat template to use instead of the model's", None)
    api_key: tuple[str, ...] = option(
        secrets,
        "KEY",
        "keys of which requests need one as a bearer token (better as the variable, which other users cannot see)",
        (),
        many=True,
        is_secret=True,
    )
    admin_api_key: str | None = option(
        secret,
        "KEY",
        "what loading and unloading adapters needs as a bearer token, good for all else, too (better as the variable)",
        None,
        is_secret=True,
    )
    keys: str | None = option(
        existing_file, "FILE", "TOML file of further keys with names and limits; SIGHUP reads it again", None
    )
    allow_local_admin: bool = option(
        switch,
        "",
        "let programs of this machine load and unload adapters without a key; not where a proxy or tunnel leads here",
        False,
    )
    allowed_host: tuple[str, ...] = option(
        host_names,
        "NAME",
        "host names that requests without a key may use to reach the server, beside localhost and IP addresses",
        (),
        many=True,
    )
    cors_origin: tuple[str, ...] = option(
        origins, "ORIGIN", "origins whose web pages may call the API, or * for all (default: none)", (), many=True
    )
    ssl_certfile: str | None = option(existing_file, "FILE", "certificate, in PEM: the server speaks HTTPS only", None)
    ssl_keyfile: str | None = option(existing_file, "FILE", "its key, in PEM, if it is not in the same file", None)
    root_path: str = option(
        path_prefix, "PATH", "what a proxy puts before all paths, and takes away again, such as /llm", ""
    )
    max_body_bytes: int = option(byte_count, "BYTES", "largest request body", 2 * 2**20)
    receive_timeout: float = option(
        some_seconds,
        "SECONDS",
        "time in which a request's header, and then its body, must come; a quarter of it without a byte is too long",
        60.0,
    )
    send_timeout: float = option(
        some_seconds, "SECONDS", "time after which a client that does not read its answer is cut off", 30.0
    )
    shutdown_timeout: float = option(seconds, "SECONDS", "time that running requests get to finish at shutdown", 30.0)
    restart_engine: int = option(
        whole_number(0, 1000),
        "N",
        "times in a row that an engine process which has ended, or made no progress for 10 s, is followed by another,"
        " before the server ends",
        0,
    )
    unknown_fields: str = option(
        one_of("error", "warn"),
        "error|warn",
        "a request field that is unknown or not supported: refuse the request, or answer and name it in a header",
        "error",
    )
    otlp_endpoint: str | None = option(
        http_url,
        "URL",
        "OpenTelemetry collector that gets a trace of each request, such as http://127.0.0.1:4318 (default: as"
        " OTEL_EXPORTER_OTLP_ENDPOINT says, else none)",
        None,
    )
    log_format: Literal["text", "json"] = option(
        one_of("text", "json"), "text|json", "log lines for people, or one JSON object a line", "text"
    )
    log_level: str = option(
        one_of("debug", "info", "warning", "error"), "debug|info|warning|error", "least important message shown", "info"
    )

    @cached_property
    def model_name(self) -> str:
        """The model's name in the API."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.engine.model == DEMO_MODEL:
            return DEMO_MODEL_NAME
        return Path(self.engine.model).resolve().name
