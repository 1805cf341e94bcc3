"""GET /metrics: every metric that is promised, with totals equal to what clients did, whichever process answers."""

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.metric_names import check_exposition
from tests.support.over_http import get_often
from tests.support.servers.fake_engine import CRASH, HANG, REJECT, SLOW
from tests.support.servers.processes import engine_pid, worker_pids
from tests.support.servers.server_process import FAKE, ServerProcess, running

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(server: ServerProcess) -> str:
    answer = httpx.get(f"{server.url}/metrics", timeout=10)
    assert answer.status_code == 200
    return answer.text


def samples(server: ServerProcess) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(scrape(server))
        for sample in family.samples
    }


def value(seen: Samples, name: str, **labels: str) -> float:
    return seen[name, tuple(sorted({"model_name": "fake", **labels}.items()))]


def until(check: Callable[[], bool], limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def server(request: pytest.FixtureRequest, fake_model: str) -> Iterator[ServerProcess]:
    flags = ("--http-workers", str(request.param), "--max-body-bytes", "20000", "--max-model-len", "1000")
    with running(FAKE, "--model", fake_model, *flags) as server:
        yield server


def post(server: ServerProcess, path: str = "/v1/completions", **fields: object) -> httpx.Response:
    """On a connection of its own, so that any process may get it."""
    return httpx.post(server.url + path, json={"model": "fake", **fields}, timeout=30)


def test_exactly_the_promised_metrics_are_there_with_their_types_and_labels(fake_server: ServerProcess) -> None:
    assert post(fake_server, prompt="abc", max_tokens=2).status_code == 200
    check_exposition(scrape(fake_server), with_adapters=False)


def test_totals_equal_what_clients_did(server: ServerProcess) -> None:
    """Of requests that end in every way; each of many scrapes, on whichever process, shows the same."""
    rejected: Counter[str] = Counter()
    for number in range(12):
        answer = post(server, prompt="abc", max_tokens=5, stream=number % 2 == 0)
        assert answer.status_code == 200
    assert post(server, prompt="to be stopped", max_tokens=30, stop="stop").json()["choices"][0]["finish_reason"] == (
        "stop"
    )
    assert len(post(server, prompt=["ab", "cd"], max_tokens=4, n=2).json()["choices"]) == 4
    assert post(server, "/v1/embeddings", input="abcd").status_code == 200
    for reason, count, fields in (
        ("invalid_request", 3, {"prompt": "a", "mood": "good"}),
        ("invalid_request", 2, {"prompt": REJECT}),  # by the engine
        ("model_not_found", 2, {"prompt": "a", "model": "other"}),
        ("context_length_exceeded", 2, {"prompt": "a", "max_tokens": 2000}),
        ("request_too_large", 2, {"prompt": "a" * 30_000}),
    ):
        for _ in range(count):
            assert post(server, **fields).status_code >= 400
        rejected[reason] += count
    for _ in range(3):
        with httpx.stream(
            "POST",
            f"{server.url}/v1/completions",
            json={"model": "fake", "prompt": SLOW, "max_tokens": 900, "stream": True},
        ) as stream:
            next(stream.iter_lines())
    httpx.get(f"{server.url}/v1/models/other")  # not a rejected generation
    until(lambda: value(samples(server), "stellarbyte:aborted_requests_total", reason="client_left") == 3)
    until(
        lambda: (
            sum(v for (name, _), v in samples(server).items() if name == "stellarbyte:rejected_requests_total")
            == rejected.total()
        )
    )
    finished = 12 + 1 + 4 + 1
    until(lambda: value(samples(server), "vllm:time_to_first_token_seconds_count") == finished - 1 + 3)
    until(lambda: value(samples(server), "vllm:e2e_request_latency_seconds_count") == finished)
    seen = samples(server)
    for reason, count in rejected.items():
        assert value(seen, "stellarbyte:rejected_requests_total", reason=reason) == count, reason
    assert value(seen, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(seen, "vllm:request_success_total", finished_reason="length") == finished - 1
    for name, count in (
        ("vllm:e2e_request_latency_seconds", finished),
        ("vllm:request_prompt_tokens", finished),
        ("vllm:request_decode_time_seconds", finished),
        ("vllm:request_params_n", finished - 2),
        ("vllm:request_generation_tokens", finished),
        ("vllm:request_queue_time_seconds", finished + 3),
        ("vllm:time_to_first_token_seconds", finished - 1 + 3),
    ):
        assert value(seen, f"{name}_count") == count, name
    answered = 12 * 5 + len("to be stop") + 4 * 4
    assert value(seen, "vllm:request_generation_tokens_sum") == answered
    assert value(seen, "vllm:request_prompt_tokens_sum") == 12 * 3 + len("to be stopped") + 4 * 2 + 4
    generated = value(seen, "vllm:generation_tokens_total")
    tokens_of_the_aborted = generated - answered
    assert tokens_of_the_aborted >= 3
    num_gaps = value(seen, "vllm:inter_token_latency_seconds_count")
    assert num_gaps == generated - (finished - 1 + 3), "one after each token but a request's first"
    assert value(seen, "vllm:iteration_tokens_total_count") == value(seen, "stellarbyte:engine_step_seconds_count") > 0
    assert value(seen, "stellarbyte:http_stream_lag_seconds_count") >= finished
    assert value(seen, "stellarbyte:engine_step_seconds_sum") >= 0.02 * tokens_of_the_aborted / 3 * 0.9

    def comparable(text: str) -> str:
        return "\n".join(line for line in text.splitlines() if "lora_requests_info" not in line)

    texts = {comparable(answer.text) for answer in get_often(server, "/metrics")}
    assert len(texts) == 1, "processes differ about totals"


def test_a_killed_process_loses_no_totals(fake_model: str) -> None:
    with running(FAKE, "--model", fake_model, "--http-workers", "2") as server:
        for _ in range(12):
            post(server, prompt="abc", max_tokens=2)
            post(server, prompt="abc", mood="bad")
        time.sleep(0.3)  # each tells at most this late
        before = samples(server)
        killed = worker_pids(server)[0]
        os.kill(killed, signal.SIGKILL)
        until(lambda: killed not in worker_pids(server) and len(worker_pids(server)) == 2)
        until(lambda: {answer.status_code for answer in get_often(server, "/ready")} == {200})
        for _ in range(5):
            after = samples(server)
            for name in ("vllm:time_to_first_token_seconds_count", "stellarbyte:http_stream_lag_seconds_count"):
                assert value(after, name) == value(before, name) >= 12
            assert value(after, "stellarbyte:rejected_requests_total", reason="invalid_request") == 12


@pytest.mark.slow
def test_an_engine_that_hangs_or_dies_leaves_the_last_totals_to_be_seen(fake_model: str) -> None:
    with running(FAKE, "--model", fake_model, "--http-workers", "2") as server, contextlib.ExitStack() as stack:
        post(server, prompt="abc", max_tokens=7)
        time.sleep(0.3)
        assert value(samples(server), "vllm:generation_tokens_total") == 7
        hanging = httpx.Client()
        stack.callback(hanging.close)
        with pytest.raises(httpx.ReadTimeout):
            body = {"model": "fake", "prompt": HANG, "max_tokens": 1}
            hanging.post(f"{server.url}/v1/completions", json=body, timeout=0.5)
        for _ in range(6):
            assert value(samples(server), "vllm:generation_tokens_total") == 7
        os.kill(engine_pid(server), signal.SIGKILL)
        time.sleep(0.5)
        assert value(samples(server), "vllm:time_to_first_token_seconds_count") == 1


def test_an_engine_that_fails_says_so_before_the_server_ends(fake_model: str) -> None:
    with running(FAKE, "--model", fake_model) as server:
        assert post(server, prompt="abc", max_tokens=2).status_code == 200
        assert post(server, prompt=CRASH, max_tokens=2).status_code == 500
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503, limit_s=3)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        seen = samples(server)
        assert value(seen, "stellarbyte:aborted_requests_total", reason="failed") == 1
        assert value(seen, "stellarbyte:rejected_requests_total", reason="server_error") == 0
        assert value(seen, "vllm:request_success_total", finished_reason="length") == 1
