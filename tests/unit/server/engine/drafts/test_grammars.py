"""Tokens that a grammar forces are verified in one step, and drafts never lead a grammar astray."""

from typing import Any

import msgspec
import pytest

from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.run.planner import masks_along
from stellarbyte_server.protocol.messages import Delta
from tests.support.engines.drafting import (
    answers_of,
    compiled,
    compute_masks_apart,
    compute_masks_here,
    drafting_core,
)
from tests.support.engines.engine import make_request
from tests.support.engines.engine_core import VOCABULARY
from tests.support.engines.reasoning_engine import marks, reasoning_tokenizer
from tests.support.models.byte_transformer import make_model, random_tokens

SCHEMA = {
    "type": "object",
    "properties": {
        "first_name_of_the_person": {"enum": ["Ada", "Alan"]},
        "is_a_computer_scientist": {"type": "boolean"},
    },
    "required": ["first_name_of_the_person", "is_a_computer_scientist"],
    "additionalProperties": False,
}


def answer(core: EngineCore, max_tokens: int = 120, **fields: Any) -> Delta:
    request = make_request(random_tokens(9), max_tokens, return_token_ids=True, **fields)
    return answers_of(core, [request], {"r": 0}, {})["r"]


def core_with(drafts: Drafts | None) -> EngineCore:
    return drafting_core(make_model(vocab_size=VOCABULARY), drafts, num_blocks=150)


@pytest.fixture(params=["quick", "slow"])
def masks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the engine's thread or another one computes all masks, however busy the machine is."""
    (compute_masks_here if request.param == "quick" else compute_masks_apart)(monkeypatch)
    return str(request.param)


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_by_a_schema_takes_a_step_for_each_choice_only(temperature: float) -> None:
    fields: dict[str, Any] = {"grammar": json_grammar(SCHEMA), "temperature": temperature}
    drafts = Drafts(clock=lambda: 0.0)
    plain, drafting = core_with(None), core_with(drafts)
    expected = answer(plain, **fields)
    assert answer(drafting, **fields) == expected
    assert expected.finish_reason == "stop" and expected.num_tokens > 60
    assert plain.answers.num_steps == expected.num_tokens
    assert drafting.answers.num_steps < expected.num_tokens / 3
    assert drafts.totals.num_draft_tokens == drafts.totals.num_accepted_tokens


def test_values_are_guessed_between_the_keys_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several choices in one step, where they are those of the object before."""
    compute_masks_here(monkeypatch)
    value = {"enum": ["Ada Lovelace", "Alan Turing", "Emmy Noether"]}
    item = {"type": "object", "properties": {"name": value}, "required": ["name"], "additionalProperties": False}
    schema = {"type": "array", "items": item, "minItems": 12, "maxItems": 12}
    # The model repeats itself: "A" is likely, and "l" after it.
    fields: dict[str, Any] = {"grammar": json_grammar(schema), "logit_bias": ((ord("A"), 30.0), (ord("l"), 30.0))}
    drafts = Drafts(clock=lambda: 0.0)
    expected = answer(core_with(None), max_tokens=400, **fields)
    core = core_with(drafts)
    assert answer(core, max_tokens=400, **fields) == expected
    assert expected.text.count("Alan Turing") == 12
    assert core.answers.num_steps < 24, "each object has two choices"


@pytest.mark.usefixtures("masks")
def test_reasoning_before_the_answer_stays_as_it_is() -> None:
    """Limited reasoning, its end mark, which is forced, and JSON after it."""
    fields = {
        "grammar": json_grammar(SCHEMA),
        "reasoning": msgspec.structs.replace(marks(), max_tokens=5, is_open=True),
    }
    model = make_model(vocab_size=261)
    drafts = Drafts(clock=lambda: 0.0)
    said = [answer(drafting_core(model, each, tokenizer=reasoning_tokenizer()), **fields) for each in (None, drafts)]
    assert said[0] == said[1]
    assert drafts.totals.num_accepted_tokens > 30


def test_masks_along_a_draft_end_where_the_grammar_does() -> None:
    grammar = compiled("start: /[a-f][0-9]{2}xy/")

    def masks(draft: bytes | tuple[int, ...]) -> int:
        before = masks_along(grammar, ())
        found = masks_along(grammar, draft)
        assert found[: len(before)] == before
        assert masks_along(grammar, ()) == before, "the grammar is where it was"
        return len(found)

    assert masks(b"") == 1
    assert masks(b"a12x") == 5
    assert masks(b"a12xy") == 5, "after the last one the answer is complete"
    assert masks(b"a12xyz") == 5
    assert masks(b"zzz") == 1
    assert masks(b"a1z2") == 3
    assert masks((ord("a"), 258, 5)) == 2
    assert masks((10**6, 5)) == 1
    grammar.accept(ord("a"))
    assert masks(b"12x") == 4
    assert grammar.error is None


def test_forced_tokens_are_those_that_masks_leave() -> None:
    grammar = compiled('start: "ab" /[0-9]/ "xyz"')
    assert bytes(grammar.forced()) == b"ab"
    for token in b"ab":
        grammar.accept(token)
    assert grammar.forced() == ()
    assert [grammar.num_allowed(text) for text in (b"1xyz", b"1xq", b"x")] == [4, 2, 0]
    grammar.accept(ord("1"))
    assert bytes(grammar.forced()) == b"xyz"
