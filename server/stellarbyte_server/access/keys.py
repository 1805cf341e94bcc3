"""API keys, and the file --keys.

Only a key's SHA-256 and its name, which may be logged, are stored.

    [alice]
    key = "…"                           # or sha256 = "…", in hexadecimal
    models = ["a-model", "an-adapter"]  # allowed values of `model`; default: all
    requests_per_minute = 60            # default, as of the next two: no limit
    tokens_per_minute = 20000           # of prompts and answers
    concurrent_streams = 4              # requests answered at the same time
    max_tokens_per_request = 4096       # default: the server's limit
    slide = false                       # allow context_overflow slide; default: true
    min_priority = 0                    # lowest allowed `priority`; default: 0
    max_priority = 100                  # highest allowed `priority`; default: 100
    fine_tune = false                   # allow fine-tuning jobs; default: true
    max_fine_tuning_jobs = 2            # unfinished ones; default: 4
    max_fine_tuning_tokens = 1000000    # of one job, in all epochs; default: no limit
    share = "team"                      # share the prefix cache with other keys of this value; default: none
"""

import asyncio
import hashlib
import hmac
import logging
import os
import re
import signal
import stat
import tomllib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import msgspec

from stellarbyte_server.config.setting_values import SettingsError, secret
from stellarbyte_server.config.settings import ServerSettings
from stellarbyte_server.protocol.adapter_reference import parse_references
from stellarbyte_server.protocol.messages import KeyLimits
from stellarbyte_server.protocol.request import MAX_PRIORITY

logger = logging.getLogger("server.keys")

ADMIN_NAME = "admin"
_OF_FLAGS = re.compile(rf"{ADMIN_NAME}|api-key-\d+", re.IGNORECASE)  # names of keys given as flags
NO_OWNER = ""  # of objects made without a key, where none is needed
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_TOKENS = "max_tokens_per_request"
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_streams")
_PRIORITIES = {"min_priority": 0, "max_priority": MAX_PRIORITY}  # bounds and their defaults
_FINE_TUNING = ("max_fine_tuning_jobs", "max_fine_tuning_tokens")
_FIELDS = (
    *("key", "sha256", "models", *_LIMITS, MOST_TOKENS, "slide", *_PRIORITIES),
    *("fine_tune", *_FINE_TUNING, "share"),
)
_MAX_LIMIT = 10**9
_MAX_FILE_BYTES = 2**22


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One key, with its owner's name and permissions."""

    name: str
    digest: str  # SHA-256 of the key, 64 hexadecimal digits
    models: tuple[str, ...] | None = None  # allowed names of the model and of adapters; None: all
    limits: KeyLimits
    share: str | None = None  # keys with the same value share the prefix cache
    min_priority: int = 0  # of its requests; lower values run first
    max_priority: int = MAX_PRIORITY
    max_tokens_per_request: int | None = None
    may_slide: bool = True
    may_fine_tune: bool = True
    max_fine_tuning_jobs: int = 4
    max_fine_tuning_tokens: int | None = None
    is_admin: bool = False

    @property
    def owner(self) -> str:
        """An id of this key for stored files and batches, which stays the same when the server is restarted.

        The names of keys given as flags depend on their order, so these ids are hashes of the keys.
        """
        if _OF_FLAGS.fullmatch(self.name) is None or self.is_admin:
            return f"name:{self.name}"
        return f"key:{_digest(self.digest)[:32]}"

    def allows(self, model: str, served_model: str, own: Collection[str] = ()) -> bool:
        """Whether a request may name `model`: the served model, an adapter, or a mix of allowed adapters.

        `own`: names of adapters that the key has made.
        """
        if self.models is None:
            return True
        if model == served_model:
            return model in self.models
        return all(each.name in self.models or each.name in own for each in parse_references(model))


class Keyring:
    """The current keys. `replace` may be called from any thread."""

    def __init__(self, settings: ServerSettings, of_file: Sequence[Key] = ()) -> None:
        """`of_file` are the keys of --keys."""
        self._of_flags = keys_of_flags(settings)
        self._keys = (*self._of_flags, *of_file)
        self.has_admin_key = settings.admin_api_key is not None
        self.has_user_keys = bool(settings.api_key) or settings.keys is not None

    def replace(self, of_file: Sequence[Key]) -> None:
        self._keys = (*self._of_flags, *of_file)

    def find(self, given: bytes) -> Key | None:
        """Look a key up in constant time: the time reveals neither matching characters nor which key it is."""
        digest = hashlib.sha256(given).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def of_owner(self, owner: str) -> Key | None:
        """The key with this `owner`; None: no key is needed. LookupError if the key no longer exists."""
        if owner == NO_OWNER and not self.has_user_keys:
            return None
        for key in self._keys:
            if key.owner == owner:
                return key
        raise LookupError("no such key")


def keys_of_flags(settings: ServerSettings) -> tuple[Key, ...]:
    names = {f"api-key-{number}": text for number, text in enumerate(settings.api_key, 1)}
    if settings.admin_api_key is not None:
        names[ADMIN_NAME] = settings.admin_api_key
    return tuple(
        Key(
            name=name,
            digest=_digest(text),
            limits=KeyLimits(key_name=name),
            min_priority=-MAX_PRIORITY if name == ADMIN_NAME else 0,
            is_admin=name == ADMIN_NAME,
        )
        for name, text in names.items()
    )


def read_keys(settings: ServerSettings) -> tuple[Key, ...]:
    """Read the file --keys, if any; SettingsError if it cannot be used."""
    if settings.keys is None:
        return ()
    try:
        with open(settings.keys, "rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                logger.warning("--keys: every user of this machine can read %s; chmod o-r it", settings.keys)
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise SettingsError(f"the file is larger than {_MAX_FILE_BYTES} bytes")
        return parse_keys(content.decode(), taken=keys_of_flags(settings))
    except OSError as error:
        raise SettingsError(f"--keys: cannot read {settings.keys}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"--keys: {settings.keys}: the file is not UTF-8") from None
    except SettingsError as error:
        raise SettingsError(f"--keys: {settings.keys}: {error}") from None


def read_keys_again(settings: ServerSettings, present: Sequence[Key]) -> tuple[Key, ...]:
    """Read the file again; if it cannot be used, log an error and return `present`."""
    try:
        keys = read_keys(settings)
    except SettingsError as error:
        logger.error("%s; keeping the previous keys", error)
        return tuple(present)
    if keys != tuple(present):
        logger.info("--keys: read %d keys from %s", len(keys), settings.keys)
    return keys


def on_hangup(settings: ServerSettings, read_again: Callable[[], None]) -> None:
    """With --keys call `read_again` on SIGHUP, and once now, as a signal may have come before the loop ran."""
    if settings.keys is not None:
        read_again()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, read_again)


def parse_keys(text: str, taken: Iterable[Key] = ()) -> tuple[Key, ...]:
    """The keys that a file's text describes; SettingsError, which never shows a key.

    Names must differ in more than case, and keys from each other and from those in `taken`.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at .*\)$", str(error))  # the text before it may contain part of a key
        raise SettingsError(f"invalid TOML {'' if place is None else place[0]}".rstrip()) from None
    names: dict[str, str] = {}  # in lower case → as in the file
    owners = {key.digest: key.name for key in taken}
    keys: list[Key] = []
    for name, table in tables.items():
        key = _key(name, table)
        if (other := names.setdefault(name.lower(), name)) != name:
            raise SettingsError(f"[{other}] and [{name}] differ only in case")
        if key.digest in owners:
            raise SettingsError(f"{owners[key.digest]!r} and {name!r} have the same key")
        owners[key.digest] = name
        keys.append(key)
    return tuple(keys)


def _key(name: str, table: Any) -> Key:
    if not isinstance(table, dict):
        # The line is not shown: it may contain a key, as a value or even as a field's name.
        raise SettingsError("every line must be in a table such as [alice], named after the key")
    if _NAME.fullmatch(name) is None:
        raise SettingsError(f"[{name[:64]!r}] must be a name of 1 to 64 letters, digits and . _ -")
    if _OF_FLAGS.fullmatch(name) is not None:  # even if not given: log lines of different keys must differ
        raise SettingsError(f"[{name}] is reserved for keys given as flags; choose another name")
    for field in table:
        if field not in _FIELDS:
            shown = f" {field!r}" if re.fullmatch(r"[a-z_]{1,40}", field) else ""  # otherwise it may be a misplaced key
            raise SettingsError(f"[{name}] has an unknown field{shown}; known fields are {', '.join(_FIELDS)}")
    limits = {field: _limit(name, field, table[field]) for field in _LIMITS if field in table}
    fine_tuning: dict[str, Any] = {field: _limit(name, field, table[field]) for field in _FINE_TUNING if field in table}
    lowest, highest = _priorities(name, table)
    return Key(
        name=name,
        digest=_digest_of(name, table),
        models=_models(name, table["models"]) if "models" in table else None,
        limits=KeyLimits(key_name=name, **limits),
        min_priority=lowest,
        max_priority=highest,
        max_tokens_per_request=_limit(name, MOST_TOKENS, table[MOST_TOKENS]) if MOST_TOKENS in table else None,
        may_slide=_switch(name, "slide", table.get("slide", True)),
        may_fine_tune=_switch(name, "fine_tune", table.get("fine_tune", True)),
        **fine_tuning,
        share=_share(name, table["share"]) if "share" in table else None,
    )


def _digest_of(name: str, table: dict[str, Any]) -> str:
    if ("key" in table) == ("sha256" in table):
        raise SettingsError(f"[{name}] must have either 'key' or 'sha256'")
    if "sha256" in table:
        digest = table["sha256"]
        if not isinstance(digest, str) or re.fullmatch(r"[0-9A-Fa-f]{64}", digest) is None:
            raise SettingsError(f"[{name}] sha256 must be a string of 64 hexadecimal digits")
        return digest.lower()
    if not isinstance(table["key"], str):
        raise SettingsError(f"[{name}] key must be a string")
    try:
        return _digest(secret(table["key"]))
    except SettingsError as error:
        raise SettingsError(f"[{name}] key: {error}") from None


def _models(name: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(model, str) and model for model in given):
        raise SettingsError(f"[{name}] models must be a list of names")
    if len(set(given)) < len(given):
        raise SettingsError(f"[{name}] models contains a duplicate name")
    return tuple(given)


def _priorities(name: str, table: dict[str, Any]) -> tuple[int, int]:
    lowest, highest = (table.get(field, default) for field, default in _PRIORITIES.items())
    for field, value in zip(_PRIORITIES, (lowest, highest), strict=True):
        if type(value) is not int or abs(value) > MAX_PRIORITY:
            raise SettingsError(f"[{name}] {field} must be an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    if lowest > highest:
        raise SettingsError(f"[{name}] min_priority must be ≤ max_priority")
    return lowest, highest


def _share(name: str, given: Any) -> str:
    if not isinstance(given, str) or _NAME.fullmatch(given) is None:
        raise SettingsError(f"[{name}] share must be a name of 1 to 64 letters, digits and . _ -")
    return given


def _limit(name: str, field: str, given: Any) -> int:
    if type(given) is not int or not 1 <= given <= _MAX_LIMIT:
        raise SettingsError(f"[{name}] {field} must be an integer from 1 to {_MAX_LIMIT}")
    return given


def _switch(name: str, field: str, given: Any) -> bool:
    if type(given) is not bool:
        raise SettingsError(f"[{name}] {field} must be true or false")
    return given


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
