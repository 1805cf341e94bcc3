"""`stellarbyte adapters`: the adapters of a server as tables, and what loads and unloads them."""

import sys
from collections.abc import Sequence

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stellarbyte_client import Adapter
from stellarbyte_client.terminal.connection import Connection, refusals_explained
from stellarbyte_client.terminal.markdown import printable

_HASH_CHARACTERS = 12  # as log lines and the fingerprint have it
_MIB = 2**20
_STATES = {"ready": "green", "loading": "yellow", "draining": "yellow", "failed": "red"}


class AdapterCommands:
    """One server's adapters; every method raises StellarByteError where it fails."""

    def __init__(self, connection: Connection) -> None:
        self._client = connection.client()
        self._console = Console(highlight=False, markup=False, emoji=False)

    def list(self) -> None:
        with refusals_explained():
            adapters = self._client.adapters.list()
        self._console.print(_table(adapters))

    def list_json(self) -> None:
        with refusals_explained():
            entries = msgspec.json.encode(self._client.adapters.list())
        sys.stdout.write(msgspec.json.format(entries, indent=2).decode() + "\n")

    def load(self, name: str, path: str, *, replace: bool) -> None:
        with refusals_explained(is_admin=True):
            loaded = self._client.adapters.load(name, path, replace)
        self._say(
            f"Loaded {loaded.lora_name}: rank {loaded.rank}, {_mib(loaded.bytes)} MiB, {len(loaded.matched)} modules,"
            f" hash {loaded.content_hash[:_HASH_CHARACTERS]}."
        )
        if loaded.unmatched:
            self._say(f"It has no weights for {', '.join(loaded.unmatched)}, which its configuration names.")

    def unload(self, name: str) -> None:
        with refusals_explained(is_admin=True):
            unloaded = self._client.adapters.unload(name)
        self._say(f"Unloaded {unloaded.lora_name}: {_mib(unloaded.freed_bytes)} MiB are free again.")

    def watch(self, interval_s: float) -> None:
        """Until Ctrl-C."""
        try:
            with refusals_explained(), Live(console=self._console, auto_refresh=False) as live:
                for adapters in self._client.adapters.watch(interval_s):
                    live.update(_table(adapters), refresh=True)
        except KeyboardInterrupt:
            return

    def _say(self, text: str) -> None:
        self._console.print(printable(text), soft_wrap=True)


def _table(adapters: Sequence[Adapter]) -> RenderableType:
    if not adapters:
        return Text("The server has no adapters.")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("name", overflow="fold")
    for heading in ("state", "tier", "hash"):
        table.add_column(heading, no_wrap=True)
    for heading in ("rank", "MiB", "running", "requests", "tokens"):
        table.add_column(heading, no_wrap=True, justify="right")
    for adapter in adapters:
        table.add_row(
            Text(printable(adapter.id)),
            Text(adapter.state, style=_STATES[adapter.state]),
            adapter.tier,
            "" if adapter.content_hash is None else adapter.content_hash[:_HASH_CHARACTERS],
            "" if adapter.rank is None else str(adapter.rank),
            _mib(adapter.bytes),
            str(adapter.running),
            str(adapter.requests),
            str(adapter.tokens),
        )
    failures = [
        Text(f"{printable(adapter.id)}: {printable(adapter.error)}", style="red")
        for adapter in adapters
        if adapter.error is not None
    ]
    return Group(table, *failures)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.1f}"
