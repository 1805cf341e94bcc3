"""Names of --adapter-dir and --lora-modules that were unloaded: their folders are available again after a load."""

from functools import partial

from stellarbyte_server.engine.adapters.folder import AdapterFolder
from stellarbyte_server.engine.adapters.memory import AdapterStore
from stellarbyte_server.engine.state.adapter_version import AdapterFiles
from stellarbyte_server.protocol.messages import Reply


class WithdrawnNames(set[str]):
    """Engine thread only."""

    def __init__(self, folder: AdapterFolder, store: AdapterStore) -> None:
        super().__init__()
        self._folder = folder
        self._store = store

    def withdraw(self, name: str) -> None:
        """Withdraw a folder, if there is one, so that only one created after the unloading is available."""
        if self._folder.may_offer(name):
            self.add(name)
            self._store.look(partial(self._folder.offered, name), partial(self._note, name))

    def _note(self, name: str, files: AdapterFiles | None) -> list[Reply]:
        if files is None and not self._folder.is_module(name):
            self.discard(name)
        return []
