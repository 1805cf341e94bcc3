"""examples/ray on a real Ray of this machine: it scales, mixes adapters, and a killed replica costs only its streams.

Ray has an environment of its own here, unless it is installed beside the server: the example needs nothing else.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tokenizers import Tokenizer

from stellarbyte.checkpoint.native import load_model
from stellarbyte.checkpoint.source import resolve_model
from tests.support.models.references import MODEL_NAME
from tests.support.servers.adapter_server import KnownModel, completion
from tests.support.servers.processes import assert_gone, descendants, is_alive
from tests.support.servers.server_process import ROOT, free_port

EXAMPLE = ROOT / "examples" / "ray"
KNOWN, STREAMED = 16, 160  # tokens whose text is known; tokens of the streams that a kill interrupts
RAY = {
    "RAY_worker_niceness": "0",  # 15 by default: on a busy machine, Serve's own proxy would not start in its minute
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LIMIT_S = 600.0

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")]


@dataclass
class Stream:
    """An answer while it comes: the process that sends it, its text, and whether it is complete."""

    process: str = ""
    text: str = ""
    is_complete: bool = False
    errors: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return int(self.process.rpartition(":")[2])


@dataclass(frozen=True)
class Serving:
    url: str
    answers: dict[str, str]  # the first KNOWN tokens of each model

    def ask(self, model: str, num_tokens: int = KNOWN, **headers: str) -> tuple[str, str]:
        """The process that answered, and the text."""
        body = completion(model, num_tokens)
        answer = httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=LIMIT_S)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-served-by"], answer.json()["choices"][0]["text"]

    def follow(self, model: str, stream: Stream) -> None:
        """Read a long answer into `stream`, to its end or until it breaks off."""
        body = completion(model, STREAMED, stream=True)
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=LIMIT_S) as answer,
        ):
            stream.process = answer.headers.get("x-served-by", "")
            for line in answer.iter_lines():
                event = line.removeprefix("data: ")
                if event == line:  # the end of an event, or a comment
                    continue
                if event == "[DONE]":
                    stream.is_complete = True
                elif "error" in (parsed := json.loads(event)):
                    stream.errors.append(parsed["error"]["message"])
                else:
                    stream.text += "".join(choice["text"] for choice in parsed["choices"])

    def processes(self, num: int, gone: str = "") -> set[str]:
        """The processes that answer, once there are `num` of them besides `gone`."""
        found: set[str] = set()
        for _ in _until(f"{num} replicas besides {gone!r}; there are {found}"):
            with contextlib.suppress(httpx.TransportError):
                found |= {httpx.get(f"{self.url}/v1/models", timeout=60).headers.get("x-served-by", gone)} - {gone}
            if len(found) == num:
                return found
        raise AssertionError("unreachable")


def _until(what: str) -> Iterator[None]:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        yield
        time.sleep(0.2)
    raise AssertionError(f"after {LIMIT_S:.0f} s there were not {what}")


@pytest.fixture(scope="module")
def serve_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`serve` of the Ray that is installed, or of a new environment."""
    if importlib.util.find_spec("ray") is not None:
        return [sys.executable, "-m", "ray.serve.scripts"]
    folder = tmp_path_factory.mktemp("ray")
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv/bin/python")
    command = [python, "-m", "pip", "install", "--quiet", "ray[serve]>=2.60", "httpx>=0.28"]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"pip could not install Ray: {installed.stderr[-300:]}")
    return [python, "-m", "ray.serve.scripts"]


@pytest.fixture(scope="module")
def serving(serve_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The example's own configuration, with two adapters, one replica at first, and a port and processes for a test."""
    folder = resolve_model("demo")
    known = KnownModel(folder, load_model(folder), Tokenizer.from_file(str(folder / "tokenizer.json")))
    adapters = tmp_path_factory.mktemp("adapters")
    own = known.answers(known.model, KNOWN)
    assert own is not None
    answers = {MODEL_NAME: own[KNOWN]}
    for seed, name in enumerate(("pirate", "bard")):
        answers[name] = known.add_adapter(adapters / name, seed + 1, KNOWN)[KNOWN]
    assert len(set(answers.values())) == 3

    plan = yaml.safe_load((EXAMPLE / "config.yaml").read_text())
    (application,) = plan["applications"]
    (engine,) = application["deployments"]
    plan["http_options"]["port"] = port = free_port()
    application["args"] |= {
        "adapter_dir": str(adapters),
        "flags": ["--dtype", "float32"],
        "command": [sys.executable, "-m", "stellarbyte_server"],
    }
    engine["ray_actor_options"] = {"num_cpus": 0.1}
    engine["autoscaling_config"] |= {"max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1}
    config = adapters.parent / "config.yaml"
    config.write_text(yaml.safe_dump(plan))
    with _running([*serve_command, "run", "--working-dir", str(EXAMPLE), str(config)]) as (process, log):
        url = f"http://127.0.0.1:{port}"
        for _ in _until("replicas that answer"):
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=60).status_code == 200:
                    break
        yield Serving(url, answers)


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A command in the foreground and its log, with Ray's files in a short path; at Ctrl-C, no process of it stays."""
    files = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets are below it, and their paths are bounded
    log = files / "log"
    environment: dict[str, Any] = {**os.environ, **RAY, "RAY_TMPDIR": str(files)}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
    try:
        yield process, log
        below = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait(120)
        assert_gone(below, 120)
    finally:
        if process.poll() is None:
            for pid in [*descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(files, ignore_errors=True)


def start(pool: ThreadPoolExecutor, serving: Serving, models: list[str]) -> list[tuple[str, Stream, Future[None]]]:
    """Long answers of these models at once; each has its first text."""
    started = [(model, stream := Stream(), pool.submit(serving.follow, model, stream)) for model in models]
    for _ in _until("streams that have begun"):
        if all(stream.text for _, stream, _ in started):
            break
    return started


def test_it_scales_mixes_adapters_and_survives_a_kill(serving: Serving) -> None:
    models = list(serving.answers)
    for model in models:
        assert serving.ask(model)[1] == serving.answers[model]

    with ThreadPoolExecutor(8) as pool:  # more than the target: a second replica
        for model, stream, done in start(pool, serving, models * 2):
            done.result()
            assert stream.is_complete and stream.text.startswith(serving.answers[model])
    both = serving.processes(2)

    # A named adapter keeps its replica once Serve has told its proxy of it.
    recent: list[str] = []
    for _ in range(100):
        recent.append(serving.ask("pirate", 1, **{"serve-multiplexed-model-id": "pirate"})[0])
        if len(recent) >= 20 and len(set(recent[-20:])) == 1:
            break
    assert len(set(recent[-20:])) == 1, recent

    with ThreadPoolExecutor(8) as pool:
        started = start(pool, serving, (models * 3)[:8])
        assert {stream.process for _, stream, _ in started} == both
        killed = started[0][1].process
        victim = started[0][1].pid
        below = descendants(victim)
        assert below and not any(stream.is_complete for _, stream, _ in started)
        os.kill(victim, signal.SIGKILL)
        for model, stream, done in started:
            done.result()
            assert stream.text.startswith(serving.answers[model]) or stream.process == killed
            assert stream.is_complete == (stream.process != killed), stream
    assert_gone(below, 120)  # its server and engine as well

    healed = serving.processes(2, gone=killed)
    assert len(healed & both) == 1  # the other one has gone on
    for model in models:
        answers = [serving.ask(model) for _ in range(6)]
        assert {text for _, text in answers} == {serving.answers[model]}
    assert not is_alive(victim)
