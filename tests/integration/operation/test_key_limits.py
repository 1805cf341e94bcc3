"""--keys: limits hold over all HTTP processes together, models are those of the file, SIGHUP reads it again."""

import contextlib
import hashlib
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cases import some
from tests.support.servers.adapter_server import KnownModel
from tests.support.servers.fake_engine import SLOW
from tests.support.servers.server_process import FAKE, REAL, ServerProcess, running

NUM_CONNECTIONS = 16  # the kernel spreads connections: all on one of two workers once in 30,000 runs
ALICE_DIGEST = hashlib.sha256(b"key-alice").hexdigest()


def keys_file(folder: Path, text: str) -> str:
    file = folder / "keys.toml"
    file.write_text(text)
    file.chmod(0o600)
    return str(file)


@contextlib.contextmanager
def served(model: str, folder: Path, text: str, *flags: str) -> Iterator[ServerProcess]:
    with running(FAKE, "--model", model, "--keys", keys_file(folder, text), *flags) as server:
        yield server
        assert "key-alice" not in server.log() and "key-bob" not in server.log() and "Traceback" not in server.log()


LIMITS = {
    "ways": "requests_per_minute = 4",
    "refused": "models = ['fake']\nrequests_per_minute = 8",
    "tokenizing": "requests_per_minute = 8",
    "bob": "",
    "large": "requests_per_minute = 3",
    "tokens": "tokens_per_minute = 50",
    "parts": "tokens_per_minute = 1000",
}
MAX_BODY_BYTES = 5000


@pytest.fixture(scope="module")
def limited(fake_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With a key for each of the tests that need one process only: `key-NAME` has LIMITS[NAME]."""
    text = "".join(f"[{name}]\nkey = 'key-{name}'\n{limits}\n" for name, limits in LIMITS.items())
    folder = tmp_path_factory.mktemp("limited")
    with served(fake_model, folder, text, "--max-body-bytes", str(MAX_BODY_BYTES)) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def complete(server: ServerProcess, key: str, path: str = "/v1/completions", **fields: object) -> httpx.Response:
    body = {"model": "fake", "prompt": "hello", "max_tokens": 1} | fields
    return httpx.post(server.url + path, json=body, headers=bearer(key), timeout=30)


def wait_for(what: Callable[[], bool], limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def assert_rate_limited(answer: httpx.Response, used_at_s: float = -math.inf) -> int:
    """Of an answer that must be 429, the seconds to wait.

    Of a limit for a minute they end 60 seconds, or up to one more, after it was used, and not earlier.
    """
    assert answer.status_code == 429, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    wait_s = int(answer.headers["retry-after"])
    assert max(1, 60 - (time.monotonic() - used_at_s)) <= wait_s <= 61
    return wait_s


def workers_of(server: ServerProcess) -> set[str]:
    """The HTTP processes that answered completions."""
    return set(re.findall(r"INFO (http(?:-\d)?) server.access: POST /v1/completions 200", server.log()))


@pytest.mark.parametrize("workers", some(["1", "3"], 1))
def test_requests_per_minute_hold_over_all_workers(fake_model: str, tmp_path: Path, workers: str) -> None:
    text = f"[alice]\nsha256 = '{ALICE_DIGEST}'\nrequests_per_minute = 10\n[bob]\nkey = 'key-bob'\n"
    with served(fake_model, tmp_path, text, "--http-workers", workers) as server:
        began_s = time.monotonic()
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(lambda _: complete(server, "key-alice"), range(40)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) == 30
        for answer in refused:
            assert_rate_limited(answer, began_s)
        for _ in range(NUM_CONNECTIONS):
            assert complete(server, "key-bob").status_code == 200
        wait_for(lambda: len(workers_of(server)) == int(workers))  # else the limit would have held in one only
        assert complete(server, "key-alice", prompt=7).status_code == 400  # no request of the model
        for key in ("key-alice", "key-bob"):
            assert httpx.get(f"{server.url}/v1/models", headers=bearer(key)).status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        wait_for(lambda: "key=alice" in server.log() and "key=bob" in server.log())


def test_each_way_to_use_the_model_counts_once(limited: ServerProcess) -> None:
    calls = {
        "/v1/completions": {"model": "fake", "prompt": ["a", "b"], "n": 2, "max_tokens": 1},
        "/v1/chat/completions": {"model": "fake", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "/v1/responses": {"model": "fake", "input": "a", "max_output_tokens": 1},
        "/v1/embeddings": {"model": "fake", "input": ["a"] * 70},  # goes to the engine in several parts
    }
    began_s = time.monotonic()
    for round in range(2):
        for path, body in calls.items():
            answer = httpx.post(limited.url + path, json=body, headers=bearer("key-ways"), timeout=30)
            if round:
                assert_rate_limited(answer, began_s)
            else:
                assert answer.status_code == 200, answer.text


WRONG = [
    ("/v1/completions", {"model": "fake", "prompt": 7}),
    ("/v1/completions", {"model": "fake", "prompt": "a", "max_tokens": 10**9}),
    ("/v1/chat/completions", {"model": "fake", "messages": []}),
    ("/v1/responses", {"model": "fake", "input": [{}] * 50}),
    ("/v1/embeddings", {"model": "fake", "input": [1.5]}),
    ("/v1/completions", {"model": "elsewhere", "prompt": "a"}),
    ("/tokenize", {"prompt": 5}),
    ("/detokenize", {"tokens": [-1]}),
]
TOKENIZED = [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})] * 4


@pytest.mark.parametrize(("key", "calls"), [("key-refused", WRONG), ("key-tokenizing", TOKENIZED)])
def test_what_the_engine_does_not_see_counts_too(limited: ServerProcess, key: str, calls: list[Any]) -> None:
    for path, body in calls:
        answer = httpx.post(limited.url + path, json=body, headers=bearer(key), timeout=30)
        assert answer.status_code in ((400, 403) if calls is WRONG else (200,)), answer.text
    assert_rate_limited(complete(limited, key))
    for path, body in calls:
        wait_for(lambda: refused_unread(limited, key, path, body))  # noqa: B023
    for path, body in calls:
        answer = httpx.post(limited.url + path, json=body, headers=bearer("key-bob"), timeout=30)
        assert answer.status_code != 429


def refused_unread(server: ServerProcess, key: str, path: str, body: dict[str, Any]) -> bool:
    """Whether a body gets 429, and not what it deserves."""
    answer = httpx.post(server.url + path, json=body, headers=bearer(key), timeout=30)
    if answer.status_code == 429:
        assert_rate_limited(answer)
    return answer.status_code == 429


def test_bodies_that_are_too_large_count(limited: ServerProcess) -> None:
    for _ in range(3):
        assert complete(limited, "key-large", prompt="x" * MAX_BODY_BYTES).status_code == 413
    assert_rate_limited(complete(limited, "key-large"))


OF_A_MODEL = """
    [queued]
    key = 'key-queued'
    requests_per_minute = 2
    [alice]
    key = 'key-alice'
    models = ['pirate']
    [bob]
    key = 'key-bob'
    models = ['tiny', 'json']
    [erin]
    key = 'key-erin'
    [frank]
    key = 'key-frank'
    [carol]
    key = 'key-carol'
    share = 'team'
    [dave]
    key = 'key-dave'
    share = 'team'
"""


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real model, `tiny`, with two adapters and one that is broken; one request runs, others wait a second."""
    folder = tmp_path_factory.mktemp("tiny")
    known = KnownModel.make(folder)
    for seed, name in enumerate(("pirate", "json")):
        known.add_adapter(folder / "adapters" / name, seed)
    (folder / "adapters" / "broken").mkdir(parents=True)
    (folder / "adapters" / "broken" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (folder / "adapters" / "broken" / "adapter_model.safetensors").write_bytes(b"no safetensors")
    flags = ["--model", str(known.folder), "--adapter-dir", str(folder / "adapters"), "--max-num-seqs", "1"]
    flags += ["--keys", keys_file(folder, OF_A_MODEL), "--admin-api-key", "key-admin", "--api-key", "key-flag"]
    with running(REAL, *flags, "--queue-timeout", "1", "--context-overflow", "slide") as server:
        yield server


def test_what_is_refused_after_it_was_queued_does_not_count(tiny_server: ServerProcess) -> None:
    endless = {"model": "tiny", "prompt": [40], "max_tokens": 10**6, "ignore_eos": True, "stream": True}
    url, headers = f"{tiny_server.url}/v1/completions", bearer("key-flag")
    with httpx.stream("POST", url, json=endless, headers=headers, timeout=30) as occupying:
        lines = occupying.iter_lines()
        next(lines)
        for _ in range(3):
            answer = complete(tiny_server, "key-queued", model="tiny")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout"), answer.text
    wait_for(lambda: tiny_server.metric("vllm:num_requests_running") == 0)
    for model, codes in (("broken", ["adapter_failed"]), ("absent", ["model_not_found"])):
        for _ in range(4):
            assert complete(tiny_server, "key-queued", model=model).json()["error"]["code"] in codes
    for _ in range(2):
        assert complete(tiny_server, "key-queued", model="tiny").status_code == 200
    assert_rate_limited(complete(tiny_server, "key-queued", model="tiny"))


def test_streams_at_once_hold_over_all_workers_and_come_back(fake_model: str, tmp_path: Path) -> None:
    text = "[alice]\nkey = 'key-alice'\nconcurrent_streams = 3\n"
    body = {"model": "fake", "prompt": SLOW, "max_tokens": 2000, "stream": True}

    def check_that_three_run(server: ServerProcess) -> None:
        url, headers = f"{server.url}/v1/completions", bearer("key-alice")
        with contextlib.ExitStack() as stack:
            answers = [
                stack.enter_context(httpx.stream("POST", url, json=body, headers=headers, timeout=30))
                for _ in range(NUM_CONNECTIONS)
            ]
            assert [answer.status_code for answer in answers[:3]] == [200] * 3
            for refused in answers[3:]:
                refused.read()
                assert assert_rate_limited(refused) == 1
        wait_for(lambda: server.metric("vllm:num_requests_running") == 0)  # the clients have left

    with served(fake_model, tmp_path, text, "--http-workers", "2") as server:
        for _ in range(4):
            check_that_three_run(server)
        wait_for(lambda: workers_of(server) == {"http-1", "http-2"})


def test_tokens_per_minute_count_prompts_and_answers(limited: ServerProcess) -> None:
    assert complete(limited, "key-tokens", prompt="x" * 20, max_tokens=20).status_code == 200
    for stream in (False, True):  # ten are left, and one comes back in 1.2 s
        assert assert_rate_limited(complete(limited, "key-tokens", prompt="x" * 45, stream=stream)) > 10
    assert complete(limited, "key-tokens", prompt="x" * 9, max_tokens=1).status_code == 200
    assert assert_rate_limited(complete(limited, "key-tokens", prompt="x" * 51)) == 60


def test_tokens_of_what_goes_to_the_engine_in_parts_count_before_the_first(limited: ServerProcess) -> None:
    def embed(num_inputs: int) -> httpx.Response:
        body = {"model": "fake", "input": ["x" * 10] * num_inputs}
        return httpx.post(f"{limited.url}/v1/embeddings", json=body, headers=bearer("key-parts"), timeout=30)

    assert assert_rate_limited(embed(101)) == 60
    assert embed(100).status_code == 200
    assert assert_rate_limited(embed(80)) > 10


@pytest.mark.slow
def test_who_comes_again_when_told_to_is_let_in(fake_model: str, tmp_path: Path) -> None:
    text = "[alice]\nkey = 'key-alice'\nrequests_per_minute = 2\ntokens_per_minute = 50"
    with served(fake_model, tmp_path, text, "--http-workers", "2") as server:
        for _ in range(2):
            assert complete(server, "key-alice").status_code == 200
        time.sleep(assert_rate_limited(complete(server, "key-alice")))
        assert complete(server, "key-alice", prompt="x" * 40, max_tokens=10).status_code == 200
        time.sleep(assert_rate_limited(complete(server, "key-alice")))
        assert complete(server, "key-alice").status_code == 200


@pytest.mark.parametrize("workers", some(["1", "2"], 1))
def test_a_hangup_signal_reads_the_file_again(fake_model: str, tmp_path: Path, workers: str) -> None:
    def statuses(server: ServerProcess) -> dict[str, set[int]]:
        return {
            key: {complete(server, key).status_code for _ in range(NUM_CONNECTIONS)}
            for key in ("key-alice", "key-bob", "key-admin")
        }

    alice, bob = "[alice]\nkey = 'key-alice'\n", "[bob]\nkey = 'key-bob'\n"
    flags = ["--http-workers", workers, "--admin-api-key", "key-admin"]
    with served(fake_model, tmp_path, alice, *flags) as server:
        assert statuses(server) == {"key-alice": {200}, "key-bob": {401}, "key-admin": {200}}
        keys_file(tmp_path, bob)
        os.kill(server.process.pid, signal.SIGHUP)
        wait_for(lambda: statuses(server) == {"key-alice": {401}, "key-bob": {200}, "key-admin": {200}})
        keys_file(tmp_path, "[alice]\nkey = 'key-alice")
        os.kill(server.process.pid, signal.SIGHUP)
        wait_for(lambda: "keeping the previous keys" in server.log())
        assert statuses(server) == {"key-alice": {401}, "key-bob": {200}, "key-admin": {200}}
        assert server.log().count("ERROR") == 1
        keys_file(tmp_path, bob.replace("\n", "\nmodels = []\n", 1))
        os.kill(server.process.pid, signal.SIGHUP)
        wait_for(lambda: statuses(server)["key-bob"] == {403})
        if workers == "2":  # a worker that is started later has the keys of now
            (pid, *_) = [
                int(pid)
                for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
                if b"stellarbyte_server.http.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: "starting another" in server.log())
            assert statuses(server) == {"key-alice": {401}, "key-bob": {403}, "key-admin": {200}}


@pytest.mark.parametrize("text", ["[alice]\nkey = key-alice", "[alice]\nkey = 'key-alice'\nmodel = 'x'"])
def test_a_file_that_cannot_be_used_stops_the_start_with_one_line(fake_model: str, tmp_path: Path, text: str) -> None:
    server = ServerProcess(FAKE, "--model", fake_model, "--keys", keys_file(tmp_path, text))
    assert server.wait(30) == 2
    (line,) = server.log().splitlines()
    assert line.startswith("error: --keys: ") and "key-alice" not in line


def test_a_key_sees_and_uses_only_its_models(tiny_server: ServerProcess) -> None:
    def seen(key: str, path: str) -> set[str]:
        cards = httpx.get(tiny_server.url + path, headers=bearer(key)).json()["data"]
        return {card["id"] for card in cards} - {"broken"}

    allowed = {"key-alice": {"pirate"}, "key-bob": {"tiny", "json"}, "key-admin": {"tiny", "pirate", "json"}}
    for key, models in allowed.items():
        assert seen(key, "/v1/models") == models
        assert seen(key, "/v1/adapters") == models - {"tiny"}
        for model in ("tiny", "pirate", "json"):
            may = model in models
            calls = [
                ("/v1/completions", {"prompt": [40, 41], "max_tokens": 1}),
                ("/v1/embeddings", {"input": [40, 41]}),
                ("/tokenize", {"prompt": "a"}),
            ]
            for path, body in calls:
                answer = httpx.post(
                    tiny_server.url + path, json={"model": model, **body}, headers=bearer(key), timeout=30
                )
                assert answer.status_code == (200 if may else 403), (key, model, path, answer.text)
                if not may:
                    error = answer.json()["error"]
                    assert (error["type"], error["param"]) == ("permission_error", "model")
                    assert repr(model) in error["message"]
            card = httpx.get(f"{tiny_server.url}/v1/models/{model}", headers=bearer(key))
            assert card.status_code == (200 if may else 403)
            scaled = {"model": model, "prompt": [40], "max_tokens": 1, "adapter_scale": 1e-6}
            answer = httpx.post(f"{tiny_server.url}/v1/completions", json=scaled, headers=bearer(key), timeout=30)
            wanted = 403 if not may or key == "key-alice" else 400 if model == "tiny" else 200
            assert answer.status_code == wanted, (key, model, answer.text)
            pinned = {"model": f"{model}@{'0' * 64}", "prompt": [40], "max_tokens": 1}
            answer = httpx.post(f"{tiny_server.url}/v1/completions", json=pinned, headers=bearer(key))
            assert answer.status_code == (404 if may else 403)
    unknown = {"model": "secret", "prompt": [40], "max_tokens": 1}
    for key, status in (("key-alice", 403), ("key-admin", 404)):
        assert httpx.post(f"{tiny_server.url}/v1/completions", json=unknown, headers=bearer(key)).status_code == status


def test_the_prefix_cache_tells_no_key_what_others_have_sent(tiny_server: ServerProcess) -> None:
    def cached(key: str, **fields: object) -> int:
        answer = complete(tiny_server, key, model="tiny", prompt=list(range(40, 140)), **fields)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("key-erin") == 0
    assert cached("key-erin") > 0
    for key in ("key-frank", "key-carol", "key-admin"):
        assert cached(key) == 0
        assert cached(key, cache_salt='["key", "erin", ""]') == 0
    assert cached("key-dave") > 0, "a team shares"
    assert cached("key-dave", cache_salt="mine") == 0
    assert cached("key-carol", cache_salt="mine") > 0
