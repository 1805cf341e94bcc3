"""One replica, as the choice of a replica sees it: its load, its adapters, the prompts that were sent to it."""

from collections.abc import Sequence

from stellarbyte_server.client.engine_client import EngineClient
from stellarbyte_server.client.replicas.key_counts import KeyCounts
from stellarbyte_server.client.replicas.prefixes import SentPrefixes
from stellarbyte_server.client.replicas.routing import ReplicaState
from stellarbyte_server.protocol.messages import AdapterResidency
from stellarbyte_server.protocol.request import GenerationRequest


class ReplicaRecord:
    """What one HTTP process knows of one replica; a `StreamWatch` of its client."""

    client: EngineClient  # set once it is made
    keys: KeyCounts

    def __init__(self, index: int) -> None:
        self.index = index
        self.is_in_step = False  # it has the adapters that the others have
        self.is_gone = False  # its process has ended, and no other follows
        self.endpoint = ""  # of its newest process
        self.endpoints: set[str] = set()  # of all its processes
        self._prefixes = SentPrefixes(0)
        self._prompt_tokens: dict[str, int] = {}  # of requests without a token yet
        self._sent_adapters: set[str] = set()  # since the engine's newest report
        self._report = AdapterResidency()

    @property
    def serves(self) -> bool:
        return self.is_in_step and self.client.health() is None

    def note_process(self, endpoint: str) -> None:
        """It has a process at this endpoint, which has no adapters yet."""
        self.is_in_step = False
        self.endpoint = endpoint
        self.endpoints.add(endpoint)

    def forget(self) -> None:
        """Its process has ended."""
        self.is_in_step = False
        self._prefixes = SentPrefixes(self.client.info.num_blocks)
        self._sent_adapters.clear()

    def state(self, prefix: Sequence[int]) -> ReplicaState:
        """The state for the choice of a request with these keys of its prompt's blocks."""
        info = self.client.info
        return ReplicaState(
            num_requests=self.client.num_requests,
            max_requests=info.max_num_seqs,
            num_waiting_tokens=sum(self._prompt_tokens.values()),
            cached_tokens=self._prefixes.num_blocks(prefix) * info.block_size,
            slots=frozenset(self.client.residency.slots),
            memory=frozenset({*self.client.residency.memory, *self._adapters_sent_lately()}),
        )

    def _adapters_sent_lately(self) -> set[str]:
        if self.client.residency is not self._report:
            self._report = self.client.residency
            self._sent_adapters.clear()
        return self._sent_adapters

    def note_sent(self, requests: Sequence[GenerationRequest], adapters: Sequence[str], prefix: Sequence[int]) -> None:
        """Note that it gets these requests, the first of which has these adapters and keys."""
        self._adapters_sent_lately().update(adapters)
        self._prefixes.note(prefix)
        self._prompt_tokens |= {request.request_id: len(request.prompt_token_ids) for request in requests}

    def forget_requests(self, requests: Sequence[GenerationRequest]) -> None:
        """Note that requests were not submitted; those that have ended already are ignored."""
        for request in requests:
            self.note_end(request.request_id, was_refused=True)

    def note_tokens(self, request_id: str, num_tokens: int) -> None:
        self._prompt_tokens.pop(request_id, None)
        self.keys.note_tokens(self.index, request_id, num_tokens)

    def note_end(self, request_id: str, *, was_refused: bool) -> None:
        self._prompt_tokens.pop(request_id, None)
        self.keys.note_end(request_id, was_refused=was_refused)
