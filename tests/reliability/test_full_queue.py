"""Many more requests at once than may wait: each is answered, either rightly or with 429 and when to come again."""

import asyncio
import time

import httpx

from tests.server_process import REAL, running

AT_ONCE, QUEUE, RUNNING = 256, 32, 4
MOST_REFUSAL_S = 5.0  # of a machine that is busy with other things; what is wanted is 0.25


def body(number: int) -> dict:
    return {
        "model": "tiny", "prompt": [5, 10 + number % 16, 7], "max_tokens": 20, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip


async def ask(client: httpx.AsyncClient, number: int) -> tuple[int, httpx.Response, float]:
    started_s = time.monotonic()
    response = await client.post("/v1/completions", json=body(number))
    return number, response, time.monotonic() - started_s


async def all_at_once(url: str) -> tuple[list[tuple[int, httpx.Response, float]], list[str]]:
    """The answers, and what the first prompts get when they are asked one after the other."""
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        expected = [(await ask(client, number))[1].json()["choices"][0]["text"] for number in range(16)]
        return await asyncio.gather(*(ask(client, number) for number in range(AT_ONCE))), expected


def test_a_full_queue_refuses_at_once_and_answers_the_others_rightly(tiny_model: str) -> None:
    flags = ["--max-num-seqs", str(RUNNING), "--max-queued-requests", str(QUEUE)]
    with running(REAL, "--model", tiny_model, *flags) as server:
        answers, expected = asyncio.run(all_at_once(server.url))
        assert server.metric("vllm:num_requests_running") == 0 == server.metric("vllm:kv_cache_usage_perc")
    refused_s = []
    for number, response, seconds in answers:
        if response.status_code == 200:
            assert response.json()["choices"][0]["text"] == expected[number % 16]
            continue
        assert response.status_code == 429 and int(response.headers["Retry-After"]) >= 1, response.text
        assert response.json()["error"]["type"] == "rate_limit_error"
        refused_s.append(seconds)
    refused_s.sort()
    p99_s = refused_s[int(0.99 * len(refused_s))]
    print(f"\n{AT_ONCE - len(refused_s)} answered, {len(refused_s)} refused, 99% of them within {1000 * p99_s:.0f} ms")
    assert AT_ONCE - len(refused_s) >= QUEUE and len(refused_s) >= AT_ONCE // 2
    assert p99_s < MOST_REFUSAL_S


def test_a_wrong_answer_would_be_found(tiny_model: str) -> None:
    """The prompts have answers of their own."""
    with running(REAL, "--model", tiny_model) as server:
        answers = [
            httpx.post(f"{server.url}/v1/completions", json=body(number), timeout=60).json()["choices"][0]["text"]
            for number in range(4)
        ]
    assert all(answers) and len(set(answers)) == len(answers)
