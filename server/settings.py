"""The server's settings: frozen, made once from flags and environment, never changed after. Knows no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the engine process needs to load a model and run it.

    None means "decide from the model or the machine"; what was decided is reported in `EngineInfo`, never written here.
    """

    model: str  # folder of a ByteTransformer checkpoint
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # auto, float32, bfloat16
    max_model_len: int | None = None  # tokens of prompt and answer together; None: the model's own
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_memory: int | None = None  # bytes; None: by what is free
    gpu_memory_utilization: float = 0.9
    block_size: int = 16
    sliding_window: int | None | str = "model"  # "model": as the checkpoint says; None: no window
    sink_tokens: int | None = None  # None: as the checkpoint says
