"""What a fine-tuning job costs running streams: gaps between their tokens and their throughput, with it and without.

    python -m benchmarks.training.tuning                    4 streams of the demo model, 20 rounds
    python -m benchmarks.training.tuning --streams 8
    python -m benchmarks.training.tuning --shape 8b --tokenizer FOLDER --streams 64     on a GPU

Starts our server with --fine-tuning, uploads chats of a given length and starts a job. Once it has made a step,
streams begin. Each round measures a time without the job (its process stopped by a signal) and one with it, in turn
this one first; ratios are within a round, and the result is their median. The target: gaps grow by at most 20%.

A shape of benchmarks.gpu has random weights and the vocabulary of the tokenizer; server and job share the GPU.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gpu.workloads import SHAPES, Shape, write_config
from benchmarks.prompt_beside_streams import Stream
from benchmarks.serve import running_ours
from benchmarks.support.record import write_result

OURS = "python -m stellarbyte_server --port {port} --log-level warning --fine-tuning cpu"
ON_GPU = (
    "python -m stellarbyte_server --port {port} --log-level warning --fine-tuning cuda --device cuda --dtype bfloat16"
    " --max-model-len 2048 --gpu-memory-utilization 0.4 --max-num-seqs "
)
LIMIT_S = 600.0  # for a job to begin or to end
SETTLE_S = 0.5
JOB = "/v1/fine_tuning/jobs"


def chats(number: int, words: int) -> bytes:
    """Examples of about `words` + 20 tokens."""
    answer = " ".join("ship" if index % 3 else "harbour" for index in range(words))
    return b"".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What of number {index}?"},
                    {"role": "assistant", "content": f"{index}: {answer}"},
                ]
            }
        ).encode()
        + b"\n"
        for index in range(number)
    )


def write_model(shape: Shape, tokenizer: Path, folder: Path) -> None:
    """A model folder with random bfloat16 weights, drawn on the GPU, if there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    write_config(dataclasses.replace(shape, vocab_size=len(words)), folder, for_transformers=True)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def trainers() -> list[int]:
    """Processes below this one that train."""
    parents, found = {}, []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if b"stellarbyte.train.job" in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
    return [pid for pid in found if os.getpid() in _ancestors(pid, parents)]


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    found = []
    while pid := parents.get(pid, 0):
        found.append(pid)
    return found


class TuningJob:
    """A long job on the server."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._id = ""

    async def start(self, model: str, examples: bytes) -> None:
        upload = {"file": ("chats.jsonl", examples), "purpose": (None, "fine-tune")}
        file = (await self._client.post("/v1/files", files=upload)).raise_for_status().json()["id"]
        hyperparameters = {"n_epochs": 50, "batch_size": 8}
        body = {"model": model, "training_file": file, "hyperparameters": hyperparameters}
        self._id = (await self._client.post(JOB, json=body)).raise_for_status().json()["id"]
        await self._until_first_step()

    async def end(self) -> None:
        (await self._client.post(f"{JOB}/{self._id}/cancel")).raise_for_status()

    async def tokens(self) -> int:
        """Read in the steps that ended so far."""
        events = (await self._client.get(f"{JOB}/{self._id}/events?limit=20")).json()["data"]
        told = [each["data"]["tokens"] for each in events if each["type"] == "metrics" and "tokens" in each["data"]]
        return int(told[0]) if told else 0

    async def _until_first_step(self) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while await self.tokens() == 0:
            job = (await self._client.get(f"{JOB}/{self._id}")).json()
            if job["status"] in ("failed", "succeeded") or time.monotonic() > deadline_s:
                raise SystemExit(f"the job does not run: {job}")
            await asyncio.sleep(0.5)


class Streams:
    """A number of completions that always run."""

    def __init__(self, client: httpx.AsyncClient, model: str, number: int, tokens: int) -> None:
        self._client = client
        self._model = model
        self._tokens = tokens
        self._finished: list[Stream] = []
        self._current: list[Stream] = [Stream() for _ in range(number)]
        self.tasks = [asyncio.create_task(self._keep_running(place)) for place in range(number)]

    async def _keep_running(self, place: int) -> None:
        while True:
            prompt = f"This is story number {place}, of a ship that left its harbour on a cold morning in spring."
            await self._current[place].run(self._client, self._model, prompt, self._tokens)
            self._finished.append(self._current[place])
            self._current[place] = Stream()

    async def begun(self) -> None:
        while not all(stream.token_times_s for stream in self._current):
            await asyncio.sleep(0.05)

    async def measure(self, seconds: float) -> dict[str, float]:
        start_s = time.perf_counter()
        await asyncio.sleep(seconds)
        stop_s = time.perf_counter()
        gaps = [gap for stream in (*self._finished, *self._current) for gap in stream.gaps_ms(start_s, stop_s)]
        cuts = statistics.quantiles(gaps, n=100)
        return {
            "gap_p50_ms": round(cuts[49], 2),
            "gap_p95_ms": round(cuts[94], 2),
            "gap_max_ms": round(max(gaps), 1),
            "tok_s": round(len(gaps) / (stop_s - start_s), 2),
        }


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    rounds: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        job = TuningJob(client)
        await job.start(model, chats(options.examples, options.words))
        streams = Streams(client, model, options.streams, options.stream_tokens)
        await streams.begun()
        processes = trainers()
        if not processes:
            raise SystemExit("the job's process has ended; give it more --examples")

        async def measured(is_running: bool) -> dict[str, float]:
            for pid in processes:
                os.kill(pid, signal.SIGCONT if is_running else signal.SIGSTOP)
            await asyncio.sleep(SETTLE_S)
            tokens = await job.tokens()
            figures = await streams.measure(options.seconds)
            return figures | ({"job_tokens": await job.tokens() - tokens} if is_running else {})

        before, begin_s = await job.tokens(), time.monotonic()
        try:
            for number in range(options.rounds):
                if number % 2:
                    beside, without = await measured(True), await measured(False)
                else:
                    without, beside = await measured(False), await measured(True)
                growth = {f"{name}_ratio": round(beside[name] / without[name], 3) for name in without}
                rounds.append({"without_job": without, "with_job": beside, **growth})
                print(json.dumps(rounds[-1]), flush=True)
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
        seconds = (time.monotonic() - begin_s) / 2  # it was stopped half of the time
        trained = round((await job.tokens() - before) / seconds, 1)
        await job.end()
        for task in streams.tasks:
            task.cancel()
        await asyncio.gather(*streams.tasks, return_exceptions=True)
    medians = {name: round(statistics.median(each[name] for each in rounds), 3) for name in growth}
    return {"rounds": rounds, "medians": medians, "job_tok_s": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", help=f"command of the server, to which --data-dir is added (default: {OURS})")
    parser.add_argument("--shape", choices=SHAPES, help="a model with random weights on the GPU")
    parser.add_argument("--tokenizer", type=Path, help="a folder with the tokenizer for --shape")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--stream-tokens", type=int, default=200, help="of each answer; another one follows it")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of the two measurements of a round")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--words", type=int, default=100, help="of each example's answer")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    if (options.shape is None) != (options.tokenizer is None):
        parser.error("--shape and --tokenizer need each other")
    options.ours = options.ours or (OURS if options.shape is None else f"{ON_GPU}{options.streams}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        command = options.ours
        if options.shape is not None:
            write_model(SHAPES[options.shape], options.tokenizer, Path(folder) / "model")
            command += f" --model {shlex.quote(folder)}/model"
        url = stack.enter_context(running_ours(f"{command} --data-dir {shlex.quote(folder)}/data"))
        figures = asyncio.run(measure(url, options))
    print(json.dumps(figures["medians"] | {"job_tok_s": figures["job_tok_s"]}, indent=1))
    if not options.no_record:
        shape = {name: value for name, value in vars(options).items() if name not in ("no_record", "tokenizer")}
        write_result("tuning", shape | figures)


if __name__ == "__main__":
    main()
