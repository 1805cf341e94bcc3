"""What is counted of the lives of requests: each ends in exactly one total, and times are those of its own."""

import msgspec
import pytest

from stellarbyte_server.engine.request_totals import CLIENT_LEFT, RequestTotals
from stellarbyte_server.protocol.histogram import FIRST_TOKEN_S, LAG_S, Buckets, Histogram
from stellarbyte_server.protocol.messages import Delta, EngineStats, EngineTotals, HttpObservations, failure
from stellarbyte_server.protocol.request import GenerationRequest, SamplingParams

STATS = EngineStats(
    num_running=0,
    num_waiting=0,
    kv_cache_usage=0.0,
    num_blocks_used=0,
    prompt_tokens_total=0,
    generation_tokens_total=0,
    num_preemptions_total=0,
    num_steps_total=0,
)


def request(request_id: str, prompt_tokens: int = 3) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=5, seed=0)
    return GenerationRequest(request_id=request_id, prompt_token_ids=(7,) * prompt_tokens, sampling=sampling)


def token(request_id: str, finish_reason: str | None = None) -> Delta:
    return Delta(request_id=request_id, text="a", num_tokens=1, finish_reason=finish_reason)


def snapshot(totals: RequestTotals) -> EngineTotals:
    return totals.snapshot(STATS)


def sum_of(buckets: Buckets) -> tuple[int, float]:
    return buckets.num_values, pytest.approx(buckets.total)


def test_times_of_a_request() -> None:
    totals = RequestTotals()
    totals.note_queued([request("r", 40)], arrived_s=10.0, sent_s=11.0)
    totals.note_started("r", 13.0)
    for now_s, finish_reason in ((14.0, None), (14.5, None), (17.0, "stop")):
        totals.note_delta(token("r", finish_reason), now_s)
    seen = snapshot(totals)
    assert seen.finished == {"stop": 1, "length": 0}
    assert sum_of(seen.queue_s) == (1, 2.0), "from when it was sent to its first step"
    assert sum_of(seen.request_s) == (1, 7.0), "from its arrival to its last token"
    assert sum_of(seen.between_tokens_s) == (2, 3.0), "a gap after each token but the last"
    assert sum_of(seen.prefill_s) == (1, 1.0), "from its first step to its first token"
    assert sum_of(seen.decode_s) == (1, 3.0) and sum_of(seen.inference_s) == (1, 4.0)
    assert sum_of(seen.max_tokens) == (1, 5) and sum_of(seen.num_preemptions) == (1, 0)
    assert sum_of(seen.prompt_tokens) == (1, 40)
    assert sum_of(seen.generation_tokens) == (1, 3)


def test_answers_to_one_prompt_are_counted_together() -> None:
    totals = RequestTotals()
    ids = ["a0", "a1", "a2", "b0"]
    requests = [
        msgspec.structs.replace(request(name), sampling=SamplingParams(max_tokens=5, seed=0, choice=int(name[1])))
        for name in ids
    ]
    totals.note_queued(requests, arrived_s=0.0, sent_s=0.0)
    for name in ids:
        totals.note_started(name, 1.0)
        totals.note_delta(msgspec.structs.replace(token(name, "stop"), num_preemptions=2), 2.0)
    seen = snapshot(totals)
    assert sum_of(seen.num_choices) == (2, 4)
    assert sum_of(seen.num_preemptions) == (4, 8)


def test_every_request_ends_in_one_total() -> None:
    totals = RequestTotals()
    ids = ("stopped", "cut", "left", "failed", "failed early", "refused")
    totals.note_queued(map(request, ids), arrived_s=0.0, sent_s=0.0)
    for request_id in ids[:4]:
        totals.note_started(request_id, 1.0)
    totals.note_delta(token("stopped", "stop"), 2.0)
    totals.note_delta(token("cut", "length"), 2.0)
    totals.note_aborted("left", CLIENT_LEFT)
    totals.note_delta(failure("failed", "It failed."), 2.0)
    totals.note_delta(failure("failed early", "It failed."), 2.0)
    totals.note_refused("refused")
    seen = snapshot(totals)
    assert seen.finished == {"stop": 1, "length": 1}
    assert seen.aborted == {"client_left": 1, "http_process_lost": 0, "failed": 2}
    assert sum_of(seen.request_s)[0] == 2, "latency is of requests that were answered"
    assert not totals._lives, "nothing is kept of requests that have ended"


def test_a_request_that_is_only_a_prompt_has_no_gaps() -> None:
    totals = RequestTotals()
    totals.note_queued([request("r")], arrived_s=0.0, sent_s=0.0)
    totals.note_started("r", 0.0)
    totals.note_delta(Delta(request_id="r", text="", num_tokens=0, finish_reason="length"), 1.0)
    seen = snapshot(totals)
    assert sum_of(seen.prefill_s) == (1, 1.0) and sum_of(seen.decode_s) == (1, 0.0)
    assert sum_of(seen.between_tokens_s) == (0, 0)
    assert sum_of(seen.generation_tokens) == (1, 0)


def test_steps_and_what_http_processes_saw_add_up() -> None:
    totals = RequestTotals()
    totals.note_step(0.25, 32)
    totals.note_step(0.5, 4)
    for _ in range(2):
        first_token_s = Histogram(FIRST_TOKEN_S)
        first_token_s.observe(0.3)
        totals.add_observations(
            HttpObservations(
                first_token_s=first_token_s.snapshot(),
                stream_lag_s=Histogram(LAG_S).snapshot(),
                rejected={"queue_full": 2},
            )
        )
    seen = snapshot(totals)
    assert sum_of(seen.step_s) == (2, 0.75) and sum_of(seen.step_tokens) == (2, 36)
    assert sum_of(seen.first_token_s) == (2, 0.6) and sum_of(seen.stream_lag_s) == (0, 0)
    assert seen.rejected == {"queue_full": 4}
