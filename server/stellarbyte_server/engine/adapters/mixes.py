"""Mixes of adapters: versions that are made of others, under no name of their own.

A mix is made for the first request that names it, takes a slot and memory as an adapter does, and is evicted like one.
Requests are bound to it and to its parts, so a part that is replaced or unloaded drains until they have ended. A mix
that has no memory and no requests left is forgotten.
"""

from stellarbyte_server.engine.state.adapter_version import AdapterVersion

Parts = tuple[tuple[AdapterVersion, float], ...]  # versions and their scales


class AdapterMixes:
    """Engine thread only."""

    def __init__(self) -> None:
        self._by_parts: dict[Parts, AdapterVersion] = {}

    def version(self, name: str, parts: Parts) -> AdapterVersion:
        """The mix of these parts, made if there is none that could be used."""
        version = self._by_parts.get(parts)
        if version is None or version.state in ("failed", "draining"):
            self._by_parts = {key: mix for key, mix in self._by_parts.items() if _is_used(mix)}
            version = self._by_parts[parts] = AdapterVersion(name=name, files=None, parts=parts)
        return version

    def of(self, part: AdapterVersion) -> list[AdapterVersion]:
        """The mixes of which a version is a part."""
        return [mix for mix in self._by_parts.values() if part in mix.of_files]

    def take(self, part: AdapterVersion) -> list[AdapterVersion]:
        """The same, which no request can name any more."""
        taken = self.of(part)
        self._by_parts = {key: mix for key, mix in self._by_parts.items() if mix not in taken}
        return taken


def _is_used(mix: AdapterVersion) -> bool:
    return bool(mix.num_bound or mix.slot or mix.is_in_memory or mix.is_reading)
