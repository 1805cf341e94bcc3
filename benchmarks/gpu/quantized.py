"""Products with weights of 16, 8 and 4 bits in CUDA graphs, against the limits of memory and matrix units.

    python -m benchmarks.gpu.quantized                        the linears of an 8B layer, by form and number of rows
    python -m benchmarks.gpu.quantized --sweep 1 8 64         and other tiles for these rows; the best at the end
    python -m benchmarks.gpu.quantized --device cpu --tiny    to try the program itself, by Triton's interpreter

For whole models: `python -m benchmarks.gpu --only 8b/1 8b-int4/1 8b-int4/8 8b-int4/64 8b-int4/64-lora32`. Weights are
random. A graph reads several matrices, so that none is still in the cache. Kernels are compiled by several threads.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

if __name__ == "__main__" and "cpu" in sys.argv:  # read when Triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from benchmarks.gpu.limits import measure
from benchmarks.gpu.moe_kernels import microseconds
from benchmarks.support.record import write_result
from stellarbyte.backends.gpu.products import PackedWeight, apply, can_norm_few, few, fuses_gate, is_for_few
from stellarbyte.ops.triton.gates import GATES, apply_gate
from stellarbyte.ops.triton.grouped.product import dequantize
from stellarbyte.ops.triton.grouped.rows import RowsTile, rows_product, rows_tile
from stellarbyte.ops.triton.grouped.vector import VectorTile, vector_product
from stellarbyte.ops.triton.grouped.weights import SLAB, GroupedWeight, packed_groups
from stellarbyte.ops.triton.linear import linear
from stellarbyte.ops.triton.norm import add_norm
from stellarbyte.ops.triton.weights import Weight

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
FORMS = ("none", "int8", "fp8", "int8/128", "fp8/128", "int4/32", "int4/64", "int4/128")
LEAST_BYTES = 256 * 2**20  # of the matrices that a graph reads, several times the cache
MOST_COPIES = 16
COMPILERS = 12
GATE, EPS = GATES["silu"], 1e-6

VECTOR_8_BITS = [
    (2, 4096, 4), (4, 4096, 4), (8, 4096, 4), (4, 4096, 8), (8, 4096, 8), (4, 2048, 4), (8, 2048, 4), (16, 1024, 4),
    (4, 2048, 2), (2, 2048, 2), (8, 1024, 2), (4, 8192, 8),
]  # fmt: skip
ROWS_8_BITS = [(16, 256, 4), (32, 256, 4), (32, 128, 4), (64, 128, 4), (64, 256, 4), (16, 512, 4), (32, 256, 8)]
VECTOR_4_BITS = [
    (8, 1, 32, 4), (4, 2, 32, 4), (4, 1, 32, 4), (8, 1, 16, 2), (8, 1, 16, 4), (16, 1, 16, 4), (8, 2, 32, 8),
    (4, 1, 16, 2),
]  # fmt: skip
FEW_4_BITS = [  # outputs, slabs at once, warps, stages, turns of a step, parts of the inputs; rows as many as there are
    (32, 4, 4, 3, 2), (32, 4, 4, 4, 1), (32, 4, 4, 4, 2), (32, 8, 8, 3, 1), (32, 2, 2, 4, 2), (16, 4, 4, 3, 2),
    (16, 4, 4, 4, 2), (16, 8, 8, 3, 2), (16, 8, 8, 4, 1), (64, 4, 4, 3, 1), (64, 2, 4, 3, 2), (32, 4, 4, 3, 2, 2),
    (32, 2, 2, 4, 2, 2), (32, 2, 2, 4, 2, 4),
]  # fmt: skip
MANY_4_BITS = [  # rows, outputs, slabs at once, warps, stages, turns of a step, parts of the inputs, scales first
    (64, 64, 1, 4, 3, 2, 1, True), (64, 64, 1, 4, 3, 2, 2, True), (64, 64, 1, 4, 4, 2, 2, True),
    (64, 64, 1, 4, 4, 1, 2, True), (64, 64, 1, 4, 3, 2, 2, False), (64, 64, 1, 4, 3, 2, 4, True),
    (64, 128, 1, 4, 3, 2, 1, True), (64, 128, 1, 8, 3, 2, 1, True), (64, 128, 1, 8, 3, 2, 2, True),
    (64, 128, 1, 8, 4, 1, 2, True), (64, 128, 1, 4, 3, 2, 4, True), (64, 128, 1, 8, 3, 2, 4, True),
    (32, 64, 1, 4, 3, 2, 2, True), (32, 128, 1, 4, 3, 2, 2, True), (128, 128, 1, 8, 3, 1, 2, True),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """A product of a layer: its rows are normed before, or its result is gated, or added to the residual."""

    name: str
    outputs: int  # with a gate, of gates and ups together
    inputs: int
    norm: bool = False
    gate: bool = False

    @property
    def width(self) -> int:
        return self.outputs // 2 if self.gate else self.outputs


LAYER = (  # Llama-3.1-8B
    Part(name="qkv", outputs=6144, inputs=4096, norm=True),
    Part(name="output", outputs=4096, inputs=4096),
    Part(name="gate_up", outputs=28_672, inputs=4096, norm=True, gate=True),
    Part(name="down", outputs=4096, inputs=14_336),
)
TINY = (
    Part(name="qkv", outputs=48, inputs=256, norm=True),
    Part(name="gate_up", outputs=64, inputs=256, norm=True, gate=True),
)


def make_weight(part: Part, form: str, device: torch.device, dtype: torch.dtype) -> PackedWeight:
    kind, _, group = form.partition("/")
    shape = (part.outputs, part.inputs)
    if kind == "none":
        return Weight(matrix_NK=torch.empty(shape, dtype=dtype, device=device).normal_(0, part.inputs**-0.5))
    if kind == "int4":
        size = (part.inputs // SLAB, part.outputs, SLAB // 4)
        codes = torch.randint(-(2**15), 2**15, size, dtype=torch.int16, device=device)
    else:
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        codes = codes if kind == "int8" else codes.to(dtype).to(torch.float8_e4m3fn)
    spread = 4.6 if kind == "int4" else 73.0
    scales = torch.full((part.inputs // int(group or part.inputs), part.outputs), part.inputs**-0.5 / spread)
    if not group:
        return Weight(matrix_NK=codes, scales_N=scales[0].to(device))
    groups = scales = scales.half()
    if kind == "int4":
        groups = packed_groups(scales, torch.randint(7, 10, scales.shape))
    return GroupedWeight(
        kind=kind, group_size=int(group), codes=codes, groups_GN=groups.to(device), scale_dtype=scales.dtype
    )  # type: ignore[arg-type]


def bytes_of(weight: PackedWeight) -> int:
    return sum(part.nbytes for part in vars(weight).values() if isinstance(part, torch.Tensor))


Run = Callable[[PackedWeight], torch.Tensor]


class Bench:
    """A part in one form, for a number of rows."""

    def __init__(self, part: Part, form: str, weights: list[PackedWeight], num_rows: int) -> None:
        self.part, self.form, self.weights, self.num_rows = part, form, weights, num_rows
        self.device = weights[0].device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.x_TK = torch.randn(num_rows, part.inputs, device=self.device).to(self.dtype)
        self.norm_K = torch.ones(part.inputs, dtype=self.dtype, device=self.device)
        self.residual_TN = torch.randn(num_rows, part.width, device=self.device).to(self.dtype)
        self.num_bytes = bytes_of(weights[0])

    def served(self, weight: PackedWeight) -> torch.Tensor:
        """As `TritonModel` computes it without adapters: fused where it fuses. Sums with the residual are left out
        where another kernel adds them."""
        part, x_TK = self.part, self.x_TK
        if can_norm_few(x_TK, weight):
            return few(x_TK, weight, **self.around())
        if part.norm:
            x_TK = add_norm(x_TK, None, self.norm_K, EPS)
        if part.gate:
            return few(x_TK, weight, gate=GATE) if fuses_gate(x_TK, weight) else apply_gate(apply(x_TK, weight), GATE)
        return apply(x_TK, weight)

    def around(self) -> dict[str, Any]:
        part = self.part
        norm = {"norm_K": self.norm_K, "eps": EPS} if part.norm else {"residual_TN": self.residual_TN}
        return norm | ({"gate": GATE} if part.gate else {})

    def variants(self) -> dict[str, Run]:
        """Other kernels and tiles."""
        weight, part = self.weights[0], self.part
        runs: dict[str, Run] = {}
        if isinstance(weight, Weight):
            if weight.scales_N is not None and is_for_few(self.x_TK, weight):
                for tile in VECTOR_8_BITS if self.num_rows == 1 else ROWS_8_BITS:
                    if tile[1] <= part.inputs:
                        runs[f"linear {tile}"] = lambda w, tile=tile: linear(self.x_TK, w, **self.around(), tile=tile)
                if part.norm:
                    runs["norm apart"] = self._norm_apart
            return runs
        if self.num_rows == 1 and weight.kind == "int4":
            runs |= {f"vector {tile}": self._vector(VectorTile(*tile)) for tile in VECTOR_4_BITS}
        rows = rows_tile(self.num_rows, part.width, weight, self.dtype).rows
        if self.num_rows <= 64:
            runs |= {f"rows {rows, *tile}": self._rows(RowsTile(rows, *tile)) for tile in FEW_4_BITS}
        if self.num_rows >= 32:
            runs |= {f"rows {tile}": self._rows(RowsTile(*tile)) for tile in MANY_4_BITS}
            runs["dequantize and multiply"] = self._dequantized
        return runs

    def _norm_apart(self, weight: PackedWeight) -> torch.Tensor:
        x_TK = add_norm(self.x_TK, None, self.norm_K, EPS)
        return few(x_TK, weight, gate=GATE if self.part.gate else 0)

    def _vector(self, tile: VectorTile) -> Run:
        around = {name.replace("_TN", "_1N"): value for name, value in self.around().items()}

        def run(weight: PackedWeight) -> torch.Tensor:
            assert isinstance(weight, GroupedWeight)
            out_1N = torch.empty_like(self.residual_TN)
            vector_product(self.x_TK, weight, out_1N, **around, tile=tile)
            return out_1N

        return run

    def _rows(self, tile: RowsTile) -> Run:
        """Beside the kernel of a norm, if it needs one."""

        def run(weight: PackedWeight) -> torch.Tensor:
            assert isinstance(weight, GroupedWeight)
            x_TK = add_norm(self.x_TK, None, self.norm_K, EPS) if self.part.norm else self.x_TK
            residual_TN = None if self.part.norm or self.num_rows > 1 else self.residual_TN
            out_TN = torch.empty_like(self.residual_TN)
            gate = GATE if self.part.gate else 0
            rows_product(x_TK, weight, out_TN, gate=gate, residual_TN=residual_TN, tile=tile)
            return out_TN

        return run

    def _dequantized(self, weight: PackedWeight) -> torch.Tensor:
        assert isinstance(weight, GroupedWeight)
        x_TK = add_norm(self.x_TK, None, self.norm_K, EPS) if self.part.norm else self.x_TK
        out_TN = F.linear(x_TK, dequantize(weight, self.dtype))
        return apply_gate(out_TN, GATE) if self.part.gate else out_TN

    def us(self, run: Run) -> float:
        return microseconds(lambda: [run(weight) for weight in self.weights], self.device) / len(self.weights)

    def figures(self, name: str, us: float, limits: dict[str, float]) -> dict[str, Any]:
        flops = 2 * self.num_rows * self.part.outputs * self.part.inputs
        return {
            "form": self.form, "part": self.part.name, "rows": self.num_rows, "kernel": name, "us": us,
            "of_read_limit": self.num_bytes / limits["read_tb_s"] / 1e6 / us,
            "of_matmul": flops / us / 1e6 / limits["matmul_tflop_s"],
        }  # fmt: skip


def compile_all(runs: list[tuple[Bench, str, Run]]) -> list[tuple[Bench, str, Run]]:
    """Run each once, on several threads; returns those that can run."""

    def compiles(item: tuple[Bench, str, Run]) -> bool:
        bench, name, run = item
        try:
            with (
                torch.inference_mode(),
                torch.cuda.stream(torch.cuda.Stream() if bench.device.type == "cuda" else None),
            ):
                run(bench.weights[0])
            return True
        except Exception as error:  # too much shared memory, say
            where = f"{bench.form} {bench.part.name} {bench.num_rows} {name}"
            print(f"{where}: {type(error).__name__}: {str(error).splitlines()[0][:90]}", flush=True)
            return False

    is_gpu = bool(runs) and runs[0][0].device.type == "cuda"
    with ThreadPoolExecutor(COMPILERS if is_gpu else 1) as threads:  # the interpreter takes one
        return [item for item, is_fine in zip(runs, threads.map(compiles, runs), strict=True) if is_fine]


def measure_form(
    form: str, parts: tuple[Part, ...], options: argparse.Namespace, limits: dict[str, float], deadline_s: float
) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: list[dict[str, Any]] = []
    for part in parts:
        if time.monotonic() > deadline_s:
            print(f"{form} {part.name}: no time left")
            return results
        weights = [make_weight(part, form, device, dtype)]
        copies = 1 if options.tiny else min(MOST_COPIES, 1 + LEAST_BYTES // bytes_of(weights[0]))
        weights += [make_weight(part, form, device, dtype) for _ in range(copies - 1)]
        runs: list[tuple[Bench, str, Run]] = []
        for count in options.rows:
            bench = Bench(part, form, weights, count)
            runs.append((bench, "served", bench.served))
            if count in (options.sweep or ()):
                runs += [(bench, name, run) for name, run in bench.variants().items()]
        compiled = compile_all(runs)
        until_s = min(deadline_s, time.monotonic() + options.form_s / len(parts))
        for bench, name, run in compiled:
            if time.monotonic() > until_s:
                print(f"{form} {part.name}: no time left")
                break
            note = ""
            if name != "served" and device.type == "cuda":
                expected, found = bench.served(weights[0]).float(), run(weights[0]).float()
                if name.startswith("linear") and not part.norm and not can_norm_few(bench.x_TK, weights[0]):
                    expected = expected + bench.residual_TN.float()  # which the product as served leaves to another
                difference = float((found - expected).abs().max() / expected.abs().max())
                note = "" if difference < 0.03 else f"  DIFFERS by {difference:.3f}"
            results.append(bench.figures(name, bench.us(run), limits) | {"differs": bool(note)})
            figures = results[-1]
            shares = f"{figures['of_read_limit']:>6.1%} {figures['of_matmul']:>6.1%}"
            print(
                f"{form:<9} {part.name:<8} {bench.num_rows:>5} {figures['us']:>9.1f} us {shares}  {name}{note}",
                flush=True,
            )
    return results


def print_best(results: list[dict[str, Any]]) -> None:
    """Of each form, part and number of rows: the kernel as served, and the fastest of those that agree with it."""
    print("\nform      part      rows  served us   best us  kernel")
    shapes = dict.fromkeys((row["form"], row["part"], row["rows"]) for row in results)
    for form, part, rows in shapes:
        tried = [row for row in results if (row["form"], row["part"], row["rows"]) == (form, part, rows)]
        served_us = next((row["us"] for row in tried if row["kernel"] == "served"), float("nan"))
        best = min((row for row in tried if not row["differs"]), key=lambda row: row["us"], default=tried[0])
        print(f"{form:<9} {part:<8} {rows:>5} {served_us:>10.1f} {best['us']:>9.1f}  {best['kernel']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="these numbers of rows")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["none", "int8", "fp8", "int4/32", "int4/128"])
    parser.add_argument("--parts", nargs="+", default=None, help="qkv, output, gate_up, down")
    parser.add_argument("--sweep", nargs="*", type=int, help="also other kernels and tiles, for these numbers of rows")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny matrices, to try the program itself")
    parser.add_argument("--limit-s", type=float, default=360, help="nothing is measured after this time")
    parser.add_argument("--form-s", type=float, default=120, help="nor of a form after this time of its own")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    deadline_s = time.monotonic() + options.limit_s
    limits = measure(options.device, *((2**20, 64) if options.tiny else (2**32, 8192)))
    print("  ".join(f"{name} {value:.2f}" for name, value in limits.items()))
    parts = tuple(part for part in (TINY if options.tiny else LAYER) if part.name in (options.parts or [part.name]))
    results = []
    print(f"{'form':<9} {'part':<8} {'rows':>5} {'':>9}    {'read':>6} {'matmul':>6}  kernel")
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream() if options.device == "cuda" else None):
        for form in options.forms:
            results += measure_form(form, parts, options, limits, deadline_s)
    print_best(results)
    if not options.no_record:
        write_result("quantized_kernels", {"limits": limits, "rows": results})


if __name__ == "__main__":
    main()
