"""The server's settings: frozen, made once from flags and environment, never changed after. Knows no torch.

Every field of `EngineSettings` and `ServerSettings` but `engine` is a flag (`max_model_len` is `--max-model-len`) and a
variable (`STELLARBYTE_MAX_MODEL_LEN`); the flag wins.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

DEMO_MODEL = "demo"
DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"

ADAPTER_NAME_RULE = "a name of 1 to 128 letters, digits and . _ : / -, beginning with a letter or digit"
_BYTE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class SettingsError(ValueError):
    """A flag or variable cannot be used; str() is one sentence for the user."""


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers between `minimum` and `maximum`, both included."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else None
        if value is None or value < minimum or (maximum is not None and value > maximum):
            limit = f"of at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
            raise SettingsError(f"{text!r} is not a whole number {limit}")
        return value

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise SettingsError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def not_empty(text: str) -> str:
    if not text.strip():
        raise SettingsError("the value is empty")
    return text


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= 1:
        raise SettingsError(f"{text!r} is not a number above 0 and up to 1")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 86_400:
        raise SettingsError(f"{text!r} is not a number of seconds between 0 and 86400")
    return value


def some_seconds(text: str) -> float:
    value = seconds(text)
    if value < 0.1:
        raise SettingsError(f"{text!r} is less than 0.1 seconds")
    return value


def byte_count(text: str) -> int:
    """Bytes, plain or with a unit: 500000000, 512MiB, 2GiB, 1.5GB."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", text.strip())
    unit = _BYTE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise SettingsError(f"{text!r} is not a number of bytes (such as 500000000, 512MiB or 2GiB)")
    return int(float(match[1]) * unit)


def byte_count_or_auto(text: str) -> int | None:
    return None if text == "auto" else byte_count(text)


def existing_file(text: str) -> str:
    if not Path(text).is_file():
        raise SettingsError(f"there is no file {text!r}")
    return text


def switch(text: str) -> bool:
    """Such a field has the flags --name and --no-name and takes no value; its variable is true or false."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise SettingsError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1")


def window_size(text: str) -> int | None:
    return None if text == "none" else whole_number(1)(text)


def existing_folder(text: str) -> str:
    if not Path(text).is_dir():
        raise SettingsError(f"there is no folder {text!r}")
    return text


def named_paths(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """NAME=PATH …, every name once."""
    pairs = []
    for text in texts:
        name, _, path = text.partition("=")
        if not path or not is_adapter_name(name):
            raise SettingsError(f"{text!r} is not NAME=PATH with {ADAPTER_NAME_RULE}")
        pairs.append((name, path))
    if len(dict(pairs)) < len(pairs):
        raise SettingsError("a name is given twice")
    return tuple(pairs)


def is_adapter_name(text: str) -> bool:
    """Whether an adapter may be called so: in URLs, logs and metrics. @ stands before a version."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", text) is not None


def secret(text: str) -> str:
    """A key as a header can carry it. What is wrong is said without showing it."""
    if re.fullmatch(r"[!-~]{1,1024}", text) is None:
        raise SettingsError("a key is 1 to 1024 letters, digits and signs of ASCII, without spaces")
    return text


def secrets(texts: Sequence[str]) -> tuple[str, ...]:
    keys = tuple(map(secret, texts))
    if not keys:
        raise SettingsError("the value is empty")
    if len(set(keys)) < len(keys):
        raise SettingsError("a key is given twice")
    return keys


def http_url(text: str) -> str:
    if re.fullmatch(r"https?://[A-Za-z0-9._\[\]:-]+(/[!-~]*)?", text) is None:
        raise SettingsError(f"{text!r} is not a URL such as http://127.0.0.1:4318")
    return text


def origins(texts: Sequence[str]) -> tuple[str, ...]:
    """*, or origins as browsers send them: a scheme and a host, and a port that is not the scheme's own."""
    for text in texts:
        if text != "*" and re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+", text) is None:
            raise SettingsError(f"{text!r} is not * or an origin such as https://chat.example, in small letters")
    return tuple(texts)


def path_prefix(text: str) -> str:
    if re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", text) is None:
        raise SettingsError(f"{text!r} is not a path such as /llm, without a slash at its end")
    return text


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
        whole_number(1), "N", "most tokens computed in one step (default: 8192, on a CPU 512)", None
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
        whole_number(2), "N", "most adapters kept in CPU memory, over --max-loras (default: 4 times that)", None
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
        "what loading and unloading adapters needs as a bearer token, good for all else, too; without any key they work"
        " only while --host is this machine's loopback; behind a proxy always give one (better as the variable)",
        None,
        is_secret=True,
    )
    keys: str | None = option(
        existing_file, "FILE", "TOML file of further keys with names and limits; SIGHUP reads it again", None
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

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.engine.model == DEMO_MODEL:
            return DEMO_MODEL_NAME
        return Path(self.engine.model).resolve().name


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (--help lists the flags)")


def _options(settings_class: type) -> Iterator[dataclasses.Field[Any]]:
    return (field for field in dataclasses.fields(settings_class) if "parse" in field.metadata)


def _flag(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stellarbyte-server",
        description="Serve a model over an OpenAI-compatible HTTP API.",
        epilog="Each flag is also an environment variable: --port is STELLARBYTE_PORT. The flag wins.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for title, settings_class in (("model and engine", EngineSettings), ("server", ServerSettings)):
        group = parser.add_argument_group(title)
        for field in _options(settings_class):
            shown = DEMO_MODEL if field.name == "model" else field.default
            text = field.metadata["help"]
            if shown not in (None, (), "") and "(default:" not in text:
                text += f" (default: {shown})"
            text = text.replace("%", "%%")
            if field.metadata["many"]:
                shape = {"nargs": "+", "action": "extend", "metavar": field.metadata["metavar"]}
                group.add_argument(_flag(field), help=text, **shape)
                continue
            if field.metadata["parse"] is not switch:
                group.add_argument(_flag(field), metavar=field.metadata["metavar"], help=text)
                continue
            off = _flag(field).replace("--", "--no-", 1)
            group.add_argument(_flag(field), dest=field.name, action="store_const", const="true", help=text)
            group.add_argument(off, dest=field.name, action="store_const", const="false", help="do not")
    return parser


def _shown(others: Sequence[str], arguments: Sequence[str]) -> str:
    """Arguments that nobody asked for, without what may be a key: the value of a misspelt flag, or half a key."""
    names = [text.partition("=")[0] for text in others if text.startswith("--")]
    if names:
        return " ".join(names)
    secret_flags = {_flag(field) for field in _options(ServerSettings) if field.metadata["is_secret"]}
    if any(argument.partition("=")[0] in secret_flags for argument in arguments):
        return f"{len(others)} that follow no flag"
    return " ".join(others)


def _parsed(field: dataclasses.Field[Any], source: str, given: Any) -> Any:
    try:
        return field.metadata["parse"](given)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> ServerSettings:
    """Settings from command-line `arguments` and `environment`; SettingsError when one cannot be used.

    `--help` prints and ends the process, as argparse does.
    """
    known, others = _make_parser().parse_known_args(arguments)
    if others:
        raise SettingsError(f"unrecognized arguments: {_shown(others, arguments)} (--help lists the flags)")
    given = vars(known)

    def values(settings_class: type) -> dict[str, Any]:
        found = {}
        for field in _options(settings_class):
            variable = f"STELLARBYTE_{field.name.upper()}"
            if field.name in given:
                found[field.name] = _parsed(field, _flag(field), given[field.name])
            elif variable in environment:
                text = environment[variable]
                found[field.name] = _parsed(field, variable, text.split() if field.metadata["many"] else text)
        return found

    engine = EngineSettings(**{"model": DEMO_MODEL, **values(EngineSettings)})
    settings = ServerSettings(engine=engine, **values(ServerSettings))
    if engine.max_cpu_loras is not None and engine.max_cpu_loras <= engine.max_loras:
        raise SettingsError(
            f"--max-cpu-loras: {engine.max_cpu_loras} is not more than --max-loras ({engine.max_loras})"
        )
    if settings.model_name in dict(engine.lora_modules):
        raise SettingsError(f"--lora-modules: {settings.model_name!r} is the name of the model itself")
    if settings.admin_api_key is not None and settings.admin_api_key in settings.api_key:
        raise SettingsError("--admin-api-key: the key is one of --api-key")
    return settings
