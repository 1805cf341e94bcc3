"""What to serve with, decided from settings and model: windows, step sizes, how the cache's memory is divided."""

import dataclasses
import logging
from dataclasses import dataclass

import torch

from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.config import ByteModelConfig
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.schedule.shares import ShareLimits
from stellarbyte_server.engine.state.block_pool import CacheLayout

logger = logging.getLogger("server.engine")

MAX_GPU_DRAFT_TOKENS = 64  # in a step
DEFAULT_SINK_TOKENS = 4  # StreamingLLM's: what a model trained without a window needs to go on beyond its context


class StartupError(ValueError):
    """The engine cannot start with these settings; str() is one sentence for the user."""


class CacheTooSmallError(StartupError):
    """Not even one sequence at full length fits; `fitting_len` is the --max-model-len that would, None: none would."""

    def __init__(self, message: str, fitting_len: int | None, needed_bytes: int) -> None:
        super().__init__(message)
        self.fitting_len = fitting_len
        self.needed_bytes = needed_bytes


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """How much cache fits and what it holds."""

    layout: CacheLayout
    num_blocks: int
    bytes_per_block: int
    blocks_per_sequence: int  # most that one sequence of any length needs

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.layout.block_size

    @property
    def full_sequences(self) -> int:
        """Sequences of any length that have room at the same time."""
        return self.num_blocks // self.blocks_per_sequence


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What is served: the model with its windows and sinks, the longest request that does not slide, the cache."""

    config: ByteModelConfig
    max_model_len: int
    cache: CachePlan


def plan_serving(
    config: ByteModelConfig,
    settings: EngineSettings,
    dtype: torch.dtype,
    step_tokens: int,
    budget: int,
    *,
    device_type: str = "cpu",
    num_steps_ahead: int = 0,
) -> ServingPlan:
    """Serve a checkpoint's config in `budget` bytes of cache: its whole context or, if that does not fit, what does.

    A --max-model-len that is given is served as it is.

    Raises:
        StartupError: as `serving_config` and `plan_cache`.
    """

    def plan(asked: EngineSettings) -> ServingPlan:
        served, max_model_len = serving_config(config, asked)
        cache = plan_cache(
            served, asked, dtype, step_tokens, budget, device_type=device_type, num_steps_ahead=num_steps_ahead
        )
        return ServingPlan(config=served, max_model_len=max_model_len, cache=cache)

    try:
        return plan(settings)
    except CacheTooSmallError as error:
        if settings.max_model_len is not None or error.fitting_len is None:
            raise
        logger.warning(
            "the KV cache of %d bytes has no room for the model's context of %d tokens: serving --max-model-len %d;"
            " all of it needs --kv-cache-memory %d",
            budget,
            config.max_position_embeddings,
            error.fitting_len,
            error.needed_bytes,
        )
        return plan(dataclasses.replace(settings, max_model_len=error.fitting_len))


def serving_config(config: ByteModelConfig, settings: EngineSettings) -> tuple[ByteModelConfig, int]:
    """The config to serve with, and the most tokens of a request that does not slide.

    Window and sinks are those of the settings, where given. Then no layer looks back further than the context less the
    sinks: within the context that changes nothing, for sinks and window together are all of it, and beyond it a
    request can slide.

    Raises:
        StartupError: --max-model-len is beyond the model, or --sink-tokens fill the context.
    """
    changes: dict[str, object] = {}
    if settings.sliding_window != "model":
        changes |= {"sliding_window": settings.sliding_window, "layer_types": None}
    asked = ByteModelConfig.from_dict(config.to_dict() | changes)
    max_model_len = asked.max_position_embeddings if settings.max_model_len is None else settings.max_model_len
    if max_model_len > asked.max_position_embeddings and None in asked.windows:
        raise StartupError(
            f"--max-model-len {max_model_len} exceeds the model's context of {asked.max_position_embeddings} tokens."
        )
    sink_tokens = settings.sink_tokens
    if sink_tokens is None:
        trained_with_window = any(config.windows) and any(asked.windows)
        sink_tokens = config.sink_tokens if trained_with_window else min(DEFAULT_SINK_TOKENS, max_model_len - 1)
    if sink_tokens >= max_model_len:
        raise StartupError(f"--sink-tokens {sink_tokens} leaves no room in a context of {max_model_len} tokens.")
    widest = max_model_len - sink_tokens
    changes |= {"sink_tokens": sink_tokens, "full_attention_window": widest}
    if asked.sliding_window is not None:
        changes["sliding_window"] = min(asked.sliding_window, widest)
    return ByteModelConfig.from_dict(config.to_dict() | changes), max_model_len


def tokens_a_step(settings: EngineSettings, device_type: str) -> tuple[int, int | None]:
    """Most tokens computed in one step, and most of them that prompts take while other requests generate.

    A GPU takes hundreds of tokens in the time of one. On a CPU the time of a step grows with its tokens from about 16
    on, so few of a prompt's tokens may go with those of running streams, or the streams would stutter.
    """
    default, prefill_default = (128, 32) if device_type == "cpu" else (8192, None)
    step_tokens = default if settings.max_num_batched_tokens is None else settings.max_num_batched_tokens
    return step_tokens, prefill_default if settings.max_prefill_tokens is None else settings.max_prefill_tokens


def drafts_by(settings: EngineSettings, device_type: str) -> bool:
    """Whether drafts are verified: on a GPU only if asked for."""
    return settings.speculative != "off" and (device_type == "cpu" or settings.speculative == "ngram")


def share_limits(device_type: str) -> ShareLimits:
    """How steps are divided among accounts: from few tokens on, a step's time grows with them."""
    if device_type == "cpu":
        return ShareLimits(free_tokens=3, most_credit=256)
    return ShareLimits(free_tokens=32, most_credit=1024)


def block_size_of(settings: EngineSettings, device_type: str) -> int:
    """Tokens in a block. On a GPU larger ones: a query is turned once for each block that it meets."""
    default = 16 if device_type == "cpu" else 64
    return default if settings.block_size is None else settings.block_size


def concurrency_of(settings: EngineSettings, device_type: str) -> int:
    """Most requests that run at once."""
    default = 64 if device_type == "cpu" else 256
    return default if settings.max_num_seqs is None else settings.max_num_seqs


def layout_of(
    config: ByteModelConfig, settings: EngineSettings, device_type: str = "cpu", num_steps_ahead: int = 0
) -> CacheLayout:
    """The layout of the blocks, for a config made by `serving_config`."""
    window = max(window for window in config.windows if window is not None)
    block_size = block_size_of(settings, device_type)
    return CacheLayout(
        block_size=block_size, window=window, sink_tokens=config.sink_tokens, num_steps_ahead=num_steps_ahead
    )


def plan_cache(
    config: ByteModelConfig,
    settings: EngineSettings,
    dtype: torch.dtype,
    step_tokens: int,
    budget: int,
    *,
    device_type: str = "cpu",
    num_steps_ahead: int = 0,
) -> CachePlan:
    """Divide `budget` bytes into blocks, for a config made by `serving_config`.

    Raises:
        StartupError: one sequence does not fit.
    """
    layout = layout_of(config, settings, device_type, num_steps_ahead)
    block_size = layout.block_size
    bytes_per_block = PagedKVCache.bytes_per_token(config, dtype) * block_size
    per_sequence = layout.steady_blocks
    most = concurrency_of(settings, device_type) * per_sequence + layout.blocks_for(step_tokens)
    if settings.enable_prefix_caching:
        most *= 2  # as much again for what no running sequence holds
    num_blocks = min(budget // bytes_per_block, most)
    if num_blocks < per_sequence:
        beside_window = dataclasses.replace(layout, window=1).steady_blocks
        fitting = max(0, num_blocks - beside_window) * block_size
        fitting_len = fitting + layout.sink_tokens if fitting else None
        advice = "" if fitting_len is None else f" or --max-model-len {fitting_len}"
        needed = per_sequence * bytes_per_block
        raise CacheTooSmallError(
            f"The KV cache may take {budget} bytes, but one sequence at full length needs {needed}; "
            f"give --kv-cache-memory {needed}{advice}.",
            fitting_len,
            needed,
        )
    return CachePlan(
        layout=layout, num_blocks=num_blocks, bytes_per_block=bytes_per_block, blocks_per_sequence=per_sequence
    )
