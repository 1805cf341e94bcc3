"""Workloads on our engine without HTTP, in one process: started by benchmarks.gpu for each loaded model.

    python -m benchmarks.gpu.engine --engine 0.6b --device cuda --folder TMP 0.6b/1 0.6b/64

The core runs steps as in the engine process. Each work runs twice with different prompts: the first run compiles and
captures kernels and is reported as `cold_s`. After a failed work the process ends, as its core may be inconsistent. It
ends at once: to close a group of ranks that has captured graphs may take forever.
"""

import argparse
import dataclasses
import itertools
import logging
import select
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.profile import print_profile, profile_steps
from benchmarks.gpu.workloads import (
    ENGINES,
    MAX_MODEL_LEN,
    MAX_STEP_TOKENS,
    RANK,
    WORKS,
    Engine,
    Shape,
    Work,
    random_prompt,
    report,
    reporting_failure,
    shape_of,
    work_of,
    write_adapters,
    write_config,
)
from benchmarks.support.exits import run_and_exit
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.start.load import build_core
from stellarbyte_server.garbage import keep_for_good
from stellarbyte_server.protocol.adapter_reference import AdapterReference
from stellarbyte_server.protocol.adapter_versions import SetVersions, StoredAdapter
from stellarbyte_server.protocol.messages import AdapterLoaded, CallFailed, Delta, LoadAdapter, Rejected
from stellarbyte_server.protocol.request import GenerationRequest, SamplingParams

PROFILED_STEPS = 20
SETTLING_STEPS = 10  # of decoding, before the profile
LOAD_AFTER_STEPS = 32  # of the streams that run while adapters are loaded


@dataclass
class Run:
    """The results of one run; times are time.perf_counter() seconds."""

    started_s: float
    arrivals: defaultdict[str, list[tuple[float, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # (s, tokens)
    ended_s: float = 0.0

    def note(self, news: list[Any]) -> None:
        self.ended_s = time.perf_counter()
        for item in news:
            if isinstance(item, Rejected):
                raise RuntimeError(item.message)
            if isinstance(item, Delta):
                if item.error is not None:
                    raise RuntimeError(item.error)
                self.arrivals[item.request_id].append((self.ended_s, item.num_tokens))

    @property
    def num_tokens(self) -> int:
        return sum(tokens for arrivals in self.arrivals.values() for _, tokens in arrivals)

    def second_half_tok_s(self) -> float:
        """Tokens a second of the first request after half of its tokens."""
        (arrivals, *_) = self.arrivals.values()
        half, seen, begun_s = sum(tokens for _, tokens in arrivals) // 2, 0, self.started_s
        for arrived_s, tokens in arrivals:
            if seen < half <= seen + tokens:
                begun_s, half = arrived_s, seen + tokens
            seen += tokens
        return (seen - half) / (arrivals[-1][0] - begun_s)

    def longest_gap_s(self, from_s: float, to_s: float) -> float:
        """Between two deltas of one request, of gaps that overlap this time."""
        return max(
            (
                after - before
                for arrivals in self.arrivals.values()
                for (before, _), (after, _) in itertools.pairwise(arrivals)
                if after > from_s and before < to_s
            ),
            default=0.0,
        )


def make_requests(work: Work, vocab_size: int, seed: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"{seed}-{number}",
            prompt_token_ids=tuple(random_prompt(prompt, vocab_size, seed * 100_003 + number)),
            sampling=SamplingParams(max_tokens=output, temperature=0.6, seed=number, ignore_eos=True),
            adapter=AdapterReference(f"a{number % work.adapters:02}") if work.adapters else None,
            context_overflow="slide" if work.loads_adapters else "error",
        )
        for number, (prompt, output) in enumerate(work.lengths(seed=0))
    ]


def step(core: EngineCore, run: Run) -> None:
    """One step as in the engine process; waits if only other threads can continue."""
    if core.is_blocked:
        select.select(core.wake_fds, [], [], 1)
    run.note(core.step())


def prepare(core: EngineCore) -> None:
    """Compile and capture everything that a server prepares in its first seconds, on all ranks."""
    while core.prepare():
        time.sleep(0.005)


def drive(core: EngineCore, requests: list[GenerationRequest]) -> Run:
    """All requests from submission to their ends."""
    run = Run(started_s=time.perf_counter())
    for request in requests:
        core.submit(request)
    while core.has_work:
        step(core, run)
    return run


def drop(core: EngineCore, requests: list[GenerationRequest]) -> None:
    """Abort requests that are no longer needed."""
    for request in requests:
        core.abort(request.request_id)
    while core.has_work:
        core.step()


def measure(core: EngineCore, work: Work, vocab_size: int) -> dict[str, Any]:
    """The figures of a workload: a cold run, then the measured one."""
    cold = drive(core, make_requests(work, vocab_size, seed=1))
    prepare(core)
    before = core.stats()
    run = drive(core, make_requests(work, vocab_size, seed=2))
    after, seconds = core.stats(), run.ended_s - run.started_s
    steps = after.num_steps_total - before.num_steps_total
    return {
        "tok_s": run.num_tokens / seconds,
        "tokens": run.num_tokens,
        "seconds": seconds,
        "cold_s": cold.ended_s - cold.started_s,
        "second_half_tok_s": run.second_half_tok_s(),
        "steps": steps,
        "ms_a_step": 1000 * seconds / steps,
        "preemptions": after.num_preemptions_total - before.num_preemptions_total,
    }


def measure_loads(core: EngineCore, work: Work, vocab_size: int, num_adapters: int, folder: Path) -> dict[str, Any]:
    """Load every adapter under a new name and generate one token with it, while streams run; timed from the first
    call."""
    with_adapters = dataclasses.replace(work, adapters=num_adapters, output=(8, 8), requests=2 * work.requests)
    drive(core, make_requests(with_adapters, vocab_size, seed=1))  # compiles and captures the kernels
    prepare(core)
    run = Run(started_s=time.perf_counter())
    streams = make_requests(work, vocab_size, seed=2)
    for request in streams:
        core.submit(request)
    for _ in range(LOAD_AFTER_STEPS):
        step(core, run)
    begun_s = time.perf_counter()
    loaded_s, waiting = begun_s, num_adapters
    calls = iter(range(num_adapters))
    probes: list[str] = []
    while waiting or not all(probe in run.arrivals for probe in probes):
        if (number := next(calls, None)) is not None:  # one in each step, as over HTTP
            files = StoredAdapter(folder=str(folder / f"a{number:02}"), root=f"a{number:02}")
            core.call(LoadAdapter(call_id=str(number), name=f"new{number:02}", files=files, in_place=False))
        for reply in core.take_replies():
            if isinstance(reply, CallFailed):
                raise RuntimeError(reply.message)
            if not isinstance(reply, AdapterLoaded):
                continue  # the answer to `SetVersions`
            core.call(SetVersions(f"set {reply.call_id}", reply.card.name, reply.card.content_hash))
            waiting -= 1
            loaded_s = time.perf_counter()
            probes.append(reply.card.name)
            core.submit(
                GenerationRequest(
                    request_id=reply.card.name,
                    prompt_token_ids=tuple(range(10, 26)),
                    sampling=SamplingParams(max_tokens=1, seed=0, ignore_eos=True),
                    adapter=AdapterReference(reply.card.name),
                )
            )
        step(core, run)
    served_s = time.perf_counter()
    drop(core, streams)
    return {
        "loaded_s": loaded_s - begun_s,
        "served_s": served_s - begun_s,
        "longest_gap_ms": 1000 * run.longest_gap_s(begun_s, served_s),
        "longest_gap_before_ms": 1000 * run.longest_gap_s(run.started_s, begun_s),
    }


def profile(core: EngineCore, work: Work, vocab_size: int, device: str) -> dict[str, Any]:
    """Profile of a decoding step, once all requests decode."""
    requests = make_requests(dataclasses.replace(work, output=(1000, 1000)), vocab_size, seed=2)
    run = Run(started_s=time.perf_counter())
    for request in requests:
        core.submit(request)
    while len(run.arrivals) < len(requests):
        step(core, run)
    for _ in range(SETTLING_STEPS):
        step(core, run)
    profiled = profile_steps(lambda: step(core, run), PROFILED_STEPS, device)
    drop(core, requests)
    return profiled


def settings_of(engine: Engine, folder: Path, device: str, *, is_tiny: bool) -> tuple[EngineSettings, Shape]:
    """Settings for an engine whose model and adapters are written into `folder`."""
    shape = shape_of(engine, is_tiny=is_tiny)
    adapters: dict[str, Any] = {}
    if engine.adapters:
        write_adapters(shape, folder / "adapters", engine.adapters)
        adapters = {"adapter_dir": str(folder / "adapters"), "max_loras": engine.adapters, "max_lora_rank": RANK}
    settings = EngineSettings(
        model=str(write_config(shape, folder / "model")),
        load_format="dummy",
        device=device,
        dtype="bfloat16",
        tensor_parallel_size=engine.ranks,
        quantization=engine.quantization,
        kv_cache_dtype=engine.kv_cache_dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=MAX_STEP_TOKENS,
        **adapters,
    )
    return settings, shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="+", choices=list(WORKS))
    parser.add_argument("--engine", required=True, choices=list(ENGINES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", required=True, type=Path, help="an empty one, for config.json and adapters")
    parser.add_argument("--profile", action="store_true", help="also the kernels of a decoding step")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    engine = ENGINES[options.engine]
    settings, shape = settings_of(engine, options.folder, options.device, is_tiny=options.tiny)
    started_s = time.perf_counter()
    with reporting_failure(options.works):
        core, _ = build_core(settings)
    keep_for_good()  # as the engine process does
    build_s = time.perf_counter() - started_s
    for name in options.works:
        work = work_of(name, is_tiny=options.tiny)
        with reporting_failure([name]):
            if work.loads_adapters:
                report(name, measure_loads(core, work, shape.vocab_size, engine.adapters, options.folder / "adapters"))
                continue
            figures = {"build_s": build_s, **measure(core, work, shape.vocab_size)}
            if options.profile:
                figures["profile"] = profile(core, work, shape.vocab_size, options.device)
                print_profile(figures["profile"])
            report(name, figures)


if __name__ == "__main__":
    run_and_exit(main)
