"""Our server over HTTP with random weights: its start, then streams from loadgen. Started by benchmarks.gpu.

A server compiles kernels for later requests in its first seconds; streams are measured after that.

python -m benchmarks.gpu.http --device cuda --folder TMP 0.6b/start 0.6b/http-64
"""

import argparse
import contextlib
import json
import shlex
import sys
import time
import urllib.request
from pathlib import Path

from benchmarks.gpu.workloads import (
    ENGINES,
    MAX_MODEL_LEN,
    MAX_STEP_TOKENS,
    report,
    reporting_failure,
    shape_of,
    write_config,
)
from benchmarks.serve import Server, Workload, load, running_ours

START = "0.6b/start"
KERNELS_READY = "kernels are ready"  # in the log line of stellarbyte.backends.gpu.preparation
KERNELS_LIMIT_S = 60
MOST_LOG = 4000  # characters of the server's last lines, shown at the end
NAME = "model"  # name of the folder, and so of the served model
WORKLOADS = {
    "0.6b/http-1": Workload(streams=1, requests=4, prompt_tokens=128, output_tokens=512),
    "0.6b/http-64": Workload(streams=64, requests=128, prompt_tokens=512, output_tokens=256, flags=["-p", "4"]),
    "0.6b/http-256": Workload(streams=256, requests=512, prompt_tokens=512, output_tokens=256, flags=["-p", "4"]),
}
TINY_WORKLOAD = Workload(streams=2, requests=4, prompt_tokens=8, output_tokens=4, flags=["--vocab", "400"])


def first_answer(url: str) -> None:
    body = json.dumps({"model": NAME, "prompt": [10, 11, 12], "max_tokens": 1, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()


def await_kernels(log: Path) -> None:
    """Wait until the server has compiled its kernels in the background."""
    deadline_s = time.monotonic() + KERNELS_LIMIT_S
    while KERNELS_READY not in log.read_text():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the kernels were not ready within {KERNELS_LIMIT_S} s")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="+", choices=[START, *WORKLOADS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", required=True, type=Path)
    options = parser.parse_args()
    engine = ENGINES["0.6b"]
    folder = write_config(shape_of(engine, is_tiny=options.tiny), options.folder / NAME)
    command = (
        f"python -m stellarbyte_server --port {{port}} --model {shlex.quote(str(folder))} --load-format dummy"
        f" --device {options.device} --dtype bfloat16 --max-model-len {MAX_MODEL_LEN}"
        f" --max-num-seqs {engine.max_num_seqs} --max-num-batched-tokens {MAX_STEP_TOKENS}"
    )
    log = options.folder / "server.log"
    started_s = time.perf_counter()
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(log.open("w"))
        stack.callback(lambda: print(log.read_text()[-MOST_LOG:], file=sys.stderr))
        with reporting_failure(options.works):
            url = stack.enter_context(running_ours(command, lines))
            first_answer(url)
        if START in options.works:
            report(START, {"start_s": time.perf_counter() - started_s})
        streams = [work for work in options.works if work != START]
        if streams and options.device == "cuda":
            with reporting_failure(streams):
                await_kernels(log)
        server = Server("ours", url, NAME, [])
        for name, workload in WORKLOADS.items():
            if name not in options.works:
                continue
            workload = TINY_WORKLOAD if options.tiny else workload
            with reporting_failure([name]):
                load(server, workload, seed=1)  # compiles and captures the kernels
                figures = load(server, workload, seed=2)
                if figures["errors"]:
                    raise RuntimeError(f"{figures['errors']} requests failed: {figures['why']}")
            for key in ("ttft_ms", "tpot_ms"):
                figures[key], figures[f"{key}_p99"] = figures[key]
            report(name, figures)


if __name__ == "__main__":
    main()
