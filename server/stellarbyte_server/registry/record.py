"""The record of an adapter's name: its versions, the current one, and how its callers are split. Plain data."""

import math
from collections.abc import Mapping

import msgspec

from stellarbyte_server.protocol.adapter_reference import MIN_PIN_DIGITS
from stellarbyte_server.protocol.adapter_versions import AdapterProbe

SUM_TOLERANCE = 1e-6  # of shares


class VersionError(ValueError):
    """A version, or a split, that a record cannot have; str() is one sentence for the user."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One loaded content of a name. Times are Unix seconds."""

    number: int  # from 1, never used again
    content_hash: str
    folder: str  # in the folder of contents
    file_hashes: tuple[str, str]  # SHA-256 of its config and of its weights
    source: str  # as `root` in /v1/adapters
    created_at: int
    created_by: str  # the key's name; "": no key was needed
    probe: AdapterProbe | None = None
    job: str = ""  # the fine-tuning job that trained it
    rank: int = 0  # the largest of its modules; 0: of an older release
    num_bytes: int = 0  # in memory, when it was loaded
    invocation: tuple[int, ...] = ()  # its tokens


class NameRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A name's versions, oldest first."""

    name: str
    versions: tuple[Version, ...]
    current: int  # number of a version
    shares: tuple[tuple[int, float], ...] = ()  # number of a version, share of the callers; together 1, or none
    pinned: bool = False  # the current version keeps a slot

    def version(self, number: int) -> Version:
        return next(version for version in self.versions if version.number == number)

    @property
    def live(self) -> tuple[Version, ...]:
        """The versions that requests get, the current one first."""
        numbers = dict.fromkeys((self.current, *(number for number, _ in self.shares)))
        return tuple(self.version(number) for number in numbers)

    def hashed_shares(self) -> tuple[tuple[str, float], ...]:
        """The shares by content hash."""
        return tuple((self.version(number).content_hash, share) for number, share in self.shares)

    def find(self, text: str) -> Version:
        """The version with a number, or the newest whose content hash begins with at least 8 digits; VersionError."""
        for version in reversed(self.versions):
            by_hash = len(text) >= MIN_PIN_DIGITS and version.content_hash.startswith(text)
            if by_hash or text == str(version.number):
                return version
        raise VersionError(f"The adapter {self.name!r} has no version {text!r:.100} in its history.")

    def version_before(self) -> Version | None:
        """The version before the current one."""
        return next((version for version in reversed(self.versions) if version.number < self.current), None)

    def before(self) -> Version:
        """The version before the current one; VersionError."""
        version = self.version_before()
        if version is None:
            raise VersionError(f"The adapter {self.name!r} has no version before the current one in its history.")
        return version

    def rolled_back(self, number: int) -> "NameRecord":
        return msgspec.structs.replace(self, current=number, shares=())

    def shared_with(self, version: Version | None, share: float) -> "NameRecord":
        """With a share of the callers for the current version, and the rest for another one; None: there is none.

        VersionError: the history no longer has the other version.
        """
        if version is None:
            return self
        return self.split({str(version.number): 1 - share, str(self.current): share})

    def split(self, shares: Mapping[str, float]) -> "NameRecord":
        """With these shares, by number or content hash; without any, the split ends. VersionError."""
        found: dict[int, float] = {}
        hashes: set[str] = set()
        for text, share in shares.items():
            version = self.find(text)
            if version.content_hash in hashes:
                raise VersionError(f"The split names the version {version.number} of {self.name!r} twice.")
            hashes.add(version.content_hash)
            found[version.number] = share
        if any(not (math.isfinite(share) and 0 <= share <= 1) for share in found.values()):
            raise VersionError("Every share of a split must be a number from 0 to 1.")
        if found and abs(sum(found.values()) - 1) > SUM_TOLERANCE:
            raise VersionError(f"The shares of a split must add up to 1, not {sum(found.values()):g}.")
        return msgspec.structs.replace(self, shares=tuple(found.items()))


def with_version(
    record: NameRecord | None, version: Version, name: str, history: int, *, pinned: bool = False
) -> NameRecord:
    """The record with a new current version, and at most `history` versions. Any split ends."""
    versions = (*(() if record is None else record.versions), version)
    return NameRecord(name=name, versions=versions[-history:], current=version.number, pinned=pinned)


def next_number(record: NameRecord | None) -> int:
    return 1 if record is None else record.versions[-1].number + 1
