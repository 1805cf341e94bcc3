"""The scheduler and the registry of adapters without a model."""

from pathlib import Path
from typing import Any

import msgspec

from stellarbyte_server.engine.adapters.folder import AdapterFolder
from stellarbyte_server.engine.adapters.listing import LISTING_LASTS_S
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.state.sequence import Sequence
from stellarbyte_server.protocol.adapter_reference import AdapterReference, mix_of, parse_references
from stellarbyte_server.protocol.adapter_versions import SetVersions, StoredAdapter
from stellarbyte_server.protocol.messages import AdapterCard, AdapterList, AdapterLoaded, LoadAdapter, Reply, Settled
from tests.support.engines.engine import make_request, make_scheduler
from tests.support.models.adapters import FakeStore


def stored(root: str) -> StoredAdapter:
    """The server's copy of an adapter of the folder."""
    return StoredAdapter(folder=f"/data/{root}", root=root)


class AdapterEngine:
    """Scheduler and registry without a model: every scheduled token is 7."""

    def __init__(self, folder: Path, num_slots: int = 2, max_in_memory: int = 4, **options: Any) -> None:
        self.now_s = 0.0
        self.store = FakeStore()
        self.adapters = Adapters(
            AdapterFolder(str(folder), {}),
            self.store,
            num_slots=num_slots,
            max_in_memory=max_in_memory,
            clock=lambda: self.now_s,
        )
        self.scheduler: Scheduler = make_scheduler(
            num_blocks=5000, adapters=self.adapters, clock=lambda: self.now_s, **options
        )
        self.replies: list[Reply] = []
        self.pins: set[str] = set()  # names, by the record

    def submit(self, adapter: str | None, max_tokens: int = 4, **fields: Any) -> Sequence:
        version = None if adapter is None else self.adapters.bind(AdapterReference.parse(adapter))
        return self.scheduler.add(make_request([1, 2, 3], max_tokens, adapter=adapter, **fields), version)

    def submit_mix(self, mix: str, *scales: float, max_tokens: int = 4) -> Sequence:
        """A request for NAME+NAME…; each adapter acts with its scale, 1 if none is given."""
        references = parse_references(mix)
        reference = mix_of(tuple(zip(references, scales or (1.0,) * len(references), strict=True)))
        request = msgspec.structs.replace(make_request([1, 2, 3], max_tokens), adapter=reference)
        return self.scheduler.add(request, self.adapters.bind(reference))

    def step(self) -> list[Sequence]:
        """One step; the sequences that were in it."""
        self.replies += self.adapters.collect()
        chunks = self.scheduler.schedule()
        for chunk in chunks:
            if chunk.sequence.adapter is not None:
                assert self.store.in_slots[chunk.sequence.adapter_slot] is chunk.sequence.adapter
        for sequence, _ in self.scheduler.apply(chunks, [[7] * chunk.samples for chunk in chunks]):
            if sequence.num_generated >= sequence.request.sampling.max_tokens:
                self.end(sequence)
        return [chunk.sequence for chunk in chunks]

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if sequence.adapter is not None:
            self.replies += self.adapters.release(sequence.adapter)

    def run(self) -> None:
        for _ in range(1000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("there is still work")

    def prepare(self, name: str, files: StoredAdapter, in_place: bool = True, **fields: Any) -> Reply:
        """Load a version beside the current one."""
        call = LoadAdapter(f"load {name}", name, files, in_place, **fields)
        return self.answer(self.adapters.load(call), call.call_id)

    def load(self, name: str, path: str, in_place: bool = False, pinned: bool | None = None) -> Reply:
        """Load an adapter of the folder as the server does: beside, then as the only version of its name."""
        pins = name in self.pins if pinned is None else pinned
        loaded = self.prepare(name, stored(path), in_place, pinned=pins)
        if not isinstance(loaded, AdapterLoaded):
            return loaded
        self.pins = self.pins | {name} if pins else self.pins - {name}
        call = SetVersions("set", name, loaded.card.content_hash, pinned=pins)
        assert isinstance(self.answer(self.adapters.set_versions(call), "set"), Settled)
        return msgspec.structs.replace(loaded, card=self.adapters._card(self.adapters._names.current[name]))

    def unload(self, name: str) -> Reply:
        self.pins = self.pins - {name}
        return self.answer(self.adapters.unload(f"unload {name}", name), f"unload {name}")

    def answer(self, replies: list[Reply], call_id: str) -> Reply:
        """The reply to a call, now or after what other threads do."""
        for _ in range(4):
            for reply in replies:
                if reply.call_id == call_id:
                    return reply
            self.replies += replies
            replies = self.adapters.collect()
        raise AssertionError("there was no answer")

    def listed(self) -> AdapterList:
        self.now_s += LISTING_LASTS_S
        listed = self.answer(self.adapters.list_all("list"), "list")
        assert isinstance(listed, AdapterList)
        return listed

    def cards(self) -> tuple[AdapterCard, ...]:
        return self.listed().cards

    def card(self, name: str, state: str = "ready") -> AdapterCard:
        (found,) = [c for c in self.cards() if c.name == name and c.state == state]
        return found
