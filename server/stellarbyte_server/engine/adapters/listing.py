"""The list of adapters: loaded versions and the contents of --adapter-dir, which the store's thread lists on demand."""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

from stellarbyte_server.engine.adapters import refusals
from stellarbyte_server.engine.adapters.folder import PICKLE_FILE, AdapterFolder
from stellarbyte_server.engine.adapters.memory import AdapterStore
from stellarbyte_server.engine.state.adapter_version import AdapterFiles, AdapterVersion
from stellarbyte_server.protocol.adapter_versions import AdapterLocated
from stellarbyte_server.protocol.messages import AdapterCard, AdapterList, Reply

LISTING_LASTS_S = 5.0  # every client may request the list
LISTING_PATIENCE_S = 0.5  # a call during a longer scan gets the previous result


class AdapterListing:
    """Engine thread only. `answer` creates the reply to a call that waited for a scan."""

    def __init__(
        self,
        folder: AdapterFolder,
        store: AdapterStore,
        clock: Callable[[], float],
        answer: Callable[[str], AdapterList],
    ) -> None:
        self.cards: Mapping[str, AdapterCard] = {}  # by name, in order
        self._folder = folder
        self._store = store
        self._clock = clock
        self._answer = answer
        self._listed_at_s: float | None = None
        self._began_at_s: float | None = None  # start of a running scan
        self._waiting: list[str] = []  # calls

    def reply(self, call_id: str) -> list[Reply]:
        """The answer to a call: now if the last scan is recent, otherwise after another."""
        now_s = self._clock()
        is_fresh = self._listed_at_s is not None and now_s - self._listed_at_s < LISTING_LASTS_S
        is_slow = self._began_at_s is not None and now_s - self._began_at_s > LISTING_PATIENCE_S
        if is_fresh or is_slow:
            return [self._answer(call_id)]
        self._waiting.append(call_id)
        if self._began_at_s is None:
            self._began_at_s = now_s
            self._store.look(partial(_cards_of, self._folder), self._note)
        return []

    def _note(self, cards: Mapping[str, AdapterCard] | None) -> list[Reply]:
        if cards is not None:
            self.cards = cards
        self._listed_at_s, self._began_at_s = self._clock(), None
        waiting, self._waiting = self._waiting, []
        return [self._answer(call_id) for call_id in waiting]


def _cards_of(folder: AdapterFolder) -> Mapping[str, AdapterCard]:
    """Cards of all adapters in --adapter-dir, as of versions not read yet."""
    return {
        name: card_of(AdapterVersion(name=name, files=files), 0, is_current=True)
        for name, files in folder.all_offered()
    }


def all_cards(
    current: Iterable[AdapterVersion],
    others: Iterable[AdapterVersion],
    offered: Mapping[str, AdapterCard],
    withdrawn: Collection[str],
    card: Callable[[AdapterVersion], AdapterCard],
) -> tuple[AdapterCard, ...]:
    """The cards of all versions with known files, and of the names in --adapter-dir that have none, by name.

    `current`: those that are their names' current ones.
    """
    found = [version for version in current if version.files is not None]
    cards = [card(version) for version in (*found, *others) if version.files is not None]
    hidden = {*withdrawn, *(version.name for version in found)}
    cards += [offer for name, offer in offered.items() if name not in hidden]
    return tuple(sorted(cards, key=lambda card: (card.name, not card.is_current)))


def card_of(version: AdapterVersion, num_running: int, *, is_current: bool, share: float | None = None) -> AdapterCard:
    """The API's card of a version with known files."""
    assert version.files is not None
    return AdapterCard(
        name=version.name,
        is_current=is_current,
        state=version.state,
        tier="slot" if version.slot else "cpu" if version.is_in_memory else "disk",
        content_hash=version.content_hash,
        root=version.files.shown,
        rank=version.rank,
        num_bytes=version.num_bytes,
        num_running=num_running,
        num_waiting=version.num_bound - num_running,
        num_requests=version.totals.num_requests,
        num_tokens=version.totals.num_tokens,
        error=version.error,
        pinned=version.pinned,
        invocation=version.invocation,
        share=share,
        num_version_requests=version.own_totals.num_requests,
        num_version_tokens=version.own_totals.num_tokens,
    )


def located(call_id: str, path: str, files: AdapterFiles | None) -> list[Reply]:
    """The answer to a call that asks for the files at a path."""
    if files is None:
        return [refusals.no_files(call_id, path)]
    if files.weights.name == PICKLE_FILE:
        return [refusals.is_pickle(call_id, files.shown)]
    config, weights, root = map(str, (files.config, files.weights, files.root))
    return [AdapterLocated(call_id=call_id, config=config, weights=weights, root=root, shown=files.shown)]
