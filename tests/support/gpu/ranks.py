"""A GPU engine of several ranks in threads of this process, by Triton's interpreter: rank 0 sends plans to the others.

The interpreter has one state for all threads, so the ranks take turns: one computes until it waits for the others.
"""

import queue
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from stellarbyte.backends.gpu.model import TritonModel
from stellarbyte.lora.bank import LoraBank
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.parallel.adapters import cut_adapter
from stellarbyte.parallel.gpu_ranks import GpuRanks
from stellarbyte.parallel.model import rank_language_model
from stellarbyte.parallel.shares import RankShare
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.ranks.executor import RanksExecutor
from stellarbyte_server.engine.ranks.follower import Follower
from stellarbyte_server.engine.ranks.messages import FromRank, StepFailed, ToRank
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.run.slot_executor import SlotExecutor
from stellarbyte_server.engine.start.gpu_rank import load_gpu_model
from stellarbyte_server.engine.start.model_folder import ModelFolder
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from tests.support.engines.drafting import GRAMMARS, TOKENIZER, ResidentAdapters
from tests.support.engines.ranks import Meeting, ThreadGroup, rank_weights
from tests.support.gpu.gpu_engine import make_executor, make_gpu_scheduler
from tests.support.models.adapters import NO_FILES, RandomAdapter


class TurnBarrier:
    """A barrier at which a rank gives up its turn."""

    def __init__(self, ranks: int) -> None:
        self.turn = threading.Lock()
        self._barrier = threading.Barrier(ranks, timeout=60)

    def wait(self) -> None:
        self.turn.release()
        try:
            self._barrier.wait()
        finally:
            self.turn.acquire()


class ThreadRanks:
    """What `RanksExecutor` needs of `RankProcesses`; messages are encoded, as they are between processes."""

    def __init__(self, followers: list[Follower], turn: threading.Lock) -> None:
        self._turn = turn
        self._inboxes: list[queue.SimpleQueue[bytes | None]] = [queue.SimpleQueue() for _ in followers]
        self._threads = [
            threading.Thread(target=self._follow, args=told, daemon=True)
            for told in zip(followers, self._inboxes, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, message: ToRank) -> None:
        for inbox in self._inboxes:
            inbox.put(msgspec.msgpack.encode(message))

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        self._turn.release()
        for thread in self._threads:
            thread.join(60)

    def _follow(self, follower: Follower, inbox: "queue.SimpleQueue[bytes | None]") -> None:
        while (content := inbox.get()) is not None:
            with self._turn:
                follower.take(msgspec.msgpack.decode(content, type=ToRank))


class GpuRanksEngine:
    """The calling thread is rank 0 and has the turn, until `close`. Options are those of the scheduler.

    `folder`: where the ranks read the model, as in a server; None: from memory.
    `adapters` are in slots 1, 2 ... under their names, which requests may give.
    """

    def __init__(
        self,
        model: ByteTransformer,
        ranks: int,
        adapters: Mapping[str, RandomAdapter] = MappingProxyType({}),
        quantization: str = "none",
        max_drafted: int = 0,
        folder: ModelFolder | None = None,
        **options: Any,
    ) -> None:
        config = model.config
        self.scheduler = make_gpu_scheduler(config, max_drafted, **options)
        meeting = Meeting(ranks)
        meeting.barrier = TurnBarrier(ranks)
        self.models: list[TritonModel] = []
        self.executors: list[SlotExecutor] = []
        for rank in range(ranks):
            share = RankShare(config=config, rank=rank, ranks=ranks)
            group = ThreadGroup(meeting, rank)
            bank = LoraBank(share.own_config, len(adapters), 16)
            for slot, adapter in enumerate(adapters.values(), 1):
                bank.fill(slot, cut_adapter(adapter.packed(config), share))
            if folder is not None:
                packed = load_gpu_model(folder, share, group, bank, quantization)
            else:
                own, ranked = rank_language_model(share, group, rank_weights(model, share)), GpuRanks(share, group)
                packed = TritonModel(own, share.own_config, bank, quantization=quantization, ranks=ranked)
            self.models.append(packed)
            self.executors.append(make_executor(packed, self.scheduler, max_drafted))
        self.failures: list[FromRank] = []
        followers = [Follower(executor, executor._steps.model.bank, self._note) for executor in self.executors[1:]]
        meeting.barrier.turn.acquire()
        self.others = ThreadRanks(followers, meeting.barrier.turn)
        self.runner = PlanRunner(RanksExecutor(self.executors[0], self.others))  # type: ignore[arg-type]
        self.versions = {
            name: AdapterVersion(name=name, files=NO_FILES, content_hash=name, slot=slot)
            for slot, name in enumerate(adapters, 1)
        }

    def _note(self, said: FromRank) -> None:
        self.failures.append(said)
        assert not isinstance(said, StepFailed), said.error

    def core(self, drafts: Drafts | None = None) -> EngineCore:
        """Takes requests with a vocabulary of `engine_core`."""
        resident: Any = ResidentAdapters(self.versions)
        return EngineCore(
            self.scheduler, self.runner, TOKENIZER, frozenset({256}), resident, GRAMMARS, drafts=drafts
        )  # fmt: skip

    def close(self) -> None:
        """End the other ranks; they must have had no failure."""
        self.others.close()
        assert not self.failures
