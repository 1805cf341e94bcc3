"""Decoding steps of a mixture of experts on the CPU, compared with the time of reading the weights that they use.

    python -m benchmarks.cpu_moe                       0.4 of 1.3 billion parameters are active; 1, 2 and 8 sequences

Every step has new tokens, so that they choose other experts. Figures are least and median of many steps, each beside a
plain read of as many bytes as one token's weights have; other programs only increase the times.
"""

import argparse
import dataclasses
import os
import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks.cpu_kernels import BLOCK_SIZE, decoding_batch, read_all
from benchmarks.support.record import write_result
from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.dummy import dummy_language_model
from stellarbyte.config import ByteModelConfig
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.ops.cpu.packing import PackedWeight, StackedLinears
from stellarbyte.sampling.sampler import GREEDY

BATCHES = (1, 2, 8)
SHAPE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "use_xpos": False,
}


def active_bytes(model: CpuModel) -> int:
    """Bytes of the weights that a step of one token reads."""
    layers, experts = model.layers, model.layers.experts
    assert experts is not None
    num_pools = int(experts.pools_L.max()) + 1
    share = experts.routers.top_k / experts.routers.num_experts / num_pools
    chosen = share * sum(part.num_bytes for part in (experts.gate_up, experts.down)) * int((experts.pools_L >= 0).sum())
    dense = (layers.qkv, layers.output, layers.gate_up, layers.down, experts.shared_gate_up, experts.shared_down)
    return (
        round(chosen) + sum(map(_num_bytes, dense)) + experts.routers.weights_MPCR.nbytes + model.head_weight.num_bytes
    )


def _num_bytes(linears: StackedLinears) -> int:
    return PackedWeight(linears.weights, linears.scales, linears.minima).num_bytes


def next_batch(num_sequences: int, context: int, numbers: torch.Generator, vocab_size: int) -> ForwardBatch:
    tokens_T = torch.randint(vocab_size, (num_sequences,), generator=numbers)
    return dataclasses.replace(decoding_batch(num_sequences, context), token_ids_T=tokens_T)


@torch.inference_mode()
def measure(model: CpuModel, cache: PagedKVCache, num_sequences: int, context: int, steps: int) -> dict[str, float]:
    numbers = torch.Generator().manual_seed(0)
    num_bytes = active_bytes(model)
    words = np.ones(num_bytes // 4, np.float32)
    step_s, read_s = [], []
    for _ in range(steps + 2):
        batch = next_batch(num_sequences, context, numbers, model.vocab_size)
        started_s = time.perf_counter()
        model.sample(model.logits(batch, cache), [GREEDY] * num_sequences)
        stepped_s = time.perf_counter()
        read_all(words, model.num_threads)
        step_s.append(stepped_s - started_s)
        read_s.append(time.perf_counter() - stepped_s)
    step_s, read_s = step_s[2:], read_s[2:]  # the first ones compile and touch the memory
    return {
        "active_mb": round(num_bytes / 1e6, 1),
        "step_ms": round(min(step_s) * 1000, 3),
        "median_step_ms": round(statistics.median(step_s) * 1000, 3),
        "tok_s": round(num_sequences / min(step_s), 1),
        "median_tok_s": round(num_sequences / statistics.median(step_s), 1),
        "read_gb_per_s": round(num_bytes / min(read_s) / 1e9, 2),
        "of_read_limit": round(min(read_s) / min(step_s), 3),
        "median_of_read_limit": round(statistics.median(read_s) / statistics.median(step_s), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer need less memory")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    config = ByteModelConfig(**SHAPE | {"num_hidden_layers": options.layers})
    cache = PagedKVCache(
        config, max(BATCHES) * (options.context // BLOCK_SIZE + 1), BLOCK_SIZE, torch.float32, torch.device("cpu")
    )
    cache.keys_LBSKD.uniform_()  # untouched memory would be a single cached page of zeros
    cache.values_LBSKD.uniform_()
    # bfloat16 halves the memory of the model beside its packed form, which is float32 or smaller.
    model = dummy_language_model(config, dtype=torch.bfloat16, device=torch.device("cpu"))
    runs = []
    for quantization in options.quantization:
        packed = CpuModel(model, config, quantization=quantization, num_threads=threads)
        for num_sequences in BATCHES:
            figures = measure(packed, cache, num_sequences, options.context, options.steps)
            runs.append({"weights": quantization, "sequences": num_sequences} | figures)
            print(f"{quantization:>5} {num_sequences:>3} sequences  {figures}", flush=True)
        del packed
    if not options.no_record:
        shape = SHAPE | {"num_hidden_layers": options.layers}
        write_result("cpu_moe", {"shape": shape, "context": options.context, "threads": threads, "runs": runs})


if __name__ == "__main__":
    main()
