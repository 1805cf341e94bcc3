"""The cost of adapters: tokens a second with eight at once and with none, and loading a large one during streams.

    python -m benchmarks.adapters
    python -m benchmarks.adapters --quantization int8

Starts our server on the demo model with random adapters for all linear modules. Throughput: the same load on the base
model, on one adapter and on eight (by request in turn), in turn for some rounds; ratios are within a round, and the
result is their median. Loading: the time from the call to the end of the first answer, and the longest gap between two
tokens of running streams during that time.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch

from benchmarks.loadgen import Load, local_address, send
from benchmarks.serve import OURS, Server, Workload, load, running_ours
from benchmarks.support.record import write_result
from stellarbyte.checkpoint.native import load_model
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.lora import LoRAConfig, apply_lora_to_model, save_adapter
from stellarbyte_client.terminal.load import Outcome

MODEL = "SmolLM2-135M-Instruct"
NUM_ADAPTERS = 8


def write_adapters(folder: Path, rank: int, large_rank: int) -> None:
    """a0 .. a7 of `rank` and large0 .. large3 of `large_rank`, in float32, with random numbers."""
    for names, r in (([f"a{i}" for i in range(NUM_ADAPTERS)], rank), ([f"large{i}" for i in range(4)], large_rank)):
        model = load_model(resolve_model("demo"), dtype=torch.float32)
        apply_lora_to_model(model, LoRAConfig(r=r, lora_alpha=r, target_modules="all-linear"))
        for name in names:
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    if ".lora_B" in parameter_name:
                        parameter.normal_(std=0.01)
            save_adapter(model, folder / name)


def call(url: str, route: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def measure_throughput(url: str, streams: list[int], rounds: int) -> list[dict[str, Any]]:
    adapters = ",".join(f"a{i}" for i in range(NUM_ADAPTERS))
    server = Server("ours", url, MODEL, [])
    kinds: dict[str, list[str]] = {"base": [], "one": ["--adapters", "a0"], "eight": ["--adapters", adapters]}
    load(server, Workload(8, 8, 16, 4, kinds["eight"]), seed=99)
    runs = []
    for number in range(rounds):
        for count in streams:
            for kind, flags in kinds.items():
                figures = load(server, Workload(count, 2 * count, 128, 64, flags), seed=number)
                runs.append({"kind": kind, "round": number, "streams": count, **figures})
    return runs


def print_throughput(runs: list[dict[str, Any]]) -> None:
    print(f"{'streams':>8} {'adapters':<9} {'tok/s':>8} {'ms/token':>9} {'of base':>8} {'of base, decoding':>18}")
    for count in sorted({run["streams"] for run in runs}):
        for kind in ("base", "one", "eight"):
            mine = [run for run in runs if (run["streams"], run["kind"]) == (count, kind)]
            base = [run for run in runs if (run["streams"], run["kind"]) == (count, "base")]
            ratio = statistics.median(m["tok_s"] / b["tok_s"] for m, b in zip(mine, base, strict=True))
            decoding = statistics.median(b["tpot_ms"][0] / m["tpot_ms"][0] for m, b in zip(mine, base, strict=True))
            tok_s, tpot = (
                statistics.median(r["tok_s"] for r in mine),
                statistics.median(r["tpot_ms"][0] for r in mine),
            )
            print(f"{count:>8} {kind:<9} {tok_s:>8.1f} {tpot:>9.2f} {ratio:>8.2f} {decoding:>18.2f}")


def measure_load(url: str, name: str) -> dict[str, float]:
    """Load, answer one token, unload; milliseconds from the call on."""
    started_s = time.perf_counter()
    loaded = call(url, "load_lora_adapter", lora_name=f"{name}-loaded", lora_path=name)
    loaded_s = time.perf_counter()
    call(url, "completions", model=f"{name}-loaded", prompt=[5], max_tokens=1)
    served_s = time.perf_counter()
    freed = call(url, "unload_lora_adapter", lora_name=f"{name}-loaded")
    return {
        "loaded_ms": round((loaded_s - started_s) * 1e3, 1),
        "served_ms": round((served_s - started_s) * 1e3, 1),
        "bytes": loaded["bytes"],
        "freed_bytes": freed["freed_bytes"],
        "started_s": started_s,
        "ended_s": served_s,
    }


def measure_loads_beside_streams(url: str, streams: int, tokens: int) -> dict[str, Any]:
    """Loads while `streams` run, and the gaps between their tokens with and without a load in progress."""
    work = Load(models=[MODEL], prompt_tokens=16, output_tokens=tokens, seed=5)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.extend(send(work, local_address(url), range(streams), streams)))
    thread.start()
    time.sleep(2)
    loads = []
    for i in range(4):
        loads.append(measure_load(url, f"large{i}"))
        time.sleep(1)
    thread.join()
    inside, outside = [], []
    for outcome in outcomes:
        for before, after in zip(outcome.event_times_s, outcome.event_times_s[1:], strict=False):
            if before < loads[0]["started_s"] - 1 or after > loads[-1]["ended_s"] + 1:
                continue
            is_inside = any(before < load["ended_s"] and after > load["started_s"] for load in loads)
            (inside if is_inside else outside).append(after - before)
    return {
        "streams": streams,
        "loads": loads,
        "gap_ms_between_loads": {"median": _ms(statistics.median(outside)), "max": _ms(max(outside))},
        "gap_ms_during_loads": {"median": _ms(statistics.median(inside)), "max": _ms(max(inside))},
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--large-rank", type=int, default=64, help="64: 78 MB")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), options.rank, options.large_rank)
        command = (
            f"{OURS} --adapter-dir {folder} --allow-local-admin --max-loras 9 --quantization {options.quantization}"
        )
        with running_ours(command) as url:
            runs = measure_throughput(url, options.streams, options.rounds)
            print_throughput(runs)
            idle = [measure_load(url, f"large{i}") for i in range(4)]
            busy = {count: measure_loads_beside_streams(url, count, 400 // count + 100) for count in options.streams}
    size = idle[0]["bytes"] / 1e6
    print(f"load of {size:.0f} MB to its first answer, idle: {[load['served_ms'] for load in idle]} ms")
    for count, figures in busy.items():
        print(
            f"  beside {count} streams: {[load['served_ms'] for load in figures['loads']]} ms; gaps during loads"
            f" {figures['gap_ms_during_loads']} ms, otherwise {figures['gap_ms_between_loads']} ms"
        )
    if not options.no_record:
        write_result(
            "adapters",
            {"quantization": options.quantization, "runs": runs, "idle_loads": idle, "busy_loads": list(busy.values())},
        )


if __name__ == "__main__":
    main()
