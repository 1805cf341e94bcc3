"""Engine cores that draft on a GPU, or by Triton's interpreter."""

from typing import Any

import torch

from stellarbyte import ByteTransformer
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.drafts.drafts import Drafts
from tests.support.engines.drafting import GRAMMARS, TOKENIZER, ResidentAdapters
from tests.support.engines.gpu_engine import GpuEngine
from tests.support.models.adapters import random_adapter


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
