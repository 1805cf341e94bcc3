"""A model's tokens are the same with blocks from memory or disk, for every adapter, and none come from another's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stellarbyte import ByteTransformer
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.lora.bank import LoraBank
from stellarbyte_server.engine.run.host_executor import HostExecutor
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.block_pool import CacheLayout
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from tests.support.cases import SLOW
from tests.support.engines.engine import BACKENDS, Backend, ModelEngine, generated, make_request
from tests.support.models.adapters import NO_FILES, random_adapter
from tests.support.models.byte_transformer import make_model, random_tokens
from tests.support.tiers.offload_engine import Compute, OffloadEngine, make_cache, make_offload

W = 24
TORCH, CPU = (parameters.values[0] for parameters in BACKENDS)
ADAPTERS = {name: 7 + number for number, name in enumerate("ab")}  # with the seeds of their weights


def version(name: str, content_hash: str | None = None) -> AdapterVersion:
    slot = list(ADAPTERS).index(name) + 1
    return AdapterVersion(name=name, files=NO_FILES, content_hash=content_hash or name, slot=slot)


def make_engine(model: ByteTransformer, folder: Path | None, backend: Backend, num_blocks: int = 64) -> OffloadEngine:
    config, cache = model.config, make_cache(model.config, num_blocks, 4)
    bank = LoraBank(config, len(ADAPTERS), 16)
    for slot, seed in enumerate(ADAPTERS.values(), 1):
        bank.fill(slot, random_adapter(config, seed).packed(config))
    served = backend(model, config, bank)

    def make_compute(layout: CacheLayout) -> Compute:
        runner = PlanRunner(HostExecutor(served, cache, layout))

        def compute(chunks: list[Chunk]) -> list[list[int]]:
            step = runner.start(chunks)
            step.finish()
            return step.result().tokens

        return compute

    return OffloadEngine(
        make_offload(cache, 1000, folder), make_compute, num_blocks=num_blocks,
        window=W if all(config.windows) else None, sink_tokens=config.sink_tokens if any(config.windows) else 0,
    )  # fmt: skip


def run(engine: OffloadEngine, tokens: list[int], adapter: AdapterVersion | None = None, **fields: Any) -> Sequence:
    name = None if adapter is None else adapter.name
    sequence = engine.scheduler.add(make_request(tokens, 12, adapter=name, **fields), adapter)
    engine.run()
    return sequence


@pytest.mark.parametrize(
    ("backend", "window", "use_xpos"),
    [
        (TORCH, None, False),
        (CPU, W, True),
        pytest.param(TORCH, W, True, marks=SLOW),
        pytest.param(CPU, None, False, marks=SLOW),
    ],
)
def test_tokens_are_those_without_offload(tmp_path: Path, backend: Backend, window: int | None, use_xpos: bool) -> None:
    """Greedy and seeded, in each turn of chats that return from disk, then from memory."""
    model = make_model(sliding_window=window, sink_tokens=4 if window else 0, use_xpos=use_xpos)
    cold = ModelEngine(
        model, backend=backend, num_blocks=64, prefix_caching=False,
        adapters={name: random_adapter(model.config, seed) for name, seed in ADAPTERS.items()},
    )  # fmt: skip
    ways: list[dict[str, Any]] = [
        {"adapter": None, "temperature": 0.0},
        {"adapter": None, "temperature": 0.9, "seed": 3},
        {"adapter": "a", "adapter_scale": 0.5, "temperature": 0.9, "seed": 4},
        {"adapter": "b", "temperature": 0.0},
    ]
    chats = [random_tokens(50, seed=seed) for seed in range(len(ways))]
    for turn in range(2):
        engine = make_engine(model, tmp_path, backend)
        for is_again in (False, True):
            for chat, way in zip(chats, ways, strict=True):
                fields = dict(way)
                adapter = fields.pop("adapter")
                sequence = run(engine, chat, None if adapter is None else version(adapter), **fields)
                (expected,) = cold.generate([make_request(chat, 12, adapter=adapter, **fields)])
                assert generated(sequence) == expected
                assert (sequence.num_cached >= 40) is bool(turn or is_again)
                if is_again:
                    chat += [*expected, *random_tokens(5, seed=turn)]
            engine.wait_stored()
            engine.forget_pool()
        assert engine.offload.totals.num_memory_loads and bool(engine.offload.totals.num_disk_loads) is bool(turn)
        engine.close()


def test_another_adapter_content_or_scale_finds_nothing(tmp_path: Path) -> None:
    """The wrong blocks would change no shape and raise no error."""
    model, prompt = make_model(), random_tokens(40)
    first = make_engine(model, tmp_path, TORCH)
    run(first, prompt, version("a"), adapter_scale=0.5)
    first.wait_stored()
    first.close()
    second = make_engine(model, tmp_path, TORCH)
    for other, fields in (
        (None, {}),
        (version("b"), {"adapter_scale": 0.5}),
        (version("a", "its next version"), {"adapter_scale": 0.5}),
        (version("a"), {"adapter_scale": 0.25}),
        (version("a"), {"adapter_scale": 0.5, "cache_salt": "x"}),
    ):
        assert run(second, prompt, other, **fields).num_cached == 0
    assert second.num_loads == 0
    assert run(second, prompt, version("a"), adapter_scale=0.5).num_cached == 36
    second.close()


def test_copies_keep_every_bit() -> None:
    """Of layers, heads and dtypes: a block that is read and written into another has the same bytes."""
    config = make_model().config
    for dtype in (torch.float32, torch.bfloat16):
        cache = PagedKVCache(config, 5, 4, dtype, torch.device("cpu"))
        for part in (cache.keys_LBSKD, cache.values_LBSKD):
            part.copy_(torch.randn(part.shape).to(dtype))
        before = cache.keys_LBSKD.clone(), cache.values_LBSKD.clone()
        offload = make_offload(cache, 2)
        content = torch.zeros(offload._copies.num_bytes, dtype=torch.uint8).numpy()
        offload._copies.read(3, content)
        offload._copies.write(content, 1, None)
        for part, was in zip((cache.keys_LBSKD, cache.values_LBSKD), before, strict=True):
            assert torch.equal(part[:, 1], was[:, 3])
            assert torch.equal(part[:, [0, 2, 3, 4]], was[:, [0, 2, 3, 4]])
        offload.close()
