"""Parsers of setting values. Each takes the text of a flag or variable and raises SettingsError."""

import ipaddress
import re
from collections.abc import Callable, Sequence
from pathlib import Path

ADAPTER_NAME_RULE = "a name of 1 to 128 letters, digits and . _ : / -, beginning with a letter or digit"
_BYTE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class SettingsError(ValueError):
    """A flag or variable cannot be used; str() is one sentence for the user."""


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A parser of integers from `minimum` to `maximum`, inclusive."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else None
        if value is None or value < minimum or (maximum is not None and value > maximum):
            limit = f"≥ {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise SettingsError(f"{text!r} must be an integer {limit}")
        return value

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise SettingsError(f"{text!r} must be one of {', '.join(choices)}")
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
        raise SettingsError(f"{text!r} must be a number > 0 and ≤ 1")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 86_400:
        raise SettingsError(f"{text!r} must be a number of seconds from 0 to 86400")
    return value


def some_seconds(text: str) -> float:
    value = seconds(text)
    if value < 0.1:
        raise SettingsError(f"{text!r} must be ≥ 0.1 seconds")
    return value


def byte_count(text: str) -> int:
    """Bytes, plain or with a unit: 500000000, 512MiB, 2GiB, 1.5GB."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", text.strip())
    unit = _BYTE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise SettingsError(f"{text!r} must be a number of bytes, such as 500000000, 512MiB or 2GiB")
    return int(float(match[1]) * unit)


def byte_count_or_auto(text: str) -> int | None:
    return None if text == "auto" else byte_count(text)


def existing_file(text: str) -> str:
    if not Path(text).is_file():
        raise SettingsError(f"file {text!r} does not exist")
    return text


def switch(text: str) -> bool:
    """true or false, the values of a switch's variable; its flags --name and --no-name take no value."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise SettingsError(f"{text!r} must be true or false")
    return text.lower() in ("true", "1")


def window_size(text: str) -> int | None:
    return None if text == "none" else whole_number(1)(text)


def existing_folder(text: str) -> str:
    if not Path(text).is_dir():
        raise SettingsError(f"folder {text!r} does not exist")
    return text


def named_paths(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """NAME=PATH …, each name once."""
    pairs = []
    for text in texts:
        name, _, path = text.partition("=")
        if not path or not is_adapter_name(name):
            raise SettingsError(f"{text!r} must be NAME=PATH with {ADAPTER_NAME_RULE}")
        pairs.append((name, path))
    if len(dict(pairs)) < len(pairs):
        raise SettingsError("duplicate name")
    return tuple(pairs)


def is_adapter_name(text: str) -> bool:
    """Whether a name is valid for an adapter, in URLs, logs and metrics. @ precedes a version."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", text) is not None


def secret(text: str) -> str:
    """A key that a header can carry. Errors do not show it."""
    if re.fullmatch(r"[!-~]{1,1024}", text) is None:
        raise SettingsError("a key must be 1 to 1024 printable ASCII characters without spaces")
    return text


def secrets(texts: Sequence[str]) -> tuple[str, ...]:
    keys = tuple(map(secret, texts))
    if not keys:
        raise SettingsError("the value is empty")
    if len(set(keys)) < len(keys):
        raise SettingsError("duplicate key")
    return keys


def http_url(text: str) -> str:
    if re.fullmatch(r"https?://[A-Za-z0-9._\[\]:-]+(/[!-~]*)?", text) is None:
        raise SettingsError(f"{text!r} must be a URL such as http://127.0.0.1:4318")
    return text


def loopback_address(text: str) -> tuple[str, int]:
    """HOST:PORT with a host that only this machine can reach, such as 127.0.0.1:8001 or [::1]:8001."""
    host, _, port = text.rpartition(":")
    is_port = re.fullmatch(r"\d{1,5}", port) is not None and 1 <= int(port) <= 65535
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not is_port or (":" in host and not is_bracketed) or not is_loopback(host.strip("[]")):
        raise SettingsError(f"{text!r} must be HOST:PORT with a loopback address, such as 127.0.0.1:8001")
    return host.strip("[]"), int(port)


def tcp_address(text: str) -> str:
    """tcp://HOST:PORT as ZeroMQ binds it, HOST an IP address or *."""
    match = re.fullmatch(r"tcp://(?P<host>\*|[0-9.]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})", text)
    is_valid = match is not None and (match["host"] == "*" or is_address(match["host"].strip("[]")))
    if match is None or not is_valid or not 1 <= int(match["port"]) <= 65535:
        raise SettingsError(f"{text!r} must be tcp://HOST:PORT with an IP address or *, such as tcp://127.0.0.1:5557")
    return text


def origins(texts: Sequence[str]) -> tuple[str, ...]:
    """*, or origins as browsers send them: a scheme, a host, and a port other than the scheme's default."""
    for text in texts:
        if text != "*" and re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+", text) is None:
            raise SettingsError(f"{text!r} must be * or an origin such as https://chat.example, in lower case")
    return tuple(texts)


def host_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Host names without a port, in lower case; IPv6 addresses without brackets."""
    for text in texts:
        if re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9._-]{0,252}", text) is None:
            raise SettingsError(f"{text!r} must be a host name without a port, such as llm.example")
    return tuple(text.strip("[]").lower() for text in texts)


def path_prefix(text: str) -> str:
    if re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", text) is None:
        raise SettingsError(f"{text!r} must be a path such as /llm, without a trailing slash")
    return text


def is_address(host: str) -> bool:
    """Whether a host is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host. Names other than localhost may resolve to any address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
