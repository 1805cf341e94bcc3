"""`stellarbyte adapters`: lists a server's adapters as tables, loads and unloads them."""

import sys
from collections.abc import Sequence

import msgspec
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stellarbyte_client import Adapter
from stellarbyte_client.terminal.connection import Connection, refusals_explained
from stellarbyte_client.terminal.markdown import printable

_HASH_CHARACTERS = 12  # as in log lines and the fingerprint
_MIB = 2**20
_WHOLE_LINES = 10_000  # characters: more than any line has
_STATES = {"ready": "green", "loading": "yellow", "draining": "yellow", "failed": "red"}


class AdapterCommands:
    """The commands for one server; every method raises StellarByteError on failure."""

    def __init__(self, connection: Connection) -> None:
        self._client = connection.client()
        width = None if sys.stdout.isatty() else _WHOLE_LINES
        self._console = Console(width=width, highlight=False, markup=False, emoji=False)

    def list(self) -> None:
        with refusals_explained():
            adapters = self._client.adapters.list()
        self._console.print(_Overview(adapters))

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
            self._say(f"It has no weights for these targets of its configuration: {', '.join(loaded.unmatched)}.")

    def unload(self, name: str) -> None:
        with refusals_explained(is_admin=True):
            unloaded = self._client.adapters.unload(name)
        self._say(f"Unloaded {unloaded.lora_name}: {_mib(unloaded.freed_bytes)} MiB freed.")

    def watch(self, interval_s: float) -> None:
        """Show the adapters until Ctrl-C."""
        try:
            with refusals_explained(), Live(console=self._console, auto_refresh=False) as live:
                for adapters in self._client.adapters.watch(interval_s):
                    live.update(_Overview(adapters), refresh=True)
        except KeyboardInterrupt:
            return

    def _say(self, text: str) -> None:
        self._console.print(printable(text), soft_wrap=True)


class _Overview:
    """The adapters as a table. On a narrow screen without hashes, then with folded names."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self._adapters:
            yield Text("The server has no adapters.")
            return
        table = _table(self._adapters, with_hashes=True)
        wanted = console.measure(table, options=options.update(max_width=_WHOLE_LINES)).maximum
        yield table if wanted <= options.max_width else _table(self._adapters, with_hashes=False)
        for adapter in self._adapters:
            if adapter.error is not None:
                yield Text(f"{printable(adapter.id)}: {printable(adapter.error)}", style="red")


def _table(adapters: Sequence[Adapter], *, with_hashes: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("name", overflow="fold")
    for heading in ("state", "tier", *(["hash"] if with_hashes else [])):
        table.add_column(heading, no_wrap=True)
    for heading in ("rank", "MiB", "running", "requests", "tokens"):
        table.add_column(heading, no_wrap=True, justify="right")
    for adapter in adapters:
        content_hash = "" if adapter.content_hash is None else adapter.content_hash[:_HASH_CHARACTERS]
        table.add_row(
            Text(printable(adapter.id)),
            Text(adapter.state, style=_STATES[adapter.state]),
            adapter.tier,
            *([content_hash] if with_hashes else []),
            "" if adapter.rank is None else str(adapter.rank),
            _mib(adapter.bytes),
            str(adapter.running),
            str(adapter.requests),
            str(adapter.tokens),
        )
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.1f}"
