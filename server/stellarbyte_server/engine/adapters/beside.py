"""Versions beside the current one of a name: loaded for NAME@HASH, and perhaps for a share of the callers.

A caller is a hash, so that the same caller always gets the same version: sha256(caller, name) as a fraction of 1 falls
into one of the shares, which lie side by side in the order of the content hashes. A larger share of the first or of the
last version takes callers from its neighbour only.
"""

import hashlib
from collections.abc import Iterable

from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.protocol.adapter_reference import AdapterReference

Shares = tuple[tuple[str, float], ...]  # content hash, share of the callers; together 1


class VersionsBeside:
    """Engine thread only."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, AdapterVersion]] = {}  # name → content hash → version
        self._shares: dict[str, Shares] = {}

    def keep(self, version: AdapterVersion) -> AdapterVersion | None:
        """Add a version with known content; returns the one that it replaces."""
        of_name = self._kept.setdefault(version.name, {})
        before = of_name.get(version.content_hash)
        of_name[version.content_hash] = version
        return None if before is version else before

    def find(self, name: str, content_hash: str) -> AdapterVersion | None:
        return self._kept.get(name, {}).get(content_hash)

    def has(self, version: AdapterVersion) -> bool:
        return self.find(version.name, version.content_hash) is version

    def select(self, current: AdapterVersion, reference: AdapterReference, caller: str) -> AdapterVersion:
        """The version for a request: the pinned one, that of its caller's share, or the current one."""
        kept = self._kept.get(current.name)
        if not kept:
            return current
        if reference.pin is not None:
            pinned = (version for version in kept.values() if reference.selects(version.content_hash))
            return next(pinned, current) if not reference.selects(current.content_hash) else current
        shares = self._shares.get(current.name)
        return current if shares is None else kept.get(share_of(shares, current.name, caller), current)

    def share(self, version: AdapterVersion) -> float | None:
        """A version's share of its name's callers; None: they are not split."""
        shares = self._shares.get(version.name)
        return None if shares is None else dict(shares).get(version.content_hash, 0.0)

    def shares(self, name: str) -> Shares:
        """By content hash, in order; (): the callers are not split."""
        return self._shares.get(name, ())

    def set(self, name: str, shares: Shares) -> list[AdapterVersion]:
        """Set the shares of a name; removes and returns the versions without one."""
        self._shares.pop(name, None)
        if shares:
            self._shares[name] = tuple(sorted(shares))
        kept = self._kept.pop(name, {})
        if stay := {content_hash: kept[content_hash] for content_hash, _ in shares if content_hash in kept}:
            self._kept[name] = stay
        return [version for version in kept.values() if version.content_hash not in stay]

    def take(self, version: AdapterVersion) -> None:
        """Remove one version, which becomes the current one."""
        self._kept.get(version.name, {}).pop(version.content_hash, None)

    def versions(self) -> Iterable[AdapterVersion]:
        return [version for of_name in self._kept.values() for version in of_name.values()]


def share_of(shares: Shares, name: str, caller: str) -> str:
    """The content hash of a caller's version."""
    digest = hashlib.sha256(f"{caller}\0{name}".encode()).digest()
    left = int.from_bytes(digest[:8], "big") / 2**64
    for content_hash, share in shares:
        left -= share
        if left < 0:
            return content_hash
    return shares[-1][0]  # the sum of the shares is 1 up to rounding
