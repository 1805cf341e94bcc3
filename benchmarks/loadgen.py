"""Streaming load on a server on this machine, from several processes: the figures of all serving benchmarks.

    python -m benchmarks.loadgen --url http://127.0.0.1:8000 --model m -n 512 -c 256 --prompt-tokens 512

Sends N streaming requests, C at once, from P processes, and prints one JSON line: tok_s (output tokens, by the server's
usage chunk, over wall seconds), the times of `LoadFigures`, and errors, the number of requests without HTTP 200, a
usage chunk and [DONE]. `stellarbyte bench` has the same generator and figures.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stellarbyte_client.address import GENERATION_TIMEOUT_S, Address
from stellarbyte_client.terminal.load import LoadFigures, LoadGenerator, LoadRequest, Outcome

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they"
    " which one you were her all she there would their we him been has when who will more no if out so said what"
    " up its about into than them can only other new some could time these two may then do first any my now such"
    " like our over man me even most made after also did many before must through back years where much your way"
    " well down should because each just those people how too little state good very make world still own see men"
    " work long get here between both life being under never day same another know while last might us great old"
    " year off come since against go came right used take three"
).split()


@dataclass(frozen=True, kw_only=True)
class Load:
    """A RequestMaker: the same request number and seed give the same request."""

    models: Sequence[str]
    prompt_tokens: int
    output_tokens: int
    form: str = "token_ids"  # of prompts; "text": words, "chat": words as a user message
    vocab: int = 10000
    temperature: float = 0.6
    seed: int = 0
    lenient: bool = False

    def __call__(self, _: int, request: int) -> LoadRequest:
        chance = random.Random(self.seed * 1_000_003 + request)
        body: dict[str, Any] = {
            "model": self.models[request % len(self.models)],
            "max_tokens": self.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not self.lenient:
            body["ignore_eos"] = True
        if self.form == "token_ids":
            body["prompt"] = [chance.randrange(10, self.vocab) for _ in range(self.prompt_tokens)]
            return LoadRequest(path="/v1/completions", body=body)
        words = " ".join(chance.choices(WORDS, k=self.prompt_tokens))
        if self.form == "text":
            return LoadRequest(path="/v1/completions", body={**body, "prompt": words})
        return LoadRequest(path="/v1/chat/completions", body={**body, "messages": [{"role": "user", "content": words}]})


def send(load: Load, address: Address, requests: Sequence[int], streams: int) -> list[Outcome]:
    """Send the requests with these numbers from this process."""

    generator = LoadGenerator(address, needs_done=not load.lenient)
    return asyncio.run(generator.run(load, streams=streams, requests=requests))


def local_address(url: str, api_key: str = "", timeout_s: float = GENERATION_TIMEOUT_S) -> Address:
    """SystemExit unless `url` is on this machine."""
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"--url must be a loopback address, such as http://127.0.0.1:8000; {url!r} is not.")
    return Address.of(url, api_key, None, timeout_s)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", default="", help="a,b,c: spread the requests over these names as their model")
    parser.add_argument("-n", type=int, default=64, help="requests")
    parser.add_argument("-c", type=int, default=16, help="concurrent requests")
    parser.add_argument("-p", type=int, default=1, help="sending processes")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=10000, help="token ids are drawn from 10..vocab")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--text", action="store_true", help="send words, for servers that take no token ids")
    parser.add_argument("--chat", action="store_true", help="post chat completions with a user message of words")
    parser.add_argument("--lenient", action="store_true", help="for servers without ignore_eos and [DONE]")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=600)
    parser.add_argument("--label", default="")
    return parser.parse_args()


def send_from_processes(
    load: Load, address: Address, requests: int, streams: int, processes: int
) -> tuple[list[Outcome], float]:
    """All outcomes, and the wall seconds without the start of the processes."""
    jobs = [
        (load, address, range(k, requests, processes), max(1, streams // processes + (k < streams % processes)))
        for k in range(processes)
    ]
    if processes == 1:
        started_s = time.perf_counter()
        return send(*jobs[0]), time.perf_counter() - started_s
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(abs, range(processes))  # start the processes before the clock
        started_s = time.perf_counter()
        outcomes = [outcome for part in pool.starmap(send, jobs, chunksize=1) for outcome in part]
        return outcomes, time.perf_counter() - started_s


def main() -> None:
    options = parse_args()
    load = Load(
        models=[name for name in options.adapters.split(",") if name] or [options.model],
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        form="chat" if options.chat else "text" if options.text else "token_ids",
        vocab=options.vocab,
        temperature=options.temperature,
        seed=options.seed,
        lenient=options.lenient,
    )
    address = local_address(options.url, options.api_key, options.timeout_s)
    figures = LoadFigures.of(*send_from_processes(load, address, options.n, options.c, options.p))
    printed = {
        "label": options.label,
        "n": options.n,
        "c": options.c,
        "prompt": options.prompt_tokens,
        "output": options.output_tokens,
        "out_tokens": figures.tokens,
        "wall_s": figures.wall_s,
        "tok_s": figures.tokens_per_s,
        "ttft_ms": figures.ttft_ms,
        "itl_ms": figures.itl_ms,
        "tpot_ms": figures.tpot_ms,
        "errors": figures.num_errors,
        "why": next(iter(figures.errors), "")[:1000],
    }
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
