"""Adapters on other hosts, by names such as hf://ORG/NAME@REVISION and s3://BUCKET/PREFIX."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stellarbyte_server.config.setting_values import SettingsError

HUB, S3 = "hf", "s3"
SOURCE_RULE = (
    "hf://ORG/NAME, hf://ORG/NAME@REVISION or s3://BUCKET/PREFIX, of letters, digits and . _ = + - between the slashes"
)
_PREFIX_RULE = "hf://ORG, hf://ORG/NAME, hf://ORG/NAME@REVISION, s3://BUCKET or s3://BUCKET/PREFIX"
_SEGMENT = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._=+-]{1,128}")
_MAX_CHARACTERS = 1000  # of a whole name; a key in S3 has at most 1024


class SourceError(ValueError):
    """A text names no adapter on another host."""


@dataclass(frozen=True)
class AdapterSource:
    """The name of one adapter, or the beginning of the names of several."""

    scheme: str  # HUB or S3
    path: tuple[str, ...]
    version: str | None = None  # on the Hub a branch, tag or commit; None: the newest

    @classmethod
    def parse(cls, text: str) -> "AdapterSource":
        """The adapter that `text` names; SourceError."""
        source = cls._parse_any(text)
        is_whole = len(source.path) == 2 if source.scheme == HUB else len(source.path) >= 2
        if not is_whole:
            raise SourceError(text)
        return source

    @classmethod
    def parse_prefix(cls, text: str) -> "AdapterSource":
        """The beginning of names that `text` is; SourceError."""
        source = cls._parse_any(text)
        if source.scheme == HUB and (len(source.path) > 2 or (source.version is not None and len(source.path) < 2)):
            raise SourceError(text)
        return source

    @classmethod
    def _parse_any(cls, text: str) -> "AdapterSource":
        scheme, separator, rest = text.partition("://")
        path, at, version = rest.partition("@")
        segments = path.split("/")
        if not separator or scheme not in (HUB, S3) or (at and scheme == S3) or len(text) > _MAX_CHARACTERS:
            raise SourceError(text)
        if not all(map(_SEGMENT.fullmatch, [*segments, *(version.split("/") if at else ())])):
            raise SourceError(text)
        return cls(scheme, tuple(segments), version if at else None)

    def __str__(self) -> str:
        version = "" if self.version is None else f"@{self.version}"
        return f"{self.scheme}://{'/'.join(self.path)}{version}"

    def allows(self, source: "AdapterSource") -> bool:
        """Whether this prefix, or exactly this name if it has a version, begins the name of a source."""
        if self.version is not None:
            return self == source
        return self.scheme == source.scheme and self.path == source.path[: len(self.path)]

    def at(self, version: str) -> "AdapterSource":
        """The same adapter in one version, which never changes."""
        return replace(self, version=version)


def is_source(path: str) -> bool:
    """Whether the path of an adapter means another host."""
    return path.startswith((f"{HUB}://", f"{S3}://"))


def folder_name(source: str) -> str:
    """The name of the cached folder of a source in one version."""
    return hashlib.sha256(source.encode()).hexdigest()[:40]


def source_prefixes(texts: Sequence[str]) -> tuple[str, ...]:
    """A parser of --adapter-source."""
    for text in texts:
        try:
            AdapterSource.parse_prefix(text)
        except SourceError:
            raise SettingsError(f"{text!r} must be {_PREFIX_RULE}, without empty parts and without . and ..") from None
    return tuple(texts)
