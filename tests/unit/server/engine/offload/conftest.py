"""Engines of names with tiers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines.symbolic_cache import SymbolicRunner
from tests.support.tiers.offload_engine import NAMES, CachedNames, Engines, OffloadEngine, make_cache, make_offload


@pytest.fixture
def make_engine() -> Iterator[Engines]:
    made: list[OffloadEngine] = []

    def make(
        folder: Path | None = None, num_blocks: int = 64, block_size: int = 4, num_slots: int = 1000, **options: Any
    ) -> OffloadEngine:
        identity = options.pop("identity", b"i" * 32)
        cache = make_cache(NAMES, num_blocks, block_size)
        offload = make_offload(cache, num_slots, folder, options.pop("num_files", 1000), identity)
        slots = CachedNames(cache)
        engine = OffloadEngine(
            offload, lambda layout: SymbolicRunner(layout, slots).run, num_blocks=num_blocks, block_size=block_size,
            **options,
        )  # fmt: skip
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()
