"""Gaps between tokens of running streams while a long prompt is computed, and the prompt's delay.

    python -m benchmarks.prompt_beside_streams              16 streams and prompts of 1,024 tokens, the demo model

The target: the streams' 99th percentile gap while the prompts are read is at most 3 times what it is without them.
"""

import argparse
import asyncio
import json
import random
import statistics
import time

import httpx

from benchmarks.serve import OURS, running_ours
from benchmarks.support.record import write_result

WARM_UP_S = 1.0


class Stream:
    """A running completion, with the arrival times of its tokens."""

    def __init__(self) -> None:
        self.token_times_s: list[float] = []

    async def run(self, client: httpx.AsyncClient, model: str, prompt: list[int] | str, max_tokens: int) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        async with client.stream(
            "POST", "/v1/completions", json=body | {"ignore_eos": True, "temperature": 0.6}
        ) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["finish_reason"] is None:
                    self.token_times_s.append(time.perf_counter())

    def gaps_ms(self, start_s: float, stop_s: float) -> list[float]:
        """Gaps that end in this time."""
        pairs = zip(self.token_times_s, self.token_times_s[1:], strict=False)
        return [(after - before) * 1000 for before, after in pairs if start_s < after <= stop_s]


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1), "max": round(max(values), 1), "count": len(values)}


async def measure(
    url: str, num_streams: int, prompt_tokens: int, num_prompts: int, quiet_s: float
) -> dict[str, object]:
    chance = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [chance.randrange(1000, 40000) for _ in range(length)]

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        streams = [Stream() for _ in range(num_streams)]
        tasks = [asyncio.create_task(stream.run(client, model, prompt(32), 4000)) for stream in streams]
        while not all(stream.token_times_s for stream in streams):
            await asyncio.sleep(0.05)
        await asyncio.sleep(WARM_UP_S)
        quiet_start_s = time.perf_counter()
        await asyncio.sleep(quiet_s)
        quiet_end_s = time.perf_counter()
        quiet = [gap for stream in streams for gap in stream.gaps_ms(quiet_start_s, quiet_end_s)]
        busy, first_token_ms = [], []
        for _ in range(num_prompts):
            long = Stream()
            started_s = time.perf_counter()
            await long.run(client, model, prompt(prompt_tokens), 2)
            first_s = long.token_times_s[0]
            first_token_ms.append(round((first_s - started_s) * 1000, 1))
            busy += [gap for stream in streams for gap in stream.gaps_ms(started_s, first_s)]
            await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
    without, beside = percentiles(quiet), percentiles(busy)
    return {
        "gap_ms_without_prompt": without,
        "gap_ms_beside_prompt": beside,
        "p99_ratio": round(beside["p99"] / without["p99"], 2),
        "first_token_ms": first_token_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", default=OURS, help=f"command of the server (default: {OURS})")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=3, help="one after the other")
    parser.add_argument("--quiet-seconds", type=float, default=10.0, help="of streams alone")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    with running_ours(options.ours) as url:
        figures = asyncio.run(
            measure(url, options.streams, options.prompt_tokens, options.prompts, options.quiet_seconds)
        )
    print(json.dumps(figures, indent=1))
    if not options.no_record:
        shape = {"ours": options.ours, "streams": options.streams, "prompt_tokens": options.prompt_tokens}
        write_result("prompt_beside_streams", shape | figures)


if __name__ == "__main__":
    main()
