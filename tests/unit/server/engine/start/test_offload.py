"""What the tiers below the cache refuse at the start, and of what their blocks' identity consists."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.config import ByteModelConfig
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.offload.block_file import HEADER_BYTES
from stellarbyte_server.engine.start.offload import CacheOrigin, make_offload
from stellarbyte_server.engine.start.serving_plan import ServingPlan, StartupError, plan_serving
from tests.support.models.byte_transformer import make_model

CONFIG = make_model().config
ORIGIN = CacheOrigin(
    weights_hash="w", quantization="none", dtype=torch.float32, device="cpu", processor="AVX2", deterministic=False
)
OTHER_ANGLES = {"rope_type": "default", "rope_theta": 123.0}


def serving(config: ByteModelConfig = CONFIG, **settings: Any) -> tuple[ServingPlan, PagedKVCache]:
    plan = plan_serving(config, EngineSettings(model="m", **settings), torch.float32, 16, 2**22)
    return plan, PagedKVCache(plan.config, 4, plan.cache.layout.block_size, torch.float32, torch.device("cpu"))


def refusal(**settings: Any) -> str:
    with pytest.raises(StartupError) as refused:
        make_offload(EngineSettings(model="m", **settings), ORIGIN, *serving())
    return str(refused.value)


def test_there_are_no_tiers_without_flags() -> None:
    assert make_offload(EngineSettings(model="m"), ORIGIN, *serving()) is None


def test_bounds_below_one_block_are_refused(tmp_path: Path) -> None:
    block = PagedKVCache.bytes_per_token(CONFIG, torch.float32) * 16
    assert refusal(kv_offload_memory=block - 1) == (
        f"--kv-offload-memory: {block - 1} bytes are less than one block of {block}."
    )
    file = block + HEADER_BYTES
    assert refusal(kv_offload_dir=str(tmp_path), kv_offload_bytes=file - 1) == (
        f"--kv-offload-bytes: {file - 1} bytes are less than one block's file of {file}."
    )
    offload = make_offload(
        EngineSettings(model="m", kv_offload_memory=block, kv_offload_dir=str(tmp_path), kv_offload_bytes=file),
        ORIGIN, *serving(),
    )  # fmt: skip
    assert offload is not None
    offload.close()


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "folder"
    assert refusal(kv_offload_dir=str(path), kv_offload_bytes=2**30) == (
        f"--kv-offload-dir {path}: cannot be used: Not a directory."
    )


@pytest.mark.parametrize(
    "change",
    [
        {"weights_hash": "other"},
        {"quantization": "int8"},
        {"dtype": torch.bfloat16},
        {"device": "cuda"},
        {"processor": "AVX512"},
        {"deterministic": True},
    ],
)
def test_another_origin_is_another_identity(change: dict[str, Any]) -> None:
    identity = ORIGIN.identity(*serving())
    assert len(identity) == 32 and identity == ORIGIN.identity(*serving())
    assert dataclasses.replace(ORIGIN, **change).identity(*serving()) != identity


def test_another_way_to_serve_is_another_identity() -> None:
    """Every field of the config counts; of the settings those that keys and values depend on."""
    others = [
        serving(max_model_len=48), serving(sliding_window=24), serving(sink_tokens=2), serving(block_size=8),
        serving(ByteModelConfig.from_dict(CONFIG.to_dict() | {"rope_parameters": OTHER_ANGLES})),
        serving(ByteModelConfig.from_dict(CONFIG.to_dict() | {"rms_norm_eps": 1e-3})),
        serving(make_model(use_xpos=not CONFIG.use_xpos).config),
    ]  # fmt: skip
    identities = [ORIGIN.identity(*each) for each in (serving(), *others)]
    plan, cache = serving()
    half = PagedKVCache(plan.config, 4, cache.block_size, torch.bfloat16, torch.device("cpu"))
    identities.append(ORIGIN.identity(plan, half))
    assert len(set(identities)) == len(identities)
    assert ORIGIN.identity(plan, cache) == identities[0]
