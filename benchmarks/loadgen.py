"""Streaming load on an OpenAI-compatible server: the one instrument for every serving figure.

    python benchmarks/loadgen.py --url http://127.0.0.1:8000 --model m -n 512 -c 256 --prompt-tokens 512

Sends N streaming completions, C at once, from P processes over plain sockets (standard library only, so it runs
anywhere and is not itself the bottleneck), and prints one JSON line:

    tok_s       output tokens (as the server's own usage chunk counts them) over wall seconds
    ttft_ms     [p50, p99] time from sending the request to its first text event
    itl_ms      [p50, p99] gap between two text events of one stream (a server may put several tokens in one
                event: tpot_ms is the figure that cannot be dressed up)
    tpot_ms     [p50, p99] (last event - first event) / (tokens - 1), per stream
    errors      requests that did not end with HTTP 200, a usage chunk and [DONE]

Only loopback addresses are accepted.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import random
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they"
    " which one you were her all she there would their we him been has when who will more no if out so said what"
    " up its about into than them can only other new some could time these two may then do first any my now such"
    " like our over man me even most made after also did many before must through back years where much your way"
    " well down should because each just those people how too little state good very make world still own see men"
    " work long get here between both life being under never day same another know while last might us great old"
    " year off come since against go came right used take three"
).split()


@dataclass
class Outcome:
    """What one request came to; times are time.perf_counter() seconds."""

    ok: bool = False
    tokens: int = 0
    sent_at_s: float = 0.0
    event_times_s: list[float] = field(default_factory=list)  # of events with text
    why: str = ""  # it failed

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.event_times_s, self.event_times_s[1:], strict=False)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", default="", help="a,b,c: spread the requests over these names as their model")
    parser.add_argument("-n", type=int, default=64, help="requests")
    parser.add_argument("-c", type=int, default=16, help="at once")
    parser.add_argument("-p", type=int, default=1, help="processes that send")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=10000, help="token ids are drawn from 10..vocab")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--text", action="store_true", help="send words, for servers that take no token ids")
    parser.add_argument("--chat", action="store_true", help="post chat completions with a user message of words")
    parser.add_argument("--lenient", action="store_true", help="for servers that refuse ignore_eos and send no [DONE]")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=600)
    parser.add_argument("--label", default="")
    return parser.parse_args()


def make_body(options: argparse.Namespace, index: int) -> tuple[str, bytes]:
    """Path and body of a request; the same index and seed give the same one."""
    chance = random.Random(options.seed * 1_000_003 + index)
    names = [name for name in options.adapters.split(",") if name] or [options.model]
    body: dict[str, Any] = {
        "model": names[index % len(names)],
        "max_tokens": options.output_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not options.lenient:
        body["ignore_eos"] = True
    if options.chat:
        body["messages"] = [{"role": "user", "content": " ".join(chance.choices(WORDS, k=options.prompt_tokens))}]
        return "/v1/chat/completions", json.dumps(body).encode()
    if options.text:
        body["prompt"] = " ".join(chance.choices(WORDS, k=options.prompt_tokens))
    else:
        body["prompt"] = [chance.randrange(10, options.vocab) for _ in range(options.prompt_tokens)]
    return "/v1/completions", json.dumps(body).encode()


async def send_one(options: argparse.Namespace, host: str, port: int, index: int) -> Outcome:
    path, payload = make_body(options, index)
    authorization = f"authorization: Bearer {options.api_key}\r\n" if options.api_key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{authorization}"
        f"content-length: {len(payload)}\r\nconnection: close\r\n\r\n"
    )
    outcome = Outcome(sent_at_s=time.perf_counter())
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    try:
        writer.write(head.encode() + payload)
        status = await reader.readline()
        if b" 200 " not in status:
            outcome.why = (status + await reader.read()).decode(errors="replace")  # to the end: Connection: close
            return outcome
        is_done = False
        while not is_done and (line := await reader.readline()):
            is_done = line.startswith(b"data: [DONE]")
            if line.startswith(b"data: ") and not is_done:
                note_event(outcome, line)
        outcome.ok = (is_done or options.lenient) and outcome.tokens > 0
        return outcome
    finally:
        writer.close()


def note_event(outcome: Outcome, line: bytes) -> None:
    now_s = time.perf_counter()
    event = json.loads(line[6:])
    if event.get("usage"):
        outcome.tokens = event["usage"]["completion_tokens"]
    if "error" in event:
        outcome.why = line.decode(errors="replace")
        return
    choice = (event.get("choices") or [{}])[0]
    if choice.get("text") or (choice.get("delta") or {}).get("content"):  # role, finish and usage carry no text
        outcome.event_times_s.append(now_s)


async def drive(options: argparse.Namespace, host: str, port: int, indices: list[int], at_once: int) -> list[Outcome]:
    gate = asyncio.Semaphore(at_once)

    async def guarded(index: int) -> Outcome:
        async with gate:
            try:
                return await asyncio.wait_for(send_one(options, host, port, index), options.timeout_s)
            except (OSError, ValueError) as error:  # a time-out is an OSError
                return Outcome(why=repr(error))

    return await asyncio.gather(*(guarded(index) for index in indices))


def run_process(job: tuple[argparse.Namespace, str, int, list[int], int]) -> list[Outcome]:
    return asyncio.run(drive(*job))


def percentiles_ms(values_s: list[float]) -> list[float | None]:
    """[p50, p99]: the smallest value that at least this share of all do not exceed."""
    ordered = sorted(values_s)
    places = [math.ceil(percent * len(ordered) / 100) - 1 for percent in (50, 99)]
    return [round(ordered[place] * 1e3, 2) if ordered else None for place in places]


def main() -> None:
    options = parse_args()
    url = urlsplit(options.url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit("loadgen only sends to loopback addresses")
    count, at_once, processes = options.n, options.c, options.p
    jobs = [
        (
            options,
            host,
            port,
            list(range(k, count, processes)),
            max(1, at_once // processes + (k < at_once % processes)),
        )
        for k in range(processes)
    ]
    started_s = time.perf_counter()
    if processes == 1:
        outcomes = run_process(jobs[0])
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.map(abs, range(processes))  # start the processes before the clock
            started_s = time.perf_counter()
            outcomes = [outcome for part in pool.map(run_process, jobs, chunksize=1) for outcome in part]
    wall_s = time.perf_counter() - started_s
    good = [outcome for outcome in outcomes if outcome.ok]
    spoke = [outcome for outcome in good if outcome.event_times_s]
    tokens = sum(outcome.tokens for outcome in good)
    figures = {
        "label": options.label,
        "n": count,
        "c": at_once,
        "prompt": options.prompt_tokens,
        "output": options.output_tokens,
        "out_tokens": tokens,
        "wall_s": round(wall_s, 2),
        "tok_s": round(tokens / wall_s, 1),
        "ttft_ms": percentiles_ms([outcome.event_times_s[0] - outcome.sent_at_s for outcome in spoke]),
        "itl_ms": percentiles_ms([gap for outcome in good for gap in outcome.gaps_s]),
        "tpot_ms": percentiles_ms([sum(o.gaps_s) / (o.tokens - 1) for o in spoke if o.tokens > 1]),
        "errors": len(outcomes) - len(good),
        "why": next((outcome.why[:1000] for outcome in outcomes if not outcome.ok), ""),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
