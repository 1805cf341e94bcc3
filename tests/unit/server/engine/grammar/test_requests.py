"""Requests whose answers follow a grammar, beside others, over the real scheduler, model and grammar library."""

import json
from typing import Any

import jsonschema
import pytest

from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.protocol.messages import Delta, Rejected
from stellarbyte_server.protocol.request import RequestRejected
from tests.support.engines.engine import BACKENDS, Backend, make_request
from tests.support.engines.engine_core import VOCABULARY, Script, drain, make_core, model_core, text_of
from tests.support.models.byte_transformer import make_model, random_tokens
from tests.support.schemas import SCHEMAS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_blocks", [400, 30])
def test_in_a_mixed_batch_each_answer_follows_its_own_grammar_and_the_others_notice_nothing(
    backend: Backend, num_blocks: int
) -> None:
    """12 requests at once at temperature 1.5, every fourth without a grammar; with 30 blocks some are preempted."""
    model = make_model(vocab_size=VOCABULARY)
    core = model_core(model, backend, num_blocks=num_blocks)
    requests, plain = [], []
    for i in range(12):
        schema = None if i % 4 == 3 else SCHEMAS[i % 4]
        fields: dict[str, Any] = {"temperature": 1.5, "seed": i, "request_id": str(i), "max_tokens": 60}
        prompt = random_tokens(6 + i, seed=i)
        if schema is None:
            plain.append(make_request(prompt, ignore_eos=True, return_token_ids=True, **fields))
        requests.append(plain[-1] if schema is None else make_request(prompt, grammar=json_grammar(schema), **fields))
    said = drain(core, *requests)
    assert (core.stats().num_preemptions_total > 0) == (num_blocks == 30)
    for i, schema in enumerate(SCHEMAS * 3):
        number = i // 3 * 4 + i % 3
        items = said[str(number)]
        assert items[-1].finish_reason == "stop"
        jsonschema.validate(json.loads(text_of(items)), schema)
    alone = drain(model_core(model, backend, num_blocks=400), *plain)
    for request in plain:
        ids = [[d.token_ids for d in found[request.request_id] if isinstance(d, Delta)] for found in (said, alone)]
        assert ids[0] == ids[1]
    assert core.scheduler.pool.num_used == 0


def test_a_complete_answer_ends_at_once_also_without_an_end_token() -> None:
    core = make_core(Script('{"n": 7}xxxx'))
    _, *deltas = drain(core, make_request([1], 50, grammar=json_grammar(SCHEMAS[0])))["r"]
    assert (text_of(deltas), deltas[-1].finish_reason, len(deltas)) == ('{"n": 7}', "stop", 8)


def test_the_end_token_ends_an_answer_that_could_go_on() -> None:
    grammar = json_grammar({"type": "integer"})
    deltas = drain(make_core(Script("12$")), make_request([1], 50, grammar=grammar, ignore_eos=False))["r"]
    assert (text_of(deltas), deltas[-1].finish_reason) == ("12", "stop")


def test_a_token_that_the_grammar_forbids_ends_the_request_with_an_error_and_no_other() -> None:
    """It cannot be sampled; should it ever be, only its own request fails."""
    core = make_core(Script("nope"))
    requests = [make_request([1], 4, "bad", grammar=json_grammar(SCHEMAS[0])), make_request([1], 4, "good")]
    said = drain(core, *requests)
    assert said["bad"][-1].finish_reason == "error" and said["bad"][-1].error
    assert text_of(said["good"]) == "nope"


def test_a_grammar_that_cannot_be_compiled_is_rejected_while_others_run() -> None:
    core = make_core(Script("ab"))
    requests = [make_request([1], 4, "bad", grammar="start: %%"), make_request([1], 4, "good")]
    said = drain(core, *requests)
    (rejected,) = said["bad"]
    assert isinstance(rejected, Rejected) and "\n" not in rejected.message
    assert text_of(said["good"]) == "abab"
    assert core.stats().num_waiting == 0 and not core.has_work


def test_a_request_that_is_aborted_while_its_grammar_compiles_is_gone() -> None:
    core = make_core(Script("ab"))
    core.submit(make_request([1], 4, "r", grammar=json_grammar(SCHEMAS[0])))
    assert core.stats().num_waiting == 1
    core.abort("r")
    said = drain(core, make_request([1], 4, "later", grammar=json_grammar({"const": "ababab"})))
    assert said.keys() == {"later"}
    assert core.stats().num_waiting == 0 and not core.has_work


def test_a_grammar_that_reaches_its_limits_ends_in_an_error_and_not_as_if_it_were_complete() -> None:
    """The library then allows nothing but the end, which was taken for a complete answer."""
    core = make_core(Script('{"a": "$'))
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    core.submit(make_request([1], 50, grammar=json_grammar(schema)))
    while not core.has_work:
        core.take_replies()
    for _ in range(7):
        core.step()
    grammar = core.scheduler.running[0].grammar
    assert isinstance(grammar, TokenGrammar)
    grammar._matcher.consume_token(ord("\n"))  # no text goes on so
    (last,) = core.step()
    assert isinstance(last, Delta) and (last.finish_reason, last.code) == ("error", "grammar_refused")


def test_requests_whose_grammars_compile_take_places_in_the_queue() -> None:
    core = make_core(Script("12$"), max_num_seqs=1, max_queued_requests=2)
    grammar = json_grammar({"type": "integer"})
    core.submit(make_request([1], 4, "plain"))
    for name in "ab":
        core.submit(make_request([1], 4, name, grammar=grammar))
    for late in (make_request([1], 4, "c", grammar=grammar), make_request([1], 4, "d")):
        with pytest.raises(RequestRejected) as refusal:
            core.submit(late)
        assert refusal.value.code == "queue_full"
    core.abort("a")
    said = drain(core, make_request([1], 4, "e", grammar=grammar))
    assert text_of(said["e"]) == "12"
