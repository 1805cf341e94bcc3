"""Parse settings from flags and environment variables; a flag overrides its variable."""

import argparse
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from stellarbyte_server.config.setting_values import SettingsError, is_loopback, switch
from stellarbyte_server.config.settings import DEMO_MODEL, TUNED_PREFIX, TUNING_FOLDER, EngineSettings, ServerSettings

OTHER_VARIABLES = {"STELLARBYTE_CACHE", "STELLARBYTE_URL"}  # of the cache folder and of clients
# Kubernetes sets these variables for a Service with such a name.
_SERVICE_LINK = re.compile(r"STELLARBYTE_([A-Z0-9_]+_)?(SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)|PORT(_\d+_.*)?)")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (--help lists the flags)")


GROUPS: tuple[tuple[str, type], ...] = (("model and engine", EngineSettings), ("server", ServerSettings))


def options(settings_class: type) -> Iterator[dataclasses.Field[Any]]:
    """The fields made by `option`, which are flags."""
    return (field for field in dataclasses.fields(settings_class) if "parse" in field.metadata)


def flag_of(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def off_flag_of(field: dataclasses.Field[Any]) -> str | None:
    """The flag that turns a switch off; None for other fields."""
    return flag_of(field).replace("--", "--no-", 1) if field.metadata["parse"] is switch else None


def variable_of(field: dataclasses.Field[Any]) -> str:
    return f"STELLARBYTE_{field.name.upper()}"


def help_of(field: dataclasses.Field[Any]) -> str:
    """The help text of a flag, with its default."""
    text: str = field.metadata["help"]
    default = DEMO_MODEL if field.name == "model" else field.default
    return text if default in (None, (), "") or "(default:" in text else f"{text} (default: {default})"


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stellarbyte-server",
        description="Serve a model over an OpenAI-compatible HTTP API.",
        epilog="Each flag is also an environment variable: --port is STELLARBYTE_PORT. Flags override variables.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"stellarbyte-server {version('stellarbyte')}")
    for title, settings_class in GROUPS:
        group = parser.add_argument_group(title)
        for field in options(settings_class):
            flag, off, text = flag_of(field), off_flag_of(field), help_of(field).replace("%", "%%")
            if field.metadata["many"]:
                shape = {"nargs": "+", "action": "extend", "metavar": field.metadata["metavar"]}
                group.add_argument(flag, help=text, **shape)
            elif off is None:
                group.add_argument(flag, metavar=field.metadata["metavar"], help=text)
            else:
                group.add_argument(flag, dest=field.name, action="store_const", const="true", help=text)
                group.add_argument(off, dest=field.name, action="store_const", const="false", help=f"disable {flag}")
    return parser


def _shown(others: Sequence[str], arguments: Sequence[str]) -> str:
    """Unrecognized arguments, without possible keys: the value of a misspelt flag, or half a key."""
    names = [text.partition("=")[0] for text in others if text.startswith("--")]
    if names:
        return " ".join(names)
    secret_flags = {flag_of(field) for field in options(ServerSettings) if field.metadata["is_secret"]}
    if any(argument.partition("=")[0] in secret_flags for argument in arguments):
        return f"{len(others)} without a flag"
    return " ".join(others)


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """SettingsError for an unknown STELLARBYTE_ variable: a misspelt key would leave the server open."""
    known = {variable_of(field) for _, settings_class in GROUPS for field in options(settings_class)}
    for name in sorted(environment.keys() - known - OTHER_VARIABLES):
        if name.startswith("STELLARBYTE_") and _SERVICE_LINK.fullmatch(name) is None:
            raise SettingsError(f"{name}: unknown setting (--help lists the flags)")


def _parsed(field: dataclasses.Field[Any], source: str, given: Any) -> Any:
    try:
        return field.metadata["parse"](given)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None


def _with_fine_tuning(settings: ServerSettings) -> ServerSettings:
    """The settings, with the folder from which the engine serves the results of fine-tuning."""
    if settings.fine_tuning == "off":
        if settings.fine_tuning_memory is not None:
            raise SettingsError("--fine-tuning-memory: needs --fine-tuning cpu or cuda")
        return settings
    if settings.data_dir is None:
        raise SettingsError("--fine-tuning: needs --data-dir, a folder for files, jobs and adapters")
    if settings.engine.load_format == "dummy":
        raise SettingsError("--fine-tuning: contradicts --load-format dummy, whose weights are random")
    for name, _ in settings.engine.lora_modules:
        if name.startswith(TUNED_PREFIX):
            raise SettingsError(f"--lora-modules: {name!r} begins with {TUNED_PREFIX!r}, as models of --fine-tuning do")
    folder = str(Path(settings.data_dir).absolute() / TUNING_FOLDER)
    engine = dataclasses.replace(settings.engine, tuned_adapters=folder)
    return dataclasses.replace(settings, engine=engine)


def _check_feedback(settings: ServerSettings) -> None:
    if settings.feedback and settings.data_dir is None:
        raise SettingsError("--feedback: needs --data-dir, a folder for answers and ratings")
    if settings.feedback_bytes is not None and not settings.feedback:
        raise SettingsError("--feedback-bytes: needs --feedback")


def _check_offload(engine: EngineSettings) -> None:
    """SettingsError if the flags of the tiers below the KV cache contradict others."""
    if engine.kv_offload_dir is None and engine.kv_offload_bytes is not None:
        raise SettingsError("--kv-offload-bytes: needs --kv-offload-dir")
    if engine.kv_offload_dir is not None and engine.kv_offload_bytes is None:
        raise SettingsError("--kv-offload-dir: needs --kv-offload-bytes, the maximum size of its files")
    if engine.kv_offload_memory is None and engine.kv_offload_dir is None:
        return
    flag = "--kv-offload-dir" if engine.kv_offload_memory is None else "--kv-offload-memory"
    if not engine.enable_prefix_caching:
        raise SettingsError(f"{flag}: needs --enable-prefix-caching")
    if engine.tensor_parallel_size > 1:
        raise SettingsError(f"{flag}: not with --tensor-parallel-size, whose processes have parts of each block")


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> ServerSettings:
    """Settings from command-line `arguments` and `environment`; SettingsError if one cannot be used.

    `--help` prints the help and exits, as in argparse.
    """
    _refuse_unknown_variables(environment)
    known, others = _make_parser().parse_known_args(arguments)
    if others:
        raise SettingsError(f"unrecognized arguments: {_shown(others, arguments)} (--help lists the flags)")
    given = vars(known)

    def values(settings_class: type) -> dict[str, Any]:
        found = {}
        for field in options(settings_class):
            variable = variable_of(field)
            if field.name in given:
                found[field.name] = _parsed(field, flag_of(field), given[field.name])
            elif variable in environment:
                text = environment[variable]
                found[field.name] = _parsed(field, variable, text.split() if field.metadata["many"] else text)
        return found

    engine = EngineSettings(**{"model": DEMO_MODEL, **values(EngineSettings)})
    settings = _with_fine_tuning(ServerSettings(engine=engine, **values(ServerSettings)))
    if engine.max_cpu_loras is not None and engine.max_cpu_loras <= engine.max_loras:
        raise SettingsError(
            f"--max-cpu-loras: {engine.max_cpu_loras} must be greater than --max-loras ({engine.max_loras})"
        )
    _check_feedback(settings)
    if engine.kv_events is not None and not engine.enable_prefix_caching:
        raise SettingsError("--kv-events: needs --enable-prefix-caching")
    if engine.kv_events is None and (engine.kv_events_replay is not None or engine.kv_events_topic):
        flag = "--kv-events-topic" if engine.kv_events_replay is None else "--kv-events-replay"
        raise SettingsError(f"{flag}: needs --kv-events")
    _check_offload(engine)
    if settings.context_overflow == "slide" and not settings.allow_slide:
        raise SettingsError("--no-allow-slide: contradicts --context-overflow slide")
    if settings.model_name in dict(engine.lora_modules):
        raise SettingsError(f"--lora-modules: {settings.model_name!r} is already the name of the model")
    if settings.admin_api_key is not None and settings.admin_api_key in settings.api_key:
        raise SettingsError("--admin-api-key: must differ from every --api-key")
    if settings.allow_local_admin and (settings.api_key or settings.keys or settings.admin_api_key):
        raise SettingsError("--allow-local-admin: only for servers without keys; use --admin-api-key")
    if settings.allow_local_admin and not is_loopback(settings.host):
        raise SettingsError(
            f"--allow-local-admin: --host {settings.host} is not a loopback address; use --admin-api-key"
        )
    return settings
