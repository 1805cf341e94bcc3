"""Log-probabilities of requests, computed alone and in many other ways: for tests that demand the same bits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from stellarbyte_server.engine.run.runner import Runner
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.protocol.messages import TokenLogprob
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import make_request
from tests.support.models.byte_transformer import random_tokens

Logprobs = dict[str, list[TokenLogprob]]
Options = Mapping[str, int]

WAYS: Mapping[str, Options] = {
    "batch": {"max_num_seqs": 64, "max_num_batched_tokens": 512, "num_blocks": 1024},
    "pairs": {"max_num_seqs": 2},
    "chunks": {"max_num_seqs": 7, "max_num_batched_tokens": 9},
    "preempted": {"max_num_seqs": 64, "num_blocks": 60},
}
CACHED: Options = {"num_blocks": 4096, "max_num_seqs": 5, "max_num_batched_tokens": 64}


class Engine(Protocol):
    """`engine.ModelEngine` or `gpu_engine.GpuEngine`."""

    scheduler: Scheduler
    runner: Runner

    def add(self, request: GenerationRequest) -> Any: ...


def make_requests(
    number: int, *, adapters: Sequence[str | None] = ("a", None, None), shortest: int = 12
) -> list[GenerationRequest]:
    """Of many lengths, greedy and sampled, with the adapters in turn; every token comes with the 3 likeliest."""
    return [
        make_request(
            random_tokens(3 + 7 * (i % 9), seed=i),
            shortest + i % 5,
            str(i),
            seed=i,
            temperature=float(i % 2),
            logprobs=3,
            adapter=adapters[i % len(adapters)],
            repetition_penalty=1.0 + 0.1 * (i % 2),
        )
        for i in range(number)
    ]


def logprobs_of(engine: Engine, requests: Sequence[GenerationRequest]) -> Logprobs:
    """Of the generated tokens, with all requests queued at once."""
    found: Logprobs = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.scheduler.has_work:
        chunks = engine.scheduler.schedule()
        step = engine.runner.start(chunks)
        step.finish()
        result = step.result()
        for number, logprobs in result.logprobs.items():
            found[chunks[number].sequence.request.request_id] += logprobs
        for sequence, _ in engine.scheduler.apply(chunks, result.tokens):
            if sequence.num_generated >= sequence.request.sampling.max_tokens:
                engine.scheduler.remove(sequence)
    assert all(len(found[request.request_id]) == request.sampling.max_tokens for request in requests)
    return found


def assert_same_bits(
    make_engine: Callable[..., Engine],
    requests: Sequence[GenerationRequest],
    ways: Mapping[str, Options] = WAYS,
    cached: Options = CACHED,
) -> None:
    """Alone, in each of the ways, and with what the prefix cache has of the same requests.

    `make_engine` takes the options of a way; the one called "preempted" must preempt.
    """
    alone: Logprobs = {}
    engine = make_engine()
    for request in requests:
        alone |= logprobs_of(engine, [request])
    assert engine.scheduler.totals.prefix_hits == 0
    for name, options in ways.items():
        together = make_engine(**options)
        assert logprobs_of(together, requests) == alone, name
        if name == "preempted":
            assert together.scheduler.totals.num_preemptions > 0
    engine = make_engine(**cached)
    logprobs_of(engine, requests)
    assert logprobs_of(engine, requests[::-1]) == alone, "cached"
    assert engine.scheduler.totals.prefix_hits > 0
