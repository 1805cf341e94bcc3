"""The workloads of benchmarks.gpu: shapes of models, engines, workloads, and a peer's figures.

The peer's figures are notes of what vLLM 0.22.1 (torch 2.11.0+cu130) reached on another H100 80GB HBM3 before, in bf16,
with random weights and token ids, temperature 0.6, ignore_eos; there is no file of results. Those of 30b-a3b are vLLM
0.26's on an H200. Where vLLM is installed, `benchmarks.gpu` measures it.
"""

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEER = "vLLM 0.22.1, H100"
RESULT = "RESULT "  # begins a line of JSON that a program under `run_program` prints for it
MAX_MODEL_LEN = 2048
MAX_STEP_TOKENS = 8192
RANK = 16


EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder; the fields are named as in config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    qk_norm: bool
    tie_word_embeddings: bool
    rope_theta: float
    max_position_embeddings: int
    num_experts: int = 0  # of every layer; 0: an MLP of intermediate_size
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0

    def config(self, *, for_transformers: bool) -> dict[str, Any]:
        """The content of config.json: transformers' Llama, Qwen3 or Qwen3-MoE, or our own model."""
        fields = dataclasses.asdict(self) | {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
        if self.num_experts:
            fields["norm_topk_prob"] = True
        else:
            fields = {name: value for name, value in fields.items() if name not in EXPERT_FIELDS}
        rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        if not for_transformers:
            return fields | {"model_type": "bytetransformer", "use_xpos": False, "rope_parameters": rope}
        kind = "Qwen3" if fields.pop("qk_norm") else "Llama"
        fields |= {"model_type": kind.lower(), "architectures": [f"{kind}ForCausalLM"], "dtype": "bfloat16"}
        if self.num_experts:
            fields |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1}
        return fields | {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}


SHAPES = {
    "0.6b": Shape(  # Qwen3-0.6B
        vocab_size=151_936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, qk_norm=True, tie_word_embeddings=True, rope_theta=1e6,
        max_position_embeddings=40_960,
    ),
    "1b": Shape(  # Llama-3.2-1B
        vocab_size=128_256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, intermediate_size=8192, qk_norm=False, tie_word_embeddings=True, rope_theta=5e5,
        max_position_embeddings=131_072,
    ),
    "8b": Shape(  # Llama-3.1-8B
        vocab_size=128_256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=14_336, qk_norm=False, tie_word_embeddings=False, rope_theta=5e5,
        max_position_embeddings=131_072,
    ),
    "30b-a3b": Shape(  # Qwen3-30B-A3B
        vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, intermediate_size=6144, qk_norm=True, tie_word_embeddings=False, rope_theta=1e6,
        max_position_embeddings=40_960, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    ),
}  # fmt: skip
TINY = Shape(
    vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, intermediate_size=96, qk_norm=True, tie_word_embeddings=False, rope_theta=1e4,
    max_position_embeddings=4096,
)  # fmt: skip
TINY_EXPERTS = dataclasses.replace(TINY, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One loaded model that several workloads share."""

    shape: str
    max_num_seqs: int = 64
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    adapters: int = 0
    ranks: int = 1  # GPUs among which the model is divided


ENGINES = {
    "0.6b": Engine(shape="0.6b", max_num_seqs=256),
    "0.6b-kv8": Engine(shape="0.6b", max_num_seqs=256, kv_cache_dtype="fp8"),
    "1b": Engine(shape="1b"),
    "8b": Engine(shape="8b"),
    "8b-tp2": Engine(shape="8b", ranks=2),
    "8b-lora": Engine(shape="8b", adapters=32),
    "8b-int8": Engine(shape="8b", quantization="int8"),
    "8b-fp8": Engine(shape="8b", quantization="fp8"),
    "8b-int4": Engine(shape="8b", quantization="int4"),
    "8b-int4-lora": Engine(shape="8b", quantization="int4", adapters=32),
    "30b-a3b": Engine(shape="30b-a3b", max_num_seqs=256),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Requests submitted together; lengths are drawn from their ranges, inclusive.

    The first `adapters` adapters are used in turn. With `loads_adapters` the requests are streams that slide on until
    all of the engine's adapters are loaded anew.
    """

    engine: str
    requests: int = 1
    prompt: tuple[int, int] = (512, 512)
    output: tuple[int, int] = (256, 256)
    adapters: int = 0
    loads_adapters: bool = False

    def lengths(self, seed: int) -> list[tuple[int, int]]:
        """Tokens of each request's prompt and answer."""
        chance = random.Random(seed)
        return [(chance.randint(*self.prompt), chance.randint(*self.output)) for _ in range(self.requests)]

    def tiny(self) -> "Work":
        """A version with few requests of few tokens."""
        fewer = {name: tuple(max(2, length // 32) for length in getattr(self, name)) for name in ("prompt", "output")}
        return dataclasses.replace(self, requests=min(self.requests, 3), **fewer)


ONE = {"prompt": (128, 128), "output": (512, 512)}
WORKS = {
    "0.6b/1": Work(engine="0.6b", **ONE),
    "0.6b/64": Work(engine="0.6b", requests=64),
    "0.6b/256": Work(engine="0.6b", requests=256),
    "0.6b/mixed": Work(engine="0.6b", requests=256, prompt=(100, 1024), output=(100, 1024)),
    "0.6b-kv8/256": Work(engine="0.6b-kv8", requests=256),
    "0.6b-kv8/mixed": Work(engine="0.6b-kv8", requests=256, prompt=(100, 1024), output=(100, 1024)),
    "1b/1": Work(engine="1b", **ONE),
    "1b/64": Work(engine="1b", requests=64),
    "8b/1": Work(engine="8b", **ONE),
    "8b/8": Work(engine="8b", requests=8, **ONE),
    "8b/64": Work(engine="8b", requests=64),
    "8b-tp2/1": Work(engine="8b-tp2", **ONE),
    "8b-tp2/64": Work(engine="8b-tp2", requests=64),
    "8b/64-lora32": Work(engine="8b-lora", requests=64, adapters=32),
    "8b/64-lora1": Work(engine="8b-lora", requests=64, adapters=1),
    "8b/load32": Work(engine="8b-lora", requests=8, output=(10**6, 10**6), loads_adapters=True),
    "8b-int8/1": Work(engine="8b-int8", **ONE),
    "8b-fp8/1": Work(engine="8b-fp8", **ONE),
    "8b-int8/8": Work(engine="8b-int8", requests=8, **ONE),
    "8b-int8/64": Work(engine="8b-int8", requests=64),
    "8b-fp8/8": Work(engine="8b-fp8", requests=8, **ONE),
    "8b-fp8/64": Work(engine="8b-fp8", requests=64),
    "8b-int4/1": Work(engine="8b-int4", **ONE),
    "8b-int4/8": Work(engine="8b-int4", requests=8, **ONE),
    "8b-int4/64": Work(engine="8b-int4", requests=64),
    "8b-int4/64-lora32": Work(engine="8b-int4-lora", requests=64, adapters=32),
    "30b-a3b/1": Work(engine="30b-a3b", **ONE),
    "30b-a3b/8": Work(engine="30b-a3b", requests=8, **ONE),
    "30b-a3b/64": Work(engine="30b-a3b", requests=64),
    "30b-a3b/256": Work(engine="30b-a3b", requests=256),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure of a work: its key in the program's report, the peer's value and our target."""

    work: str
    key: str
    unit: str
    target: float | None = None
    peer: float | None = None
    less_is_better: bool = False

    def is_met(self, measured: float) -> bool:
        """Whether the target, which must not be None, is met."""
        assert self.target is not None
        return measured <= self.target if self.less_is_better else measured >= self.target

    def ratio(self, measured: float) -> float | None:
        """Ratio to the peer; above 1 is better."""
        if self.peer is None or not measured:
            return None
        return self.peer / measured if self.less_is_better else measured / self.peer


ROWS = (
    Row(work="limits", key="read_tb_s", unit="TB/s read"),
    Row(work="limits", key="copy_tb_s", unit="TB/s copied"),
    Row(work="limits", key="matmul_tflop_s", unit="TFLOP/s bf16"),
    Row(work="0.6b/1", key="tok_s", unit="tok/s", target=1300, peer=547),
    Row(work="0.6b/1", key="second_half_tok_s", unit="tok/s late", peer=1000 / 1.29),
    Row(work="0.6b/64", key="tok_s", unit="tok/s", target=18_000, peer=14_380),
    Row(work="0.6b/256", key="tok_s", unit="tok/s", target=28_000, peer=24_350),
    Row(work="0.6b/mixed", key="tok_s", unit="tok/s", target=24_000, peer=18_370),
    Row(work="0.6b-kv8/256", key="tok_s", unit="tok/s", target=28_000, peer=24_350),  # the peer's cache was in bf16
    Row(work="0.6b-kv8/mixed", key="tok_s", unit="tok/s", target=24_000, peer=18_370),
    Row(work="1b/1", key="tok_s", unit="tok/s"),
    Row(work="1b/64", key="tok_s", unit="tok/s"),
    Row(work="8b/1", key="tok_s", unit="tok/s", target=185, peer=148),
    Row(work="8b/64", key="tok_s", unit="tok/s", target=5500, peer=5257),
    Row(work="8b/64-lora32", key="tok_s", unit="tok/s", peer=2256),
    Row(work="8b/64-lora32", key="of_base", unit="of base", target=0.85, peer=0.43),
    Row(work="8b/64-lora1", key="tok_s", unit="tok/s", peer=3926),
    Row(work="8b/64-lora1", key="of_base", unit="of base", target=0.95, peer=0.75),
    Row(work="8b/load32", key="served_s", unit="s", target=1.5, peer=6.1, less_is_better=True),
    Row(work="8b/load32", key="longest_gap_ms", unit="ms gap", target=20, less_is_better=True),
    Row(work="8b/8", key="tok_s", unit="tok/s"),
    Row(work="8b-tp2/1", key="tok_s", unit="tok/s"),
    Row(work="8b-tp2/64", key="tok_s", unit="tok/s"),
    Row(work="8b-int8/1", key="tok_s", unit="tok/s", target=430),
    Row(work="8b-int8/8", key="tok_s", unit="tok/s"),
    Row(work="8b-int8/64", key="tok_s", unit="tok/s"),
    Row(work="8b-fp8/1", key="tok_s", unit="tok/s", target=430),
    Row(work="8b-fp8/8", key="tok_s", unit="tok/s"),
    Row(work="8b-fp8/64", key="tok_s", unit="tok/s"),
    Row(work="8b-int4/1", key="tok_s", unit="tok/s", target=520),
    Row(work="8b-int4/8", key="tok_s", unit="tok/s"),
    Row(work="8b-int4/64", key="tok_s", unit="tok/s", target=8500),
    Row(work="8b-int4/64-lora32", key="tok_s", unit="tok/s"),
    Row(work="8b-int4/64-lora32", key="of_base", unit="of base", target=0.8),
    Row(work="30b-a3b/1", key="tok_s", unit="tok/s", target=450, peer=237),
    Row(work="30b-a3b/8", key="tok_s", unit="tok/s", target=1600, peer=836),
    Row(work="30b-a3b/64", key="tok_s", unit="tok/s", target=4500, peer=3144),
    Row(work="30b-a3b/256", key="tok_s", unit="tok/s", target=8500, peer=6653),
    Row(work="0.6b/start", key="start_s", unit="s", target=15, peer=90, less_is_better=True),  # the peer's best: 90-159
    Row(work="0.6b/http-1", key="tpot_ms", unit="ms/token", target=0.9, peer=2.55, less_is_better=True),
    Row(work="0.6b/http-1", key="ttft_ms", unit="ms TTFT", target=8, peer=19, less_is_better=True),
    Row(work="0.6b/http-64", key="tok_s", unit="tok/s", target=16_000, peer=12_100),
    Row(work="0.6b/http-256", key="tok_s", unit="tok/s", target=24_000, peer=12_700),  # the peer's best: 10,800-12,700
    Row(work="0.6b/http-256", key="tpot_ms", unit="ms/token", peer=17.5, less_is_better=True),
    Row(work="0.6b/http-256", key="ttft_ms", unit="ms TTFT", peer=500, less_is_better=True),
)
NAMES = list(dict.fromkeys(row.work for row in ROWS))
UNUSUAL = ("30b-a3b/", "8b-tp2/", "8b/8", "8b-int8/8", "8b-int8/64", "8b-fp8/8", "8b-int4/8", "8b-int4/64-lora32")
USUAL_NAMES = [name for name in NAMES if not name.startswith(UNUSUAL)]  # the others take minutes, or two GPUs
BASE_OF = {
    "8b/64-lora32": "8b/64",
    "8b/64-lora1": "8b/64",
    "8b-int4/64-lora32": "8b-int4/64",
}  # the denominator of `of_base`


def shape_of(engine: Engine, *, is_tiny: bool) -> Shape:
    shape = SHAPES[engine.shape]
    if is_tiny:
        return TINY_EXPERTS if shape.num_experts else TINY
    return shape


def work_of(name: str, *, is_tiny: bool) -> Work:
    return WORKS[name].tiny() if is_tiny else WORKS[name]


def write_config(shape: Shape, folder: Path, *, for_transformers: bool = False) -> Path:
    """Write a model folder with only a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(for_transformers=for_transformers), indent=1))
    return folder


def random_prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids with a beginning unique to the seed."""
    chance = random.Random(seed)
    return [chance.randrange(10, vocab_size) for _ in range(length)]


def write_adapters(shape: Shape, folder: Path, count: int) -> list[Path]:
    """PEFT folders a00, a01 ... of rank 16 on all linear layers, bf16. They differ in one matrix, or they would take
    a minute to draw."""
    import torch
    from safetensors.torch import save_file

    from stellarbyte.config import ByteModelConfig
    from stellarbyte.model.parts import adaptable_modules

    numbers = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, 0.01, generator=numbers)

    modules = adaptable_modules(ByteModelConfig.from_dict(shape.config(for_transformers=False)))
    tensors: dict[str, torch.Tensor] = {}
    for module, (out, width) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = draw(RANK, width)
        tensors[f"base_model.model.{module}.lora_B.weight"] = draw(out, RANK)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }
    paths = [folder / f"a{number:02}" for number in range(count)]
    first = next(iter(tensors))
    for path in paths:
        path.mkdir(parents=True)
        tensors[first] = draw(*tensors[first].shape)
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
    return paths


def report(work: str, figures: dict[str, Any]) -> None:
    """Report figures to the parent program."""
    print(f"\n{RESULT}{json.dumps({'work': work, **figures})}", flush=True)


@contextlib.contextmanager
def reporting_failure(works: list[str]) -> Iterator[None]:
    """Report exceptions inside as the works' errors; they also end the program, which may be inconsistent."""
    try:
        yield
    except (Exception, SystemExit) as error:
        for work in works:
            report(work, {"error": f"{type(error).__name__}: {error}"})
        raise
