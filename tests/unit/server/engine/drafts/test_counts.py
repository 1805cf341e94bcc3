"""What is counted of drafts, and requests that do not want them or fail within one."""

import random
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch

from stellarbyte.sampling.sampler import NO_TOKEN, RowSampling
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.drafting import Guesses, answers_of, compute_masks_here, drafting_core
from tests.support.engines.engine import make_request, sampling_by
from tests.support.engines.engine_core import VOCABULARY
from tests.support.models.byte_transformer import make_model, random_tokens

FORCING = 'start: "the first: " /[0-9]{4}/ ", and the second: " /[a-z]{4}/'


def guessing_core(coming: dict[str, list[int]], **options: Any) -> EngineCore:
    drafts = Guesses(coming, random.Random(0))
    return drafting_core(make_model(vocab_size=VOCABULARY), drafts, **options)


def answer(core: EngineCore, request: GenerationRequest) -> Delta:
    return answers_of(core, [request], {request.request_id: 0}, {})[request.request_id]


def executor_of(core: EngineCore) -> Any:
    assert isinstance(core.runner, PlanRunner)
    return core.runner.executor


def test_totals_are_those_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[Chunk, list[int]]] = []
    plain, requests = drafting_core(make_model(vocab_size=VOCABULARY), None), []
    for number in range(5):
        requests.append(make_request(random_tokens(7 + number), 40, str(number), return_token_ids=True, seed=number))
    arrivals = {request.request_id: 0 for request in requests}
    expected = answers_of(plain, requests, arrivals, {})
    core = guessing_core({name: list(delta.token_ids) for name, delta in expected.items()})
    record = core.answers.record

    def noting(chunks: list[Chunk], result: StepResult) -> list[Delta]:
        steps.extend(zip(chunks, [list(tokens) for tokens in result.tokens], strict=True))
        return record(chunks, result)

    monkeypatch.setattr(core.answers, "record", noting)
    answers_of(core, requests, arrivals, {})
    drafted = [(chunk.draft, tokens) for chunk, tokens in steps if chunk.draft]
    by_place: Counter[int] = Counter()
    for draft, tokens in drafted:
        for place in range(len(draft)):
            if tuple(tokens[: place + 1]) != draft[: place + 1]:
                break
            by_place[place] += 1
    stats = core.stats()
    assert stats.drafts_total == len(drafted) > 10
    assert stats.draft_tokens_total == sum(len(draft) for draft, _ in drafted)
    assert stats.accepted_tokens_total == by_place.total() > 20
    assert {place: count for place, count in enumerate(stats.accepted_by_place) if count} == by_place
    assert core.answers.num_step_tokens == sum(chunk.length for chunk, _ in steps)
    assert stats.generation_tokens_total == sum(delta.num_tokens for delta in expected.values())


def test_a_request_that_wants_none_gets_a_step_for_each_token() -> None:
    prompt = [1, 2, 3] * 10
    for speculative in (True, False):
        core = drafting_core(make_model(vocab_size=VOCABULARY), Drafts(clock=lambda: 0.0))
        request = make_request(prompt, 40, logit_bias=((5, 100.0),))
        answer(core, msgspec.structs.replace(request, speculative=speculative))
        assert (core.answers.num_steps < 20) is speculative
        assert (core.answers.num_steps == 40) is not speculative
        assert (core.stats().drafts_total == 0) is not speculative


def test_a_prediction_makes_steps_fewer_and_its_tokens_are_counted() -> None:
    model = make_model(vocab_size=VOCABULARY)
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 3, "return_token_ids": True, "ignore_eos": True}
    request = make_request(random_tokens(9), 60, **fields)
    expected = answer(drafting_core(model, None), request)
    predicted = list(expected.token_ids)
    predicted[30:32] = [0, 1, 0]
    core = drafting_core(model, Drafts(clock=lambda: 0.0))
    found = answer(core, msgspec.structs.replace(request, prediction_token_ids=tuple(predicted)))
    assert found.token_ids == expected.token_ids
    assert core.answers.num_steps < 30
    assert found.num_predicted == 58
    without = answer(drafting_core(model, Drafts()), msgspec.structs.replace(request, speculative=False))
    assert without.num_predicted == 0


def test_a_token_that_cannot_be_sampled_within_a_draft_fails_as_without() -> None:
    """NaN at one position: what came before is delivered, and then the request fails."""
    request = make_request(random_tokens(9), 30, return_token_ids=True, logprobs=1, repetition_penalty=1.2)
    alone = drafting_core(make_model(vocab_size=VOCABULARY), None)
    coming = list(answer(alone, request).token_ids)
    answers = []
    for core in (drafting_core(make_model(vocab_size=VOCABULARY), None), guessing_core({"r": coming})):
        sample = executor_of(core).model.sample

        def failing(logits_RV: torch.Tensor, rows: list[RowSampling], sample: Any = sample) -> list[int]:
            tokens = sample(logits_RV, rows)
            return [NO_TOKEN if row.position == 9 + 17 else token for row, token in zip(rows, tokens, strict=True)]

        with sampling_by(executor_of(core), failing):
            answers.append(answer(core, request))
        assert core.scheduler.pool.num_used == 0
    assert answers[0].finish_reason == answers[1].finish_reason == "error"
    assert answers[0].error == answers[1].error
    assert answers[0].token_ids == answers[1].token_ids == tuple(coming[:17])


@pytest.mark.parametrize("logprobs", [None, 2])
def test_only_choices_of_a_grammar_take_logits(logprobs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the tokens' log-probabilities are requested."""
    compute_masks_here(monkeypatch)
    fields: dict[str, Any] = {"grammar": FORCING, "temperature": 1.0, "repetition_penalty": 1.3, "logprobs": logprobs}
    request = make_request(random_tokens(9), 60, return_token_ids=True, **fields)
    num_rows, answers = [], []
    for drafts in (None, Drafts(clock=lambda: 0.0)):
        core = drafting_core(make_model(vocab_size=VOCABULARY), drafts)
        model = executor_of(core).model
        rows: list[int] = []

        def head(hidden_RC: torch.Tensor, *args: Any, head: Any = model.head, rows: list[int] = rows) -> torch.Tensor:
            rows.append(len(hidden_RC))
            return head(hidden_RC, *args)

        monkeypatch.setattr(model, "head", head)
        answers.append(answer(core, request))
        num_rows.append(sum(rows))
    assert answers[0].token_ids == answers[1].token_ids
    assert [entry.token_id for entry in answers[0].logprobs] == [entry.token_id for entry in answers[1].logprobs]
    assert [entry.logprob for entry in answers[0].logprobs] == pytest.approx(
        [entry.logprob for entry in answers[1].logprobs], abs=1e-4
    )
    assert num_rows[0] == answers[0].num_tokens == 37
    assert num_rows[1] == (9 if logprobs is None else 37), "the first one, which comes with the prompt, and the choices"


def test_hidden_states_that_are_not_finite_before_a_forced_token_fail_as_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute_masks_here(monkeypatch)
    request = make_request(random_tokens(9), 60, return_token_ids=True, grammar=FORCING)
    coming = answer(drafting_core(make_model(vocab_size=VOCABULARY), None), request).token_ids
    for place in (1, 4, 5, 17):
        answers = []
        for drafts in (None, Drafts(clock=lambda: 0.0)):
            core = drafting_core(make_model(vocab_size=VOCABULARY), drafts)
            model = executor_of(core).model

            def hidden(batch: Any, cache: Any, place: int = place, compute: Any = model.hidden) -> torch.Tensor:
                hidden_TC = compute(batch, cache).clone()
                hidden_TC[batch.positions_T == 8 + place] = float("nan")
                return hidden_TC

            monkeypatch.setattr(model, "hidden", hidden)
            answers.append(answer(core, request))
            assert core.scheduler.pool.num_used == 0
        assert answers[0].finish_reason == answers[1].finish_reason == "error"
        assert answers[0].error == answers[1].error
        assert answers[0].token_ids == answers[1].token_ids == coming[:place]


def test_tokens_after_a_stop_within_a_draft_are_dropped() -> None:
    """Their evicted tokens are not counted either."""
    model = make_model(vocab_size=VOCABULARY, sliding_window=8, sink_tokens=2)
    request = make_request(random_tokens(9), 40, return_token_ids=True)
    coming = list(answer(drafting_core(model, None), request).token_ids)
    for number in range(12, 30):
        ending = make_request(random_tokens(9), 40, return_token_ids=True, stop_token_ids=(coming[number],))
        expected = answer(drafting_core(model, None), ending)
        assert answer(drafting_core(model, Guesses({"r": coming}, random.Random(number))), ending) == expected
