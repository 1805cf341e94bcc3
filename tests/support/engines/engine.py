"""An engine for tests: real scheduler, pool and, where wanted, model; no sockets, no tokenizer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any
from unittest import mock

import pytest
import torch

from stellarbyte import ByteModelConfig, ByteTransformer
from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.backends.torch_model import ServedModel, TorchModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.lora.bank import LoraBank, PackedAdapter
from stellarbyte.lora.mixing import mixed
from stellarbyte.sampling.sampler import RowSampling
from stellarbyte_server.engine.run.host_executor import HostExecutor
from stellarbyte_server.engine.run.runner import PlanRunner, Runner, RunningStep
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.schedule.limits import SchedulerLimits
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.schedule.shares import ShareLimits
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.block_pool import BlockPool, CacheLayout
from stellarbyte_server.engine.state.lower_tiers import LowerTiers
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.adapter_reference import AdapterReference
from stellarbyte_server.protocol.request import GenerationRequest, SamplingParams
from tests.support.models.adapters import NO_FILES, RandomAdapter

Backend = Callable[..., ServedModel]
BACKENDS = [
    pytest.param(TorchModel, id="torch"),
    pytest.param(partial(CpuModel, quantization="none", num_threads=2), id="cpu"),
]
OF_REQUEST = (
    "priority",
    "context_overflow",
    "cache_salt",
    "adapter",
    "adapter_scale",
    "follows",
    "caller",
    "pooling",
    "reasoning",
)


def make_request(
    prompt: list[int], max_tokens: int = 16, request_id: str = "r", seed: int = 0, **fields: Any
) -> GenerationRequest:
    """Greedy unless a temperature is given; `fields` are those of the request and of its sampling."""
    own = {name: fields.pop(name) for name in OF_REQUEST if name in fields}
    if isinstance(own.get("adapter"), str):
        own["adapter"] = AdapterReference.parse(own["adapter"])
    params = SamplingParams(max_tokens=max_tokens, seed=seed, **({"temperature": 0.0} | fields))
    return GenerationRequest(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=params, **own)


def make_scheduler(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    window: int | None = None,
    sink_tokens: int = 0,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 64,
    max_draft_tokens: int | None = None,
    max_prefill_tokens: int | None = None,
    max_model_len: int = 10_000,
    max_queued_requests: int = 1000,
    queue_timeout_s: float | None = None,
    num_steps_ahead: int = 0,
    free_tokens: int = 4,
    most_credit: int = 256,
    tiers: LowerTiers | None = None,
    **options: Any,
) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_draft_tokens=max_draft_tokens,
        max_prefill_tokens=max_prefill_tokens,
        max_model_len=max_model_len,
        max_queued_requests=max_queued_requests,
        queue_timeout_s=queue_timeout_s,
        shares=ShareLimits(free_tokens=free_tokens, most_credit=most_credit),
    )
    layout = CacheLayout(block_size=block_size, window=window, sink_tokens=sink_tokens, num_steps_ahead=num_steps_ahead)
    return Scheduler(limits, layout, BlockPool(num_blocks, tiers=tiers), **options)


@dataclass
class ComputedStep:
    """A step that was over when it was started."""

    computed: StepResult

    def finish(self) -> None:
        pass

    def result(self) -> StepResult:
        return self.computed


class Ahead:
    """Runs a runner that must know every token one step ahead, as a device does that keeps what it sampled last.

    The wrapped runner's `start` sees a sequence with the token that is still to be read; nobody else does.
    """

    num_steps_ahead = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._sampled: dict[Sequence, int] = {}  # in the newest step

    def recover(self, sequences: Iterable[Sequence]) -> None:
        self._runner.recover(sequences)

    def prepare(self) -> bool:
        return False

    def start(self, chunks: list[Chunk]) -> RunningStep:
        unread = [s for s, start, length, *_ in chunks if start + length > len(s.tokens)]
        for sequence in unread:
            sequence.tokens.append(max(0, self._sampled[sequence]))  # a device computes on after NO_TOKEN as well
        try:
            step = self._runner.start(chunks)
        finally:
            for sequence in unread:
                sequence.tokens.pop()
        return _StepAhead(step, [chunk.sequence for chunk in chunks], self._note)

    def _note(self, sampled: dict[Sequence, int]) -> None:
        self._sampled = sampled


@dataclass
class _StepAhead:
    step: RunningStep
    sequences: list[Sequence]
    note: Callable[[dict[Sequence, int]], None]

    def finish(self) -> None:
        self.step.finish()
        self.computed = self.step.result()
        sampled = zip(self.sequences, self.computed.tokens, strict=True)
        self.note({sequence: tokens[-1] for sequence, tokens in sampled if tokens})

    def result(self) -> StepResult:
        return self.computed


class ModelEngine:
    """Scheduler and model, stepping until every request has its tokens.

    `config` is what to serve the model with, if not its own. `adapters` lie in slots 1, 2 ... under their names, which
    requests may give.
    """

    def __init__(
        self,
        model: ByteTransformer,
        config: ByteModelConfig | None = None,
        backend: Backend = TorchModel,
        adapters: Mapping[str, RandomAdapter] = MappingProxyType({}),
        device: str = "cpu",
        num_mixes: int = 0,
        **options: Any,
    ) -> None:
        config = model.config if config is None else config
        windows = config.windows
        self.scheduler = make_scheduler(
            window=max(windows) if all(windows) else None,
            sink_tokens=config.sink_tokens if any(windows) else 0,
            **options,
        )
        pool, layout = self.scheduler.pool, self.scheduler.layout
        cache = PagedKVCache(config, pool.num_blocks, layout.block_size, torch.float32, torch.device(device))
        cache.keys_LBSKD.fill_(float("nan"))  # whatever is read before it was written shows
        cache.values_LBSKD.fill_(float("nan"))
        bank = self._bank = LoraBank(config, len(adapters) + num_mixes, 16, device=device)
        self.versions: dict[str, AdapterVersion] = {}
        for slot, (name, adapter) in enumerate(adapters.items(), 1):
            self._fill(slot, name, adapter.packed(config))
        self.executor = HostExecutor(backend(model, config, bank), cache, layout)
        self.runner = PlanRunner(self.executor)

    def _fill(self, slot: int, name: str, packed: PackedAdapter) -> None:
        self._bank.fill(slot, packed)
        self.versions[name] = AdapterVersion(name=name, files=NO_FILES, content_hash=name, slot=slot)

    def add_mix(self, name: str, parts: list[tuple[PackedAdapter, float]]) -> None:
        """Put a mix of packed adapters into the next free slot, under a name that requests may give."""
        self._fill(len(self.versions) + 1, name, mixed(parts, self._bank.config, self._bank.max_rank))

    def add(self, request: GenerationRequest) -> Sequence:
        return self.scheduler.add(request, None if request.adapter is None else self.versions[request.adapter.name])

    def teacher_forced(self, tokens: list[int], first: int, **fields: Any) -> torch.Tensor:
        """log p(next token) after tokens first-1, first, ..., each computed by the step that would sample there.

        `fields` are those of the request; what the step before it left in the cache is used.
        """
        sequence = self.add(make_request(tokens[:first], max_tokens=len(tokens) - first + 1, **fields))
        following = iter([*tokens[first:], 0])
        rows_V: list[torch.Tensor] = []

        def force(logits_RV: torch.Tensor, rows: list[RowSampling]) -> list[int]:
            assert len(rows) == 1, "no other sequence may run"
            rows_V.append(logits_RV[0].log_softmax(dim=-1))
            return [next(following)]

        with sampling_by(self.executor, force):
            while self.scheduler.has_work:
                self.step()
        assert sequence.tokens[:-1].tolist() == tokens
        return torch.stack(rows_V)

    def generate(self, requests: list[GenerationRequest]) -> list[list[int]]:
        """The generated tokens of every request, all queued at once."""
        sequences = [self.add(request) for request in requests]
        while self.scheduler.has_work:
            self.step()
        return [generated(sequence) for sequence in sequences]

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.schedule()
        step = self.runner.start(chunks)
        step.finish()
        for sequence, _ in self.scheduler.apply(chunks, step.result().tokens):
            if is_complete(sequence):
                self.scheduler.remove(sequence)
        return chunks


@contextmanager
def sampling_by(
    executor: HostExecutor, sample: Callable[[torch.Tensor, list[RowSampling]], list[int]]
) -> Iterator[None]:
    """Let another function sample for a while: it gets adjusted logits [R, V] and the rows' parameters."""
    with mock.patch.object(executor.model, "sample", sample):
        yield


def generated(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.num_prompt :].tolist()


def is_complete(sequence: Sequence) -> bool:
    return sequence.num_generated >= sequence.request.sampling.max_tokens
