"""The engine's overhead in a step: everything but the model, for a batch of decoding sequences.

    python -m benchmarks.engine                        256 sequences, the demo model's tokenizer

The real loop, scheduler, planner, text and encoding run; the executor returns random tokens at once and the socket
discards messages. The target is 1 ms for a step of 256 sequences.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import tokenizers
import zmq

from benchmarks.support.record import write_result
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte_server.engine.adapters.absent import no_adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.loop import EngineLoop
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.run.step_plan import Finish, StepPlan, StepResult
from stellarbyte_server.engine.schedule.limits import SchedulerLimits
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.start.serving_plan import share_limits
from stellarbyte_server.engine.state.block_pool import BlockPool, CacheLayout
from stellarbyte_server.garbage import keep_for_good
from stellarbyte_server.protocol.messages import Submit
from stellarbyte_server.protocol.request import GenerationRequest, SamplingParams

Result = TypeVar("Result")

BLOCK_SIZE = 16
WARM_UP_STEPS = 50


class _Executor:
    """Random tokens at no cost."""

    takes_drafts = False

    def __init__(self, vocab_size: int, num_steps_ahead: int) -> None:
        chance = random.Random(0)
        self.num_steps_ahead = num_steps_ahead
        self._num_decoding = 0
        self._tokens = itertools.cycle([chance.randrange(vocab_size) for _ in range(10_007)])

    def prepare(self) -> bool:
        return False

    def recover(self) -> None:
        pass

    def start(self, plan: StepPlan) -> "_Step":
        if plan.decode_slots is not None:
            self._num_decoding = len(plan.decode_slots)
        samples = [True] * self._num_decoding + [chunk.samples for chunk in plan.chunks]
        return _Step([[token] * each for each, token in zip(samples, self._tokens, strict=False)])


class _Step:
    def __init__(self, tokens: list[list[int]]) -> None:
        self._tokens = tokens

    def finish(self, _: Finish) -> None:
        pass

    def result(self) -> StepResult:
        return StepResult(tokens=self._tokens)


class _Finished(Exception):
    """Enough steps were measured."""


class _Socket:
    """The loop's ROUTER socket: delivers all requests at once, notes the loop's turns, discards messages."""

    def __init__(self, requests: list[GenerationRequest], on_turn: Callable[[], None]) -> None:
        encoder = msgspec.msgpack.Encoder()
        self._commands = [encoder.encode(Submit((request,))) for request in requests]
        self._on_turn = on_turn

    def poll(self, _: int) -> bool:
        self._on_turn()
        return bool(self._commands)

    def recv_multipart(self, _: int) -> tuple[bytes, bytes]:
        if not self._commands:
            raise zmq.Again
        return b"peer", self._commands.pop()

    def send_multipart(self, *_: object) -> None:
        pass


class _Stopwatch:
    """Seconds spent in wrapped functions, by name and step."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def wrap(self, name: str, function: Callable[..., Result]) -> Callable[..., Result]:
        def timed(*arguments: Any, **options: Any) -> Result:
            started_s = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[name].append(time.perf_counter() - started_s)
            return result

        return timed


def measure(
    num_sequences: int, prompt_tokens: int, num_steps: int, window: int | None, num_steps_ahead: int
) -> dict[str, float]:
    """Milliseconds a step: the median of each part and of the whole."""
    tokenizer = tokenizers.Tokenizer.from_file(str(resolve_model("demo") / "tokenizer.json"))
    length = prompt_tokens + num_steps + WARM_UP_STEPS + 100
    limits = SchedulerLimits(
        max_num_seqs=num_sequences,
        max_num_batched_tokens=num_sequences * prompt_tokens,
        max_model_len=length,
        max_queued_requests=0,
        shares=share_limits("cpu"),
    )
    sink_tokens = 0 if window is None else 4
    layout = CacheLayout(block_size=BLOCK_SIZE, window=window, sink_tokens=sink_tokens, num_steps_ahead=num_steps_ahead)
    scheduler = Scheduler(limits, layout, BlockPool(num_sequences * (length // BLOCK_SIZE + 2)))
    vocab_size, no_ends = tokenizer.get_vocab_size(), frozenset[int]()
    grammars = GrammarCompiler(tokenizer, no_ends, vocab_size)
    stopwatch = _Stopwatch()
    executor = _Executor(vocab_size, num_steps_ahead)
    executor.start = stopwatch.wrap("runner", executor.start)
    runner = PlanRunner(executor)
    core = EngineCore(scheduler, runner, tokenizer, no_ends, no_adapters(), grammars)
    chance = random.Random(1)
    requests = [
        GenerationRequest(
            request_id=f"{i:024x}",
            prompt_token_ids=tuple(chance.randrange(1000) for _ in range(prompt_tokens)),
            sampling=SamplingParams(max_tokens=length - prompt_tokens, seed=i, ignore_eos=True),
        )
        for i in range(num_sequences)
    ]
    turns_s: list[float] = []

    def on_turn() -> None:
        turns_s.append(time.perf_counter())
        if len(turns_s) > WARM_UP_STEPS + num_steps:
            raise _Finished

    scheduler.schedule = stopwatch.wrap("schedule", scheduler.schedule)
    runner.start = stopwatch.wrap("plan", runner.start)
    scheduler.apply = stopwatch.wrap("apply", scheduler.apply)
    core.step = stopwatch.wrap("step", core.step)
    socket = _Socket(requests, on_turn)
    loop = EngineLoop(core, socket)
    loop._poller = socket
    keep_for_good()  # as in the engine process: otherwise full collections of the imported modules are measured
    try:
        loop.run()
    except _Finished:
        pass
    assert scheduler.totals.num_preemptions == 0 and len(scheduler.running) == num_sequences

    whole = [(after - before) * 1000 for before, after in itertools.pairwise(turns_s)][WARM_UP_STEPS:]
    parts = {name: [s * 1000 for s in seconds][-len(whole) :] for name, seconds in stopwatch.seconds.items()}
    parts["plan"] = list(map(float.__sub__, parts["plan"], parts["runner"]))
    inner = zip(parts["step"], parts["schedule"], parts["plan"], parts["runner"], parts["apply"], strict=True)
    parts["text"] = [step - sum(others) for step, *others in inner]
    parts["encode"] = [turn - step for turn, step in zip(whole, parts.pop("step"), strict=True)]
    ms = {name: round(statistics.median(values), 3) for name, values in parts.items()}
    ms["all_but_runner"] = round(statistics.median(map(float.__sub__, whole, parts["runner"])), 3)
    ms["all_but_runner_p99"] = round(sorted(map(float.__sub__, whole, parts["runner"]))[int(0.99 * len(whole))], 3)
    return ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--window", type=int, default=None, help="tokens each layer looks back (default: no window)")
    parser.add_argument("--steps-ahead", type=int, choices=(0, 1), default=0, help="1: as on a GPU (default: 0)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    rows = []
    for number in options.sequences:
        ms = measure(number, options.prompt_tokens, options.steps, options.window, options.steps_ahead)
        print(json.dumps({"sequences": number, "ms_per_step": ms}), flush=True)
        rows.append({"sequences": number, "ms_per_step": ms})
    if not options.no_record:
        figures = {
            "prompt_tokens": options.prompt_tokens,
            "steps": options.steps,
            "window": options.window,
            "steps_ahead": options.steps_ahead,
        }
        write_result("engine", figures | {"runs": rows})


if __name__ == "__main__":
    main()
