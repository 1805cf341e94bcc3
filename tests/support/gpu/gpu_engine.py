"""The GPU engine for tests: real scheduler, runner, steps and kernels."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch

from stellarbyte.backends.gpu.model import TritonModel
from stellarbyte.backends.gpu.steps import Steps
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import LoraBank
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.run.runner import PlanRunner, PlanStep
from stellarbyte_server.engine.run.slot_executor import SlotExecutor
from stellarbyte_server.engine.run.slot_step import SlotStep
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.drafting import GRAMMARS, TOKENIZER, ResidentAdapters
from tests.support.engines.engine import generated, is_complete, make_request, make_scheduler
from tests.support.engines.engine_core import make_core
from tests.support.models.adapters import NO_FILES, RandomAdapter, random_adapter


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On CUDA a stream that is not the default one, which could not be captured; afterwards the one before again."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()


class GpuEngine:
    """What `engine.ModelEngine` is for the other runners; one step is in flight. Within `own_stream` only.

    `model` is copied; `config` is what to serve it with, if not its own. `device`: a CUDA device, or "cpu" for Triton's
    interpreter. `adapters` lie in slots 1, 2 ... under their names, which requests may give.
    """

    def __init__(
        self,
        model: ByteTransformer,
        device: torch.device,
        config: ByteModelConfig | None = None,
        dtype: torch.dtype = torch.float32,
        adapters: Mapping[str, RandomAdapter] = MappingProxyType({}),
        quantization: str = "none",
        is_invariant: bool = False,
        kept: Mapping[str, QuantizedMatrix] = MappingProxyType({}),
        max_drafted: int = 0,
        **options: Any,
    ) -> None:
        config = model.config if config is None else config
        self.scheduler = make_gpu_scheduler(config, max_drafted, **options)
        bank = LoraBank(config, len(adapters), 16, dtype, device)
        self.versions = {}
        for slot, (name, adapter) in enumerate(adapters.items(), 1):
            bank.fill(slot, adapter.packed(config, dtype))
            self.versions[name] = AdapterVersion(name=name, files=NO_FILES, content_hash=name, slot=slot)
        served = copy.deepcopy(model).requires_grad_(False)
        if not kept:
            served = served.to(device, dtype)
        else:  # kept matrices have no memory in the model
            served._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device, dtype))
        packed = TritonModel(served, config, bank, quantization=quantization, is_invariant=is_invariant, kept=kept)
        self.executor = make_executor(packed, self.scheduler, max_drafted)
        self.steps = self.executor._steps
        self.runner = PlanRunner(self.executor)
        self._in_flight: tuple[list[Chunk], PlanStep] | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None

    def add(self, request: GenerationRequest) -> Sequence:
        return self.scheduler.add(request, None if request.adapter is None else self.versions[request.adapter.name])

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence, whether it waits, runs or has ended."""
        if not sequence.is_over:
            self.scheduler.remove(sequence)

    def step(self, intervene: Callable[[SlotStep], None] | None = None) -> list[Chunk]:
        """Start a step, then read the one before, as `EngineCore.step` does; the chunks of the step that was started.

        `intervene` is called with it before its tokens are final.
        """
        chunks = self.scheduler.schedule()
        step = self.runner.start(chunks) if chunks else None
        self.read()
        if step is not None:
            if intervene is not None:
                assert isinstance(step.step, SlotStep)
                intervene(step.step)
            step.finish()
            self._in_flight = (chunks, step)
        return chunks

    def read(self) -> None:
        """Read the step in flight, if there is one."""
        before, self._in_flight = self._in_flight, None
        if before is not None:
            for sequence, _ in self.scheduler.apply(before[0], before[1].result().tokens):
                if is_complete(sequence):
                    self.scheduler.remove(sequence)

    def drain(self) -> None:
        while self.has_work:
            self.step()

    def generate(self, requests: list[GenerationRequest]) -> list[list[int]]:
        """The generated tokens of every request, all queued at once."""
        sequences = [self.add(request) for request in requests]
        self.drain()
        return [generated(sequence) for sequence in sequences]

    def teacher_forced(self, tokens: list[int], first: int, **fields: Any) -> torch.Tensor:
        """log p(next token) after tokens first-1, first, ..., each computed by the step that decodes that token.

        `fields` are those of the request. No other sequence may run.
        """
        sequence = self.add(make_request(tokens[:first], max_tokens=len(tokens) - first + 1, **fields))
        following = iter([*tokens[first:], 0])
        rows_V: list[torch.Tensor] = []

        @torch.inference_mode()
        def force(step: SlotStep) -> None:
            for part in step.parts:
                if part.rows:
                    rows_V.append(part.computed.logits_RV[0].double().log_softmax(dim=-1).cpu())
                    forced_R = torch.tensor([next(following)], device=part.computed.tokens_R.device)
                    self.steps.replace_tokens(part.computed, [0], forced_R)

        while self.has_work:
            self.step(force)
        assert sequence.tokens[:-1].tolist() == tokens
        return torch.stack(rows_V)

    def rehearsal(self) -> Steps:
        """Other steps of the same model and sizes, over a cache of nobody's."""
        return self.rehearsal_of(self.steps)

    @staticmethod
    def rehearsal_of(steps: Steps) -> Steps:
        cache = PagedKVCache(
            steps.model.config, 1, steps.cache.block_size, steps.cache.keys_LBSKD.dtype, steps.model.device
        )
        return Steps(
            steps.model,
            cache,
            max_rows=steps.row_counts[-1],
            max_tokens=steps.max_tokens,
            table_entries=steps.memory.tables_SE.shape[1],
            max_drafted=steps.max_drafted,
        )

    def core(self) -> EngineCore:
        """An `EngineCore` over the runner and the scheduler, for requests whose answers are more than tokens."""
        return make_core(self.runner, self.steps.model.config.vocab_size, self.scheduler)

    def check_nothing_is_left(self) -> None:
        """Every block is free, and every slot, once."""
        assert not self.has_work and self.scheduler.pool.num_used == 0
        planner = self.runner._planner
        planner.release_ended()
        assert sorted(planner._free) == list(range(1, planner._num_slots + 1))
        assert planner._num_slots <= self.scheduler.limits.max_num_seqs


def make_gpu_scheduler(config: ByteModelConfig, max_drafted: int, **options: Any) -> Scheduler:
    """For a `SlotExecutor` of a model with this config; options as of `make_scheduler`."""
    windows = [window for window in config.windows if window]
    return make_scheduler(
        window=max(windows) if len(windows) == len(config.windows) else None,
        sink_tokens=config.sink_tokens if windows else 0,
        num_steps_ahead=SlotExecutor.num_steps_ahead,
        max_draft_tokens=max_drafted,
        **options,
    )


def make_executor(model: TritonModel, scheduler: Scheduler, max_drafted: int = 0) -> SlotExecutor:
    """For plans of a scheduler. Whatever is read of the cache before it was written shows."""
    layout, limits, num_blocks = scheduler.layout, scheduler.limits, scheduler.pool.num_blocks
    cache = PagedKVCache(model.config, num_blocks + 1, layout.block_size, model.embedding_VC.dtype, model.device)
    for numbers_LBSKD in (cache.keys_LBSKD, cache.values_LBSKD):
        numbers_LBSKD[:, :num_blocks].fill_(float("nan"))
    steps = Steps(
        model,
        cache,
        max_rows=limits.max_num_seqs,
        max_tokens=limits.max_num_batched_tokens,
        table_entries=layout.peak_blocks(limits.max_model_len, limits.max_num_batched_tokens) + 1,
        max_drafted=max_drafted,
    )
    return SlotExecutor(steps, layout, limits.max_num_seqs)


def gpu_drafting_core(
    model: ByteTransformer, drafts: Drafts | None, device: torch.device, most_drafted: int = 64, **options: Any
) -> EngineCore:
    """As `drafting.drafting_core`: a core with the adapters "a" and "b". Within `own_stream` only."""
    adapters = {name: random_adapter(model.config, slot) for slot, name in enumerate(("a", "b"), 1)}
    max_drafted = 0 if drafts is None else most_drafted
    engine = GpuEngine(model, device, adapters=adapters, max_drafted=max_drafted, **options)
    assert engine.executor.takes_drafts is (drafts is not None)
    resident: Adapters = ResidentAdapters(engine.versions)  # type: ignore[assignment]
    return EngineCore(engine.scheduler, engine.runner, TOKENIZER, frozenset({256}), resident, GRAMMARS, drafts=drafts)
