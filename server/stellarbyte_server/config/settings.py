"""The server's settings: frozen, created once from flags and environment variables.

Every field that `option` makes is a flag (`max_model_len` is `--max-model-len`) and a variable
(`STELLARBYTE_MAX_MODEL_LEN`); the flag wins.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from stellarbyte_server.config.adapter_source import source_prefixes
from stellarbyte_server.config.setting_values import (
    byte_count,
    byte_count_or_auto,
    existing_file,
    existing_folder,
    host_names,
    http_url,
    loopback_address,
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
    tcp_address,
    whole_number,
    whole_number_or_auto,
    window_size,
)

DEMO_MODEL = "demo"
TUNING_FOLDER = "tuning"  # in --data-dir
TUNED_PREFIX = "ft:"  # of the names of fine-tuned models
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

    With `many` the flag takes several values and its variable several words; `parse` gets them as a list. A secret
    is not in the settings' repr, and errors of `parse` must not contain it.
    """
    metadata = {"parse": parse, "metavar": metavar, "help": help, "many": many, "is_secret": is_secret}
    return dataclasses.field(default=default, metadata=metadata, repr=not is_secret)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings that the engine process needs to load a model and run it.

    None: derived from the model or the machine; `EngineInfo` reports the value, and this class keeps None.
    """

    model: str = option(
        not_empty,
        "MODEL",
        "checkpoint, Hugging Face folder, GGUF file, or name on the Hugging Face Hub (ORG/NAME[@REVISION]); demo: the"
        " small model that is installed with the package",
    )
    device: str = option(one_of("auto", "cpu", "cuda"), "auto|cpu|cuda", "device that runs the model", "auto")
    replicas: int | None = option(
        whole_number_or_auto(1, 64),
        "N|auto",
        "engine processes with the same model, each on its own GPU or on a part of the CPU's cores; auto: one for each"
        " GPU",
        1,
    )  # None: auto
    tensor_parallel_size: int = option(
        whole_number(1, 64), "N", "GPUs, or processes on a CPU, that divide the model among them", 1
    )
    dtype: str = option(
        one_of("auto", "float32", "bfloat16"), "auto|float32|bfloat16", "data type of weights and KV cache", "auto"
    )
    quantization: str = option(
        one_of("none", "int8", "int4", "fp8"),
        "none|int8|int4|fp8",
        "weight quantization: int8 and int4 on any device, fp8 on a GPU",
        "none",
    )
    kv_cache_dtype: str = option(
        one_of("auto", "fp8"),
        "auto|fp8",
        "data type of the KV cache; auto: as --dtype; fp8 (GPU only): half the memory and bandwidth",
        "auto",
    )
    load_format: str = option(
        one_of("auto", "dummy"),
        "auto|dummy",
        "dummy: random weights in the shape of config.json, for benchmarks",
        "auto",
    )
    deterministic: bool = option(
        switch,
        "",
        "the same bits for a request alone, in any batch, chunked, preempted or from the cache; slower",
        False,
    )
    max_model_len: int | None = option(
        whole_number(1), "N", "maximum tokens of prompt and answer together (default: the model's context length)", None
    )
    max_num_seqs: int | None = option(
        whole_number(1), "N", "maximum requests in one batch (default: 256, on a CPU 64)", None
    )
    max_num_batched_tokens: int | None = option(
        whole_number(1), "N", "maximum tokens in one step (default: 8192, on a CPU 128)", None
    )
    max_prefill_tokens: int | None = option(
        whole_number(1),
        "N",
        "maximum prefill tokens in a step that also decodes (default: no limit, on a CPU 32)",
        None,
    )
    kv_cache_memory: int | None = option(
        byte_count_or_auto, "BYTES|auto", "memory of the KV cache, such as 2GiB (default: from the free memory)", None
    )
    gpu_memory_utilization: float = option(
        share, "SHARE", "fraction of GPU memory to use if --kv-cache-memory is auto", 0.9
    )
    block_size: int | None = option(
        whole_number(1, 1024), "N", "tokens in a KV cache block (default: 64, on a CPU 16)", None
    )
    sliding_window: int | str | None = option(
        window_size, "N|none", "sliding window of every layer in tokens (default: the model's)", "model"
    )  # "model": the checkpoint's; None: no window
    sink_tokens: int | None = option(
        whole_number(0),
        "N",
        "attention sinks: first tokens that stay visible when the context slides (default: the model's, or 4 if no"
        " layer has a window)",
        None,
    )
    enable_prefix_caching: bool = option(switch, "", "reuse the KV cache of common prefixes", True)
    kv_offload_memory: int | None = option(
        byte_count,
        "BYTES",
        "host memory of each engine for blocks of the KV cache, from which prompts that return are loaded, such as 8GiB"
        " (default: none)",
        None,
    )
    kv_offload_dir: str | None = option(
        not_empty,
        "DIR",
        "folder for blocks of the KV cache, created if missing, which outlives the server; needs --kv-offload-bytes"
        " (default: none)",
        None,
    )
    kv_offload_bytes: int | None = option(
        byte_count, "BYTES", "maximum size of all files in --kv-offload-dir, such as 100GiB", None
    )
    adapter_dir: str | None = option(
        existing_folder, "DIR", "folder of adapters; each subfolder is served by its name and loaded on first use", None
    )
    lora_modules: tuple[tuple[str, str], ...] = option(
        named_paths,
        "NAME=PATH",
        "adapters to load at startup, from any folder; the variable takes paths without spaces",
        (),
        many=True,
    )
    adapter_source: tuple[str, ...] = option(
        source_prefixes,
        "PREFIX",
        "sources on other hosts that adapters may be loaded from at run time, such as hf://ORG, hf://ORG/NAME or"
        " s3://BUCKET/PREFIX (default: none)",
        (),
        many=True,
    )
    max_loras: int = option(whole_number(1, 1000), "N", "maximum adapters in one step", 8)
    max_lora_rank: int = option(whole_number(1, 1024), "N", "maximum rank of an adapter", 64)
    max_cpu_loras: int | None = option(
        whole_number(2),
        "N",
        "maximum adapters in CPU memory, more than --max-loras (default: 4 times --max-loras)",
        None,
    )
    speculative: str | None = option(
        one_of("ngram", "off"),
        "ngram|off",
        "ngram: verify guesses of several tokens in one step, from repeated text, predictions and tokens that a grammar"
        " forces; answers are the same (default: ngram on a CPU, off on a GPU, where it has not been measured)",
        None,
    )
    kv_events: str | None = option(
        tcp_address,
        "tcp://HOST:PORT",
        "publish the changes of the prefix cache there, over ZeroMQ in vLLM's form; they contain the tokens of prompts"
        " (HOST: an IP address of this machine, or * for all)",
        None,
    )
    kv_events_replay: str | None = option(
        tcp_address, "tcp://HOST:PORT", "socket that sends the events of --kv-events again on request", None
    )
    kv_events_topic: str = option(str, "TOPIC", "topic of the messages of --kv-events (default: empty)", "")
    engine_index: int = 0  # not a flag: of an engine among several, which is added to the ports of events
    max_queued_requests: int = option(
        whole_number(0), "N", "maximum waiting requests beyond --max-num-seqs; further ones get 429", 1024
    )
    queue_timeout: float | None = option(
        seconds, "SECONDS", "maximum time in the queue before a request gets 503 (default: no limit)", None
    )

    tuned_adapters: str | None = None  # folder of the results of fine-tuning; no flag: it follows from --fine-tuning

    @property
    def serves_adapters(self) -> bool:
        """Whether adapters can be loaded."""
        sources = (self.adapter_dir, self.tuned_adapters)
        return any(source is not None for source in sources) or bool(self.lora_modules) or bool(self.adapter_source)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP process, and the engine's."""

    engine: EngineSettings
    served_model_name: str | None = option(
        not_empty, "NAME", "model name in the API (default: the name of the folder, of the file, or on the Hub)", None
    )
    host: str = option(not_empty, "HOST", "address to listen on", "127.0.0.1")
    port: int = option(whole_number(1, 65535), "PORT", "port to listen on", 8000)
    http_workers: int = option(whole_number(1, 64), "N", "HTTP processes that share the port and the engine", 1)
    context_overflow: Literal["error", "slide"] = option(
        one_of("error", "slide"),
        "error|slide",
        "requests longer than --max-model-len: error refuses them; slide evicts their oldest tokens",
        "error",
    )
    allow_slide: bool = option(
        switch,
        "",
        "allow context_overflow slide, so that answers may go on beyond the context (default: allowed)",
        True,
    )
    max_tokens_per_request: int | None = option(
        whole_number(1),
        "N",
        "maximum tokens of an answer (default: the context length; no limit with slide)",
        None,
    )
    chat_template: str | None = option(existing_file, "FILE", "Jinja chat template to use instead of the model's", None)
    reasoning_parser: Literal["auto", "none"] = option(
        one_of("auto", "none"),
        "auto|none",
        "auto: answers to chats show the model's reasoning separately, if its vocabulary or chat template has marks for"
        " it; none: as part of the text",
        "auto",
    )
    api_key: tuple[str, ...] = option(
        secrets,
        "KEY",
        "API keys; requests need one as a bearer token (prefer the variable, which other users cannot see)",
        (),
        many=True,
        is_secret=True,
    )
    admin_api_key: str | None = option(
        secret,
        "KEY",
        "key that may load and unload adapters, and everything else (prefer the variable)",
        None,
        is_secret=True,
    )
    keys: str | None = option(
        existing_file, "FILE", "TOML file of further API keys with names and limits; SIGHUP reloads it", None
    )
    allow_local_admin: bool = option(
        switch,
        "",
        "allow local programs to load and unload adapters without a key; unsafe behind a proxy or tunnel",
        False,
    )
    admin_listen: tuple[str, int] | None = option(
        loopback_address,
        "HOST:PORT",
        "second address, on loopback, where local programs may load and unload adapters without a key, over plain HTTP",
        None,
    )
    allowed_host: tuple[str, ...] = option(
        host_names,
        "NAME",
        "further host names, besides localhost and IP addresses, that are accepted without a key",
        (),
        many=True,
    )
    cors_origin: tuple[str, ...] = option(
        origins, "ORIGIN", "origins whose web pages may call the API, or * for all (CORS; default: none)", (), many=True
    )
    ssl_certfile: str | None = option(
        existing_file, "FILE", "TLS certificate in PEM; the server then speaks HTTPS only", None
    )
    ssl_keyfile: str | None = option(
        existing_file, "FILE", "private key in PEM, if it is not in the certificate's file", None
    )
    root_path: str = option(path_prefix, "PATH", "path prefix behind a proxy, such as /llm", "")
    max_body_bytes: int = option(byte_count, "BYTES", "maximum size of a request body", 2 * 2**20)
    data_dir: str | None = option(
        not_empty,
        "DIR",
        "folder for adapters loaded over HTTP, uploaded files, batches and fine-tuning jobs, created if missing"
        " (default: none, so loaded adapters are forgotten at a restart, and /v1/files and /v1/batches are off)",
        None,
    )
    adapter_history: int = option(
        whole_number(1, 1000), "N", "maximum versions of each adapter that was loaded over HTTP", 10
    )
    max_file_bytes: int = option(byte_count, "BYTES", "maximum size of an uploaded file", 200 * 2**20)
    max_stored_bytes: int = option(
        byte_count, "BYTES", "maximum size of all files of one key, including results of batches", 2 * 2**30
    )
    fine_tuning: Literal["off", "cpu", "cuda"] = option(
        one_of("off", "cpu", "cuda"),
        "off|cpu|cuda",
        "device of fine-tuning jobs (/v1/fine_tuning/jobs), which run one at a time at the lowest priority; needs"
        " --data-dir and the extra train",
        "off",
    )
    fine_tuning_memory: int | None = option(
        byte_count_or_auto,
        "BYTES|auto",
        "memory that a fine-tuning job may use; one that needs more fails (default: half of the free memory, on a GPU"
        " nine tenths)",
        None,
    )
    feedback: bool = option(
        switch,
        "",
        "keep requests and answers for a day, so that clients can rate them (/v1/feedback); needs --data-dir",
        False,
    )
    feedback_bytes: int | None = option(
        byte_count, "BYTES", "maximum size of the ratings of one key (default: 64MiB)", None
    )
    receive_timeout: float = option(
        some_seconds,
        "SECONDS",
        "time limit for a request's header, and again for its body; a quarter of it without a byte also ends them",
        60.0,
    )
    send_timeout: float = option(
        some_seconds, "SECONDS", "time after which a client that does not read its answer is disconnected", 30.0
    )
    shutdown_timeout: float = option(seconds, "SECONDS", "time for running requests to finish at shutdown", 30.0)
    restart_engine: int = option(
        whole_number(0, 1000),
        "N",
        "maximum restarts in a row of an engine process that exited or made no progress for 10 s, before the server"
        " exits",
        0,
    )
    unknown_fields: str = option(
        one_of("error", "warn"),
        "error|warn",
        "unknown or unsupported request fields: error refuses the request; warn lists them in a response header",
        "error",
    )
    otlp_endpoint: str | None = option(
        http_url,
        "URL",
        "OpenTelemetry collector for request traces, such as http://127.0.0.1:4318 (default:"
        " OTEL_EXPORTER_OTLP_ENDPOINT, else none)",
        None,
    )
    log_format: Literal["text", "json"] = option(
        one_of("text", "json"), "text|json", "format of log lines; json: one object per line", "text"
    )
    log_level: str = option(
        one_of("debug", "info", "warning", "error"), "debug|info|warning|error", "minimum level of log messages", "info"
    )

    @cached_property
    def model_name(self) -> str:
        """The model's name in the API."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.engine.model == DEMO_MODEL:
            return DEMO_MODEL_NAME
        path = Path(self.engine.model)
        name_on_hub = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(@.+)?", self.engine.model)
        if name_on_hub is not None and not path.exists():
            return name_on_hub[1]
        return path.resolve().name.removesuffix(".gguf")
