"""The kernels of a mixture-of-experts layer in CUDA graphs, against the limits of memory and matrix units.

    python -m benchmarks.gpu.moe_kernels                      layers of Qwen3-30B-A3B, by number of tokens
    python -m benchmarks.gpu.moe_kernels --sweep 1 8 64 2048  and other tiles for these numbers of tokens
    python -m benchmarks.gpu.moe_kernels --device cpu --tiny  to try the program itself, by Triton's interpreter

Weights, tokens and so the routing are random. A graph computes several layers, so that no weight is still in the cache.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

if __name__ == "__main__" and "cpu" in sys.argv:  # read when Triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu.limits import measure
from benchmarks.support.record import write_result
from stellarbyte.ops.triton.gates import GATES
from stellarbyte.ops.triton.moe import groups, pairs
from stellarbyte.ops.triton.moe.groups import GroupTile
from stellarbyte.ops.triton.moe.layer import MAX_PAIR_ROWS, Experts, make_scratch, moe
from stellarbyte.ops.triton.moe.pairs import PairTile
from stellarbyte.ops.triton.moe.routing import Router, route
from stellarbyte.ops.triton.moe.scratch import ExpertScratch
from stellarbyte.ops.triton.weights import ExpertWeight, quantize_experts

GATE = GATES["silu"]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096, 8192)
SWEPT_TOKENS = (1, 4, 16, 64, 256, 2048)
MOST_PAIR_TOKENS = 8  # that are also tried pair by pair
REPETITIONS, REPETITION_S = 5, 0.02

PAIR_TILES = {  # outputs, inputs, warps, tiles ahead
    "gate_up": [
        (2, 2048, 4, 1), (1, 2048, 4, 1), (1, 2048, 2, 1), (4, 1024, 4, 1), (4, 1024, 4, 2), (2, 1024, 4, 1),
        (2, 1024, 2, 2), (8, 256, 4, 4), (4, 512, 4, 2), (4, 512, 4, 4), (2, 512, 1, 4), (8, 512, 4, 2),
    ],
    "down": [
        (4, 1024, 4, 1), (4, 1024, 4, 2), (4, 1024, 4, 3), (2, 1024, 4, 2), (2, 1024, 4, 4), (2, 1024, 2, 2),
        (2, 1024, 2, 4), (1, 1024, 2, 4), (8, 256, 4, 4), (8, 256, 4, 8), (4, 256, 4, 4), (4, 256, 4, 8),
        (4, 256, 2, 4), (4, 256, 2, 8), (16, 256, 8, 4), (2, 256, 1, 8), (4, 256, 1, 4),
    ],
}  # fmt: skip
FEW_TILES = {  # outputs, inputs, warps, stages; rows as by default
    "gate_up": [
        (32, 128, 4, 4), (16, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3),
        (128, 64, 4, 3), (64, 128, 8, 3),
    ],
    "down": [
        (64, 128, 4, 4), (32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 4), (128, 64, 4, 4), (64, 256, 4, 2),
        (128, 128, 4, 3),
    ],
}  # fmt: skip
MANY_TILES = {  # rows, outputs, inputs, warps, stages
    "gate_up": [
        (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4), (128, 64, 64, 4, 4),
        (64, 64, 128, 4, 3), (256, 64, 64, 8, 3),
    ],
    "down": [
        (128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (128, 128, 64, 4, 3), (128, 64, 64, 4, 4), (256, 128, 64, 8, 3),
        (64, 128, 128, 4, 3), (128, 256, 64, 8, 3),
    ],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the layers."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int = 4

    @property
    def expert_numbers(self) -> int:
        return 3 * self.hidden * self.intermediate


QWEN3_30B_A3B = Sizes(hidden=2048, intermediate=768, experts=128, top_k=8)
TINY = Sizes(hidden=64, intermediate=32, experts=8, top_k=2, layers=1)


class Layer(NamedTuple):
    router: Router
    experts: Experts
    scratch: ExpertScratch


def make_layers(sizes: Sizes, max_rows: int, quantization: str, device: torch.device) -> list[Layer]:
    """In bfloat16; in float32 on a CPU, where the interpreter multiplies no bfloat16 matrices."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def matrices(rows: int, columns: int) -> ExpertWeight:
        numbers = torch.empty(sizes.experts, rows, columns, dtype=dtype, device=device).normal_(0, columns**-0.5)
        weight = ExpertWeight(matrix_ENK=numbers)
        return weight if quantization == "none" else quantize_experts(weight, quantization)

    layers = []
    for _ in range(sizes.layers):
        weight_EC = torch.empty(sizes.experts, sizes.hidden, dtype=dtype, device=device).normal_(0, sizes.hidden**-0.5)
        router = Router(weight_EC=weight_EC, top_k=sizes.top_k, score="softmax", renormalizes=True)
        experts = Experts(
            gate_up=matrices(2 * sizes.intermediate, sizes.hidden), down=matrices(sizes.hidden, sizes.intermediate)
        )
        layers.append(Layer(router, experts, make_scratch(max_rows, router, experts)))
    return layers


def microseconds(program: Callable[[], object], device: torch.device) -> float:
    """Of one run: the median of some repetitions, each of many replays of its graph."""
    program()
    if device.type != "cuda":
        started_s = time.perf_counter()
        program()
        return 1e6 * (time.perf_counter() - started_s)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        program()

    def replay_us(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return 1000 * begin.elapsed_time(end) / times

    times = max(1, round(1e6 * REPETITION_S / replay_us(3)))
    return statistics.median(replay_us(times) for _ in range(REPETITIONS))


class Bench:
    """Times of `num_tokens` random tokens in all layers; microseconds are of one layer."""

    def __init__(self, layers: list[Layer], sizes: Sizes, num_tokens: int, device: torch.device) -> None:
        self.layers, self.sizes, self.num_tokens, self.device = layers, sizes, num_tokens, device
        weight_EC = layers[0].router.weight_EC
        self.x_TC = torch.randn(num_tokens, sizes.hidden, device=device).to(weight_EC.dtype)
        self.out_TC = torch.empty_like(self.x_TC)
        self.norm_C = torch.ones(sizes.hidden, dtype=weight_EC.dtype, device=device) if num_tokens == 1 else None
        self.distinct = self._route()

    def _route(self) -> float:
        """Fill every layer's scratch; returns the mean number of experts chosen."""
        distinct = 0
        for layer in self.layers:
            layer.scratch.counts.zero_()
            route(self.x_TC, layer.router, layer.scratch)
            distinct += int((layer.scratch.counts > 0).sum())
        return distinct / len(self.layers)

    def us(self, part: Callable[[Layer], object]) -> float:
        return microseconds(lambda: [part(layer) for layer in self.layers], self.device) / len(self.layers)

    @property
    def num_bytes(self) -> float:
        """Of the weights that a layer has to read."""
        size = self.layers[0].experts.down.matrix_ENK.element_size()
        return self.distinct * self.sizes.expert_numbers * size + 2 * self.sizes.experts * self.sizes.hidden

    @property
    def num_flops(self) -> float:
        return 2 * self.num_tokens * self.sizes.top_k * self.sizes.expert_numbers

    def whole_us(self) -> float:
        for layer in self.layers:
            layer.scratch.counts.zero_()
        shared = self.layers[0].scratch  # as in serving
        return self.us(
            lambda layer: moe(
                self.x_TC, layer.router, layer.experts, shared, gate=GATE, norm_C=self.norm_C, eps=1e-6,
                residual_TC=self.x_TC,
            )
        )  # fmt: skip

    def routing_us(self) -> float:
        return self.us(
            lambda layer: route(self.x_TC, layer.router, layer.scratch, norm_C=self.norm_C, eps=1e-6, lists_pairs=False)
        )

    def combine_us(self) -> float:
        top_k = self.sizes.top_k
        return self.us(
            lambda layer: groups.combine(self.out_TC, layer.scratch, top_k=top_k, residual_TC=None, branch_scale_C=None)
        )

    def product(self, name: str, tile: PairTile | GroupTile) -> Callable[[Layer], object]:
        """One product of a layer, after `_route` and, of "down", after "gate_up"."""
        top_k = self.sizes.top_k
        if name == "gate_up":
            if isinstance(tile, PairTile):
                return lambda layer: pairs.gate_up(
                    self.x_TC, layer.experts.gate_up, layer.scratch, top_k=top_k, gate=GATE, tile=tile
                )
            return lambda layer: groups.gate_up(
                self.x_TC, layer.experts.gate_up, layer.scratch, top_k=top_k, gate=GATE, tile=tile
            )
        if isinstance(tile, PairTile):
            return lambda layer: pairs.down(
                self.out_TC, layer.experts.down, layer.scratch, top_k=top_k, residual_TC=None, branch_scale_C=None,
                tile=tile,
            )  # fmt: skip
        return lambda layer: groups.down(self.num_tokens, layer.experts.down, layer.scratch, top_k=top_k, tile=tile)

    def group_tiles(self) -> dict[str, GroupTile]:
        sizes = (self.num_tokens, self.sizes.top_k, self.sizes.experts, self.x_TC.dtype)
        return {"gate_up": groups.gate_up_tile(*sizes), "down": groups.down_tile(*sizes)}

    def pair_tiles(self) -> dict[str, PairTile]:
        return {
            "gate_up": pairs.gate_up_tile(self.sizes.hidden),
            "down": pairs.down_tile(self.sizes.intermediate),
        }

    def tiles(self) -> dict[str, PairTile] | dict[str, GroupTile]:
        return self.pair_tiles() if self.num_tokens <= MAX_PAIR_ROWS else self.group_tiles()


def measure_tokens(bench: Bench, limits: dict[str, float]) -> dict[str, Any]:
    """The whole layer, then its parts alone. Parts alone do not overlap, so their sum may exceed the whole."""
    whole_us = bench.whole_us()
    bench.distinct = bench._route()
    parts = {name: bench.us(bench.product(name, tile)) for name, tile in bench.tiles().items()}
    if bench.num_tokens > MAX_PAIR_ROWS:
        parts["combine"] = bench.combine_us()
    parts["routing"] = bench.routing_us()
    read_us = bench.num_bytes / limits["read_tb_s"] / 1e6
    return {
        "tokens": bench.num_tokens, "distinct_experts": bench.distinct, "megabytes": bench.num_bytes / 1e6,
        "us": whole_us, "read_limit_us": read_us, "of_read_limit": read_us / whole_us,
        "tflop_s": bench.num_flops / whole_us / 1e6,
        "of_matmul": bench.num_flops / whole_us / 1e6 / limits["matmul_tflop_s"],
        "parts_us": parts, "tiles": {name: tuple(tile) for name, tile in bench.tiles().items()},
    }  # fmt: skip


def print_tokens(row: dict[str, Any]) -> None:
    parts = "  ".join(f"{name} {us:.1f}" for name, us in row["parts_us"].items())
    print(
        f"{row['tokens']:>6} {row['distinct_experts']:>8.1f} {row['megabytes']:>8.1f} {row['us']:>9.1f} "
        f"{row['read_limit_us']:>9.1f} {row['of_read_limit']:>6.1%} {row['tflop_s']:>8.1f} {row['of_matmul']:>6.1%}  "
        f"{parts}",
        flush=True,
    )


def candidates(bench: Bench, name: str) -> list[PairTile | GroupTile]:
    """Tiles to try for one product, the default first."""
    default = bench.tiles()[name]
    found: list[PairTile | GroupTile] = [default]
    if bench.num_tokens <= MOST_PAIR_TOKENS:
        found += [bench.pair_tiles()[name], *(PairTile(*tile) for tile in PAIR_TILES[name])]
    group = bench.group_tiles()[name]
    found.append(group)
    if group.rows <= 64:
        rows = {max(8, group.rows // 2), group.rows, 2 * group.rows} if bench.num_tokens > 8 else {group.rows}
        found += [GroupTile(group.rows, *tile) for tile in FEW_TILES[name]]
        found += [group._replace(rows=count) for count in sorted(rows)]
    else:
        found += [GroupTile(*tile) for tile in MANY_TILES[name]]
    return list(dict.fromkeys(found))


def sweep(bench: Bench, deadline_s: float) -> list[dict[str, Any]]:
    """Times of both products with other tiles; the hidden rows must be those of the default."""
    results = []
    for name in ("gate_up", "down"):
        bench._route()
        hidden = bench.layers[0].scratch.hidden[: bench.num_tokens * bench.sizes.top_k * bench.sizes.intermediate]
        expected: torch.Tensor | None = None
        tried: list[tuple[float, str, tuple[int, ...], str]] = []
        for tile in candidates(bench, name):
            if time.monotonic() > deadline_s:
                print(f"{bench.num_tokens} {name}: no time left")
                break
            part, kind = bench.product(name, tile), "pairs" if isinstance(tile, PairTile) else "groups"
            try:
                us = bench.us(part)
            except Exception as error:  # too much shared memory, say
                print(f"{bench.num_tokens} {name} {kind} {tuple(tile)}: {type(error).__name__}: {str(error)[:100]}")
                continue
            expected = hidden.clone() if expected is None else expected
            difference = (hidden - expected).abs().max() / expected.abs().max()
            note = "" if difference < 0.02 else f"  WRONG by {difference:.3f}"
            tried.append((us, kind, tuple(tile), note))
            results.append({"tokens": bench.num_tokens, "product": name, "kind": kind, "tile": tile, "us": us})
        share = (2 if name == "gate_up" else 1) / 3 * bench.num_bytes
        for us, kind, tile, note in sorted(tried):
            default = "default" if tile == tuple(bench.tiles()[name]) else ""
            print(
                f"{bench.num_tokens:>6} {name:<8} {kind:<7} {tile!s:<26} {us:>9.1f} us "
                f"{share / us / 1e6:>6.2f} TB/s  {default}{note}",
                flush=True,
            )
    return results


def run(sizes: Sizes, tokens: Sequence[int], swept: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    deadline_s = time.monotonic() + options.limit_s
    limits = measure(options.device, *((2**20, 64) if options.tiny else (2**32, 8192)))
    print("  ".join(f"{name} {value:.2f}" for name, value in limits.items()))
    layers = make_layers(sizes, max([*tokens, *swept]), options.quantization, device)
    print(f"{sizes}, {options.quantization}, {layers[0].router.weight_EC.dtype}; us of one layer")
    titles = ("experts", 8), ("MB", 8), ("us", 9), ("limit us", 9), ("", 6), ("TFLOP/s", 8), ("of mm", 6)
    print(f"{'tokens':>6} " + " ".join(f"{title:>{width}}" for title, width in titles) + "  parts us")
    rows = []
    for count in tokens:
        rows.append(measure_tokens(Bench(layers, sizes, count, device), limits))
        print_tokens(rows[-1])
    tried = [result for count in swept for result in sweep(Bench(layers, sizes, count, device), deadline_s)]
    return {"limits": limits, "sizes": dataclasses.asdict(sizes), "rows": rows, "sweep": tried}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="*", type=int, default=None, help="these numbers of tokens")
    parser.add_argument("--sweep", nargs="*", type=int, help="try other tiles, for these numbers of tokens or some")
    parser.add_argument("--quantization", choices=["none", "int8", "fp8"], default="none")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, to try the program itself")
    parser.add_argument("--limit-s", type=float, default=210, help="no tiles are tried after this time")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    tokens = options.tokens if options.tokens is not None else (1, 3) if options.tiny else TOKENS
    swept = () if options.sweep is None else options.sweep or SWEPT_TOKENS
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream() if options.device == "cuda" else None):
        figures = run(TINY if options.tiny else QWEN3_30B_A3B, tokens, swept, options)
    if not options.no_record:
        write_result("moe_kernels", {"quantization": options.quantization, **figures})


if __name__ == "__main__":
    main()
