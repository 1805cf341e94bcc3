"""Queues, priorities, sliding contexts and the prefix cache as a client sees them: a tiny model over a real socket."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from stellarbyte.checkpoint.convert import convert
from tests.support.cases import some
from tests.support.models.hugging_face import tiny_llama
from tests.support.servers.server_process import REAL, ServerProcess, running

CONTEXT = 128  # the tiny model's
QUEUE_TIMEOUT_S = 2


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    return str(convert(tiny_llama(folder / "llama"), folder / "tiny"))


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[ServerProcess]:
    """One request runs, two may wait."""
    flags = ("--max-num-seqs", "1", "--max-queued-requests", "2", "--queue-timeout", str(QUEUE_TIMEOUT_S))
    with running(REAL, "--model", tiny_model, *flags) as process:
        yield process


def complete(server: ServerProcess, **fields) -> httpx.Response:
    body = {"model": "tiny", "prompt": "the capital of France", "temperature": 0, "ignore_eos": True} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


@contextlib.contextmanager
def occupied(server: ServerProcess) -> Iterator[None]:
    """While a stream that would never end is running."""
    body = {"model": "tiny", "prompt": [5], "ignore_eos": True, "stream": True}
    body |= {"context_overflow": "slide", "max_tokens": 10**9}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        yield


@contextlib.contextmanager
def waiting(server: ServerProcess, *requests: dict) -> Iterator[list[tuple[httpx.Response, float]]]:
    """While these requests wait, in this order; at the end the answers with their times, in the order they came."""
    answers: list[tuple[httpx.Response, float]] = []

    def send(fields: dict) -> None:
        response = complete(server, **fields)
        answers.append((response, time.monotonic()))

    threads = []
    for fields in requests:
        threads.append(threading.Thread(target=send, args=(fields,)))
        threads[-1].start()
        deadline_s = time.monotonic() + 60
        while server.metric("vllm:num_requests_waiting") < len(threads):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    yield answers
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_is_a_rate_limit_and_waiting_too_long_is_unavailable(server, stream) -> None:
    began_s = time.monotonic()
    with occupied(server), waiting(server, {"stream": stream}, {"stream": stream}) as answers:
        refused = complete(server, stream=stream)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.json()["error"]["code"] == "queue_full"
        while len(answers) < 2:
            assert time.monotonic() - began_s < QUEUE_TIMEOUT_S + 5
            time.sleep(0.01)
    for expired, at_s in answers:
        assert (expired.status_code, expired.headers["retry-after"]) == (503, "5")
        assert expired.json()["error"]["code"] == "queue_timeout"
        assert at_s - began_s >= QUEUE_TIMEOUT_S
    assert complete(server).status_code == 200


def test_the_openai_client_knows_a_rate_limit(server) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
        occupied(server),
        waiting(server, {}, {}),
        pytest.raises(openai.RateLimitError),
    ):
        client.completions.create(model="tiny", prompt="x")


def test_what_is_more_important_runs_first(server) -> None:
    requests = ({"max_tokens": 60, "priority": 1}, {"max_tokens": 60})
    with contextlib.ExitStack() as stream:
        stream.enter_context(occupied(server))
        with waiting(server, *requests) as answers:
            stream.close()
    (first, _), (second, _) = answers
    assert "priority" not in json.loads(first.request.content)
    assert first.status_code == second.status_code == 200


@pytest.mark.parametrize("priority", [101, -1, 1.5])
def test_no_client_puts_itself_before_all_others(server, priority) -> None:
    refused = complete(server, priority=priority)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")


def test_a_request_slides_only_if_it_says_so(server) -> None:
    refused = complete(server, max_tokens=2 * CONTEXT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    evicted = server.metric("stellarbyte:evicted_tokens_total")
    usage = complete(server, max_tokens=2 * CONTEXT, context_overflow="slide").json()["usage"]
    assert usage["completion_tokens"] == 2 * CONTEXT
    assert usage["evicted_tokens"] == usage["total_tokens"] - CONTEXT
    assert server.metric("stellarbyte:evicted_tokens_total") == evicted + usage["evicted_tokens"]
    assert "evicted_tokens" not in complete(server, max_tokens=5, context_overflow="slide").json()["usage"]


def test_a_prompt_longer_than_the_context_slides_in_a_stream_too(server) -> None:
    prompt = [5 + i % 200 for i in range(3 * CONTEXT)]
    assert complete(server, prompt=prompt).json()["error"]["param"] == "prompt"
    body = {"prompt": prompt, "context_overflow": "slide", "max_tokens": 4, "stream": True}
    stream = complete(server, **body, stream_options={"include_usage": True}).text.split("\n\n")
    usage = json.loads(stream[-3].removeprefix("data: "))["usage"]
    assert usage["prompt_tokens"] == 3 * CONTEXT
    assert usage["evicted_tokens"] == 2 * CONTEXT + 4


def test_the_server_may_slide_by_default(tiny_model) -> None:
    with running(REAL, "--model", tiny_model, "--context-overflow", "slide", "--no-enable-prefix-caching") as server:
        assert complete(server, max_tokens=2 * CONTEXT).json()["usage"]["evicted_tokens"] > 0
        assert complete(server, max_tokens=2 * CONTEXT, context_overflow="error").status_code == 400
        assert complete(server).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}, "no prefix cache"
        assert "KV cache: " in server.log()


def test_a_prompt_is_cached_for_those_with_its_salt(server) -> None:
    queries, hits = (server.metric(f"vllm:prefix_cache_{name}_total") for name in ("queries", "hits"))
    prompt = [7] * 60
    answers = [complete(server, prompt=prompt, **salt).json() for salt in ({}, {}, {"cache_salt": "mine"})]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, 52, 0]  # four sinks and three blocks of 16
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert server.metric("vllm:prefix_cache_queries_total") == queries + 3 * len(prompt)
    assert server.metric("vllm:prefix_cache_hits_total") == hits + 52


@pytest.mark.parametrize("more", some(["memory", "less context"], 0))
def test_too_little_cache_memory_is_refused_with_what_would_do(tiny_model, more: str) -> None:
    server = ServerProcess(REAL, "--model", tiny_model, "--kv-cache-memory", "30000", "--max-model-len", str(CONTEXT))
    assert server.wait(60) != 0
    advice = server.log().splitlines()[-1]
    assert "give --kv-cache-memory " in advice
    memory, context = (advice.split(flag)[1].split()[0].rstrip(".") for flag in ("give --kv-cache-memory ", "-len "))
    flags = (
        ["--kv-cache-memory", memory]
        if more == "memory"
        else ["--kv-cache-memory", "30000", "--max-model-len", context]
    )
    fields = {} if more == "memory" else {"prompt": "x"}
    with running(REAL, "--model", tiny_model, *flags) as server:
        fields |= {"max_tokens": 3 * CONTEXT, "context_overflow": "slide"}
        assert complete(server, **fields).status_code == 200
