"""The first token of a long chat that returns after its blocks were evicted, and after a restart.

    python -m benchmarks.offload                      a chat of 4,000 tokens, the demo model
    python -m benchmarks.offload --ours "python -m stellarbyte_server --port {port} --model PATH --device cuda"

Each server has room in its KV cache for about one such chat, so a second one evicts the first. The target: at least 5
times sooner than a server that computes it again, and no gap of a running stream more than 20 ms longer.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time

import httpx

from benchmarks.prompt_beside_streams import Stream
from benchmarks.serve import OURS, running_ours
from benchmarks.support.record import write_result

ANSWER_TOKENS = 2
TURN_TOKENS = 16  # of the new turn with which the chat returns


async def first_token_s(client: httpx.AsyncClient, model: str, prompt: list[int]) -> float:
    stream, started_s = Stream(), time.perf_counter()
    await stream.run(client, model, prompt, ANSWER_TOKENS)
    return stream.token_times_s[0] - started_s


async def beside_stream(client: httpx.AsyncClient, model: str, prompt: list[int]) -> tuple[float, float, float]:
    """Seconds to the first token of a prompt; the longest gap of a running stream before it, and meanwhile."""
    stream = Stream()
    task = asyncio.create_task(stream.run(client, model, [1, 2, 3], 400))
    while len(stream.token_times_s) < 40:
        await asyncio.sleep(0.01)
    started_s = time.perf_counter()
    elapsed_s = await first_token_s(client, model, prompt)
    task.cancel()
    before, meanwhile = stream.gaps_ms(0, started_s), stream.gaps_ms(started_s, started_s + elapsed_s)
    return elapsed_s, max(before[5:]), max(meanwhile, default=0.0)


async def measure(url: str, prompts: list[list[int]], *, is_restarted: bool) -> dict[str, float]:
    """Of a server that has read the first prompt before (`is_restarted`), or reads it first."""
    chat, others = prompts[0], prompts[1:]
    returned = [*chat, *range(1000, 1000 + TURN_TOKENS)]
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=httpx.Limits(max_connections=None)) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await first_token_s(client, model, [1, 2, 3])  # what the first request of a server costs
        if is_restarted:
            return {"restarted_s": round(await first_token_s(client, model, returned), 4)}
        figures = {"cold_s": round(await first_token_s(client, model, chat), 4)}
        await first_token_s(client, model, others[0])
        figures["returned_s"] = round(await first_token_s(client, model, returned), 4)
        await first_token_s(client, model, others[1])
        elapsed_s, before_ms, meanwhile_ms = await beside_stream(client, model, returned)
        return figures | {
            "returned_beside_stream_s": round(elapsed_s, 4),
            "longest_gap_ms": round(before_ms, 1),
            "longest_gap_while_returning_ms": round(meanwhile_ms, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", default=OURS, help=f"command of the server (default: {OURS})")
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--kv-cache-memory", default="230MiB", help="room for one chat (default: of the demo model)")
    parser.add_argument("--offload-memory", default="2GiB")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    chance = random.Random(0)
    prompts = [[chance.randrange(1000, 40000) for _ in range(options.prompt_tokens)] for _ in range(3)]
    max_model_len = options.prompt_tokens + 500
    common = f"{options.ours} --max-model-len {max_model_len} --kv-cache-memory {options.kv_cache_memory}"
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        disk = f" --kv-offload-dir {folder} --kv-offload-bytes 20GiB"
        memory = f" --kv-offload-memory {options.offload_memory}"
        for name, flags in (("without", ""), ("memory", memory), ("disk", disk)):
            with running_ours(common + flags) as url:
                figures[name] = asyncio.run(measure(url, prompts, is_restarted=False))
                time.sleep(2)  # what is still to be written
            print(name, json.dumps(figures[name]), flush=True)
        with running_ours(common + disk) as url:
            figures["disk"] |= asyncio.run(measure(url, prompts, is_restarted=True))
    without_s = figures["without"]["returned_s"]
    sooner = {
        "memory": round(without_s / figures["memory"]["returned_s"], 1),
        "disk": round(without_s / figures["disk"]["returned_s"], 1),
        "restart": round(without_s / figures["disk"]["restarted_s"], 1),
    }
    print(json.dumps(figures | {"times_sooner": sooner}, indent=1))
    if not options.no_record:
        shape = {"ours": options.ours, "prompt_tokens": options.prompt_tokens}
        write_result("offload", shape | figures | {"times_sooner": sooner})


if __name__ == "__main__":
    main()
