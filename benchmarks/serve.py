"""The same load on our server and on others, in turn, on one machine: tokens a second and the ratio.

    python -m benchmarks.serve                                        ours, the demo model
    python -m benchmarks.serve --url peer=http://127.0.0.1:9000 --chat
    python -m benchmarks.serve --ours "python -m stellarbyte_server --port {port} --model path/to/model"

Every round sends each workload to each server in turn, so that drifts of the machine's speed affect all alike; the
table shows medians over the rounds. Our server is started and stopped here; others must be running.
"""

import argparse
import contextlib
import json
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from benchmarks.support.record import ROOT, write_result

OURS = "python -m stellarbyte_server --port {port} --log-level warning"
START_LIMIT_S = 180


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    model: str
    flags: list[str]  # for loadgen


@dataclass(frozen=True)
class Workload:
    streams: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    flags: list[str] = field(default_factory=list)  # for loadgen


@contextlib.contextmanager
def running_ours(command: str, log: TextIO | None = None) -> Iterator[str]:
    """Start our server on a free port; yields its URL. Its log goes to `log`, or to our stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program, *arguments = shlex.split(command.replace("{port}", str(port)))
    program = sys.executable if program == "python" else program
    process = subprocess.Popen([program, *arguments], cwd=ROOT, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + START_LIMIT_S
        while not _answers(f"{url}/ready"):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit("our server did not start")
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def _first_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        return json.load(answer)["data"][0]["id"]


def _pairs(arguments: list[str], flag: str) -> dict[str, str]:
    """NAME=VALUE arguments as a dict."""
    pairs = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(pairs) != len(arguments):
        raise SystemExit(f"{flag} takes NAME=VALUE, each name once")
    return pairs


def load(server: Server, workload: Workload, seed: int) -> dict[str, Any]:
    """One run of loadgen."""
    command = [sys.executable, "-m", "benchmarks.loadgen", "--url", server.url, "--model", server.model]
    command += ["-n", str(workload.requests), "-c", str(workload.streams), "--seed", str(seed), "--label", server.name]
    command += ["--prompt-tokens", str(workload.prompt_tokens), "--output-tokens", str(workload.output_tokens)]
    output = subprocess.run(
        [*command, *workload.flags, *server.flags], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    return json.loads(output)


def compare(servers: list[Server], workloads: list[Workload], rounds: int) -> list[dict[str, Any]]:
    """Every run's figures, in order of time."""
    for server in servers:  # warm-up: a server's first request is slow
        load(server, Workload(1, 1, 16, 8, workloads[0].flags), seed=99)
    runs = []
    for number in range(rounds):
        for workload in workloads:
            for server in servers:
                figures = load(server, workload, seed=number)
                runs.append({"server": server.name, "round": number, "streams": workload.streams, **figures})
                if figures["errors"]:
                    print(f"{server.name}: {figures['errors']} requests failed: {figures['why']}", file=sys.stderr)
    return runs


def print_table(servers: list[Server], workloads: list[Workload], runs: list[dict[str, Any]]) -> None:
    print(f"{'streams':>8} {'server':<16} {'tok/s':>9} {'TTFT ms':>9} {'ms/token':>9} {'errors':>7} {'first/this':>11}")
    for workload in workloads:
        reference = None
        for server in servers:
            mine = [run for run in runs if run["server"] == server.name and run["streams"] == workload.streams]
            tok_s = statistics.median(run["tok_s"] for run in mine)
            reference = tok_s if reference is None else reference
            times = [statistics.median(run[name][0] or 0 for run in mine) for name in ("ttft_ms", "tpot_ms")]
            print(
                f"{workload.streams:>8} {server.name:<16} {tok_s:>9.1f} {times[0]:>9.1f} {times[1]:>9.2f}"
                f" {sum(run['errors'] for run in mine):>7} {reference / tok_s if tok_s else float('inf'):>10.2f}×"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", default=OURS, help=f"command of our server (default: {OURS}); empty: none")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="a server that runs already")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=MODEL", help="default: its first model")
    parser.add_argument("--lenient", nargs="*", default=[], metavar="NAME", help="see loadgen")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chat", action="store_true", help="chats of words, for servers without /v1/completions")
    parser.add_argument("--text", action="store_true", help="words in place of token ids")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    urls, names = _pairs(options.url, "--url"), _pairs(options.model, "--model")
    flags = [flag for flag, is_wanted in (("--chat", options.chat), ("--text", options.text)) if is_wanted]
    workloads = [
        Workload(n, n * options.requests_per_stream, options.prompt_tokens, options.output_tokens, flags)
        for n in options.streams
    ]
    with contextlib.ExitStack() as stack:
        if options.ours:
            urls = {"ours": stack.enter_context(running_ours(options.ours)), **urls}
        servers = [
            Server(
                name,
                url,
                names[name] if name in names else _first_model(url),
                ["--lenient"] if name in options.lenient else [],
            )
            for name, url in urls.items()
        ]
        runs = compare(servers, workloads, options.rounds)
    print_table(servers, workloads, runs)
    if not options.no_record:
        write_result("serve", {"ours": options.ours, "servers": list(urls), "runs": runs})


if __name__ == "__main__":
    main()
