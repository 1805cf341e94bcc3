"""The time of a decoding step's parts on the CPU, compared with torch and the machine's limits.

    python -m benchmarks.cpu_kernels                      the demo model, 1 to 32 sequences of 160 tokens

Every figure is the least of many interleaved repetitions, in milliseconds: other programs only increase it.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit, prange

from benchmarks.support.record import write_result
from stellarbyte.backends.cpu_model import CpuModel, batch_arrays
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.native import load_language_model, open_checkpoint
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.ops.cpu.attention import Rotations, paged_attention
from stellarbyte.ops.cpu.linear import NO_ACTIVATION, PLAIN, TILED, linear
from stellarbyte.ops.cpu.panels.tiles import may_use_tiles
from stellarbyte.sampling.sampler import RowSampling

BLOCK_SIZE = 16
BATCHES = (1, 8, 16, 24, 32)
ARITHMETIC = TILED if may_use_tiles() else PLAIN
ALL_KEYS = NO_SINKS = np.int64(0)  # NumPy's: numba would compile and keep the kernel once more for Python's 0


@njit(parallel=True, fastmath=True)
def read_all(words, num_threads):
    """The sum of all float32 numbers, each read once."""
    totals = np.zeros(num_threads, np.float32)
    part = len(words) // num_threads
    for thread in prange(num_threads):
        total = np.float32(0)
        own = words[thread * part : (thread + 1) * part]
        for i in range(len(own)):
            total += own[i]
        totals[thread] = total
    return totals.sum()


@njit(parallel=True, fastmath=True)
def _multiply_add(num_rounds, num_threads):
    """48 · num_rounds additions and as many products in each of the threads, in registers."""
    totals = np.zeros(num_threads, np.float32)
    for thread in prange(num_threads):
        sums = np.zeros(96, np.float32)
        for i in range(num_rounds):
            for lane in range(96):
                sums[lane] = sums[lane] * np.float32(0.999) + np.float32(i)
        totals[thread] = sums.sum()
    return totals.sum()


@njit
def _all_products(layers, head, x, attended, inner, qkv, branch, gated, logits, activation, num_threads):
    nothing, no_addend = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
    for layer in range(len(layers.windows_L)):
        for weight, source, out, act in (
            (layers.qkv, x, qkv, NO_ACTIVATION),
            (layers.output, attended, branch, NO_ACTIVATION),
            (layers.gate_up, x, gated, activation),
            (layers.down, inner, branch, NO_ACTIVATION),
        ):
            packed = (weight.weights[layer], weight.scales[layer], weight.minima[layer])
            linear(source, packed, nothing, no_addend, out, act, ARITHMETIC, num_threads)
    linear(x, head, nothing, no_addend, logits, NO_ACTIVATION, ARITHMETIC, num_threads)


@njit
def _all_attention(qkv, shape, batch, rotations, keys, values, scale, out, num_threads):
    for layer in range(len(keys)):
        paged_attention(
            qkv, shape, batch, rotations, keys[layer], values[layer], ALL_KEYS, NO_SINKS, scale, np.float32(0),
            np.zeros(0, np.float32), len(qkv), out, num_threads,
        )  # fmt: skip


def least_ms(repetitions: int, works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    best = dict.fromkeys(works, float("inf"))
    for repetition in range(repetitions + 1):  # the first one compiles
        for name, work in works.items():
            started_s = time.perf_counter()
            work()
            if repetition:
                best[name] = min(best[name], (time.perf_counter() - started_s) * 1000)
    return {name: round(ms, 3) for name, ms in best.items()}


def decoding_batch(num_sequences: int, context: int) -> ForwardBatch:
    """The next token of sequences with `context` tokens in the cache, one after the other."""
    blocks = -(-(context + 1) // BLOCK_SIZE)
    sequences_N = torch.arange(num_sequences)
    table_M = torch.arange(blocks)
    return ForwardBatch(
        token_ids_T=sequences_N + 100,
        positions_T=torch.full((num_sequences,), context),
        slots_T=sequences_N * blocks * BLOCK_SIZE + context,
        offsets_T=torch.full((num_sequences,), context % BLOCK_SIZE),
        query_starts=tuple(range(num_sequences + 1)),
        block_tables_NM=sequences_N[:, None] * blocks + table_M,
        block_bases_NM=(table_M * BLOCK_SIZE).expand(num_sequences, blocks).contiguous(),
        num_blocks=(blocks,) * num_sequences,
        num_sink_blocks=(0,) * num_sequences,
        reach=context,
        logits_rows=sequences_N,
    )


def measure_batch(
    model: CpuModel, cache: PagedKVCache, num_sequences: int, context: int, repeat: int
) -> dict[str, float]:
    options, threads = model.options, model.num_threads
    batch = decoding_batch(num_sequences, context)
    rows = [
        RowSampling(temperature=0.6, top_k=0, top_p=1.0, min_p=0.0, seed=i, choice=0, position=context)
        for i in range(num_sequences)
    ]
    query = options.num_heads * options.head_dim
    widths = {
        "x": model.embedding_VC.shape[1],
        "attended": query,
        "inner": options.intermediate_size,
        "qkv": query + 2 * options.num_kv_heads * options.head_dim,
        "branch": model.embedding_VC.shape[1],
        "gated": options.intermediate_size,
        "logits": model.vocab_size,
    }
    arrays = {name: np.random.default_rng(0).random((num_sequences, n), np.float32) for name, n in widths.items()}
    logits_RV = model.logits(batch, cache)
    works = {
        "step": lambda: model.logits(batch, cache),
        "products": lambda: _all_products(
            model.layers, tuple(model.head_weight), *arrays.values(), options.activation, threads
        ),
        "attention": lambda: _all_attention(
            arrays["qkv"],
            (options.num_heads, options.num_kv_heads, options.head_dim),
            batch_arrays(batch),
            Rotations(*(table[0] for table in model.rotations_up_to(context + BLOCK_SIZE))),
            cache.keys_LBSKD.numpy(),
            cache.values_LBSKD.numpy(),
            model.layers.score_scales_L[0],
            arrays["attended"],
            threads,
        ),
        "sampling": lambda: model.sample(logits_RV, rows),
    }
    return least_ms(repeat, works)


def measure_limits(num_threads: int) -> dict[str, float]:
    words = np.ones(64 * 2**20, np.float32)
    rounds = 200_000
    ms = least_ms(5, {"read": lambda: read_all(words, num_threads), "fma": lambda: _multiply_add(rounds, num_threads)})
    return {
        "read_gb_per_s": round(words.nbytes / ms["read"] / 1e6, 1),
        "float32_gflop_per_s": round(2 * 96 * rounds * num_threads / ms["fma"] / 1e6, 1),
    }


@torch.inference_mode()
def measure_torch(model: torch.nn.Module, repeat: int) -> dict[str, float]:
    """All of the model's linears through torch, by batch."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {(t, n): torch.rand(t, n) for t in BATCHES for n in {m.in_features for m in linears}}

    def run(t: int) -> None:
        for module in linears:
            module(inputs[t, module.in_features])

    return least_ms(repeat, {str(t): lambda t=t: run(t) for t in BATCHES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="folder or demo")
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--quantization", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    path = resolve_model(options.model)
    config = open_checkpoint(path).config
    model = load_language_model(path, dtype=torch.float32, device=torch.device("cpu"))
    num_blocks = max(BATCHES) * (options.context // BLOCK_SIZE + 1)
    cache = PagedKVCache(config, num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    cache.keys_LBSKD.uniform_()  # untouched memory would be a single cached page of zeros
    cache.values_LBSKD.uniform_()
    limits = measure_limits(threads)
    print(limits, flush=True)
    runs = []
    for quantization in options.quantization:
        packed = CpuModel(model, config, quantization=quantization, num_threads=threads)
        for batch in BATCHES:
            ms = measure_batch(packed, cache, batch, options.context, options.repeat)
            runs.append({"weights": quantization, "sequences": batch, "ms": ms})
            print(f"{quantization:>5} {batch:>3} sequences  {ms}", flush=True)
    torch_ms = measure_torch(model, options.repeat)
    print("torch's products", torch_ms)
    if not options.no_record:
        figures = {"model": options.model, "context": options.context, "threads": threads, "limits": limits}
        write_result("cpu_kernels", figures | {"runs": runs, "torch_products_ms": torch_ms})


if __name__ == "__main__":
    main()
