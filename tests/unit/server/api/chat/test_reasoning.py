"""What a chat's template is told of reasoning, and whether its prompt has begun it."""

from typing import Any

import pytest
from tokenizers import Tokenizer

from stellarbyte_server.api.chat.messages import reasoning_field
from stellarbyte_server.api.chat.reasoning import reasoning_of, template_variables
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.service import Service
from stellarbyte_server.config.settings import EngineSettings, ServerSettings
from stellarbyte_server.protocol.request import Channels
from stellarbyte_server.tokens.tokenizer import DEFAULT_TEMPLATE, ChatTemplate, PromptTokenizer
from tests.support.engines import harmony_engine
from tests.support.engines.harmony_engine import harmony_tokenizer, tokens_of
from tests.support.engines.reasoning_engine import VOCABULARY, reasoning_tokenizer
from tests.support.tools.templates import HARMONY


def service_with(
    template: str = "{{ messages }}", parser: Any = "auto", known: Tokenizer | None = None, vocab_size: int = VOCABULARY
) -> Service:
    settings = ServerSettings(engine=EngineSettings(model="m"), reasoning_parser=parser)
    known = reasoning_tokenizer() if known is None else known
    tokenizer = PromptTokenizer(known, {DEFAULT_TEMPLATE: ChatTemplate(template, {})}, vocab_size)
    unused: Any = None
    return Service(
        settings=settings,
        client=unused,
        info=unused,
        tokenizer=tokenizer,
        sampling_defaults={},
        started_at=0,
        registry=unused,
    )


def is_open(prompt: str, final: str | None = None, **fields: Any) -> bool | None:
    messages = [{"role": "user", "content": "q"}] if final is None else [{"role": "assistant", "content": final}]
    body = ChatBody.model_validate(
        {"model": "m", "messages": messages, "continue_final_message": final is not None, **fields}
    )
    service = service_with()
    found = reasoning_of(body, service.tokenizer.encode(prompt), service)
    assert not isinstance(found, Channels)
    return None if found is None else found.is_open


def in_channels(template: str = HARMONY) -> Service:
    return service_with(template, known=harmony_tokenizer(), vocab_size=harmony_engine.VOCABULARY)


@pytest.mark.parametrize(
    ("template", "effort", "values", "ignored"),
    [
        ("{{ reasoning_effort }}", "high", {"reasoning_effort": "high"}, ()),
        ("{% if enable_thinking %}x{% endif %}", "high", {}, ("reasoning_effort",)),
        ("{% if enable_thinking %}x{% endif %}", "none", {"enable_thinking": False}, ()),
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}", "none", {"thinking": False}, ()),
        ("plain", "none", {}, ("reasoning_effort",)),
        ("{% if x %}{% endif %}", None, {}, ()),
    ],
)
def test_an_effort_is_given_as_the_template_reads_it(
    template: str, effort: Any, values: dict[str, Any], ignored: tuple[str, ...]
) -> None:
    assert template_variables(None, effort, service_with(template)) == (values, ignored)


def test_own_variables_win_over_the_effort() -> None:
    service = service_with("{% if enable_thinking %}x{% endif %}")
    found = template_variables({"enable_thinking": True, "mood": 1}, "none", service)
    assert found == ({"enable_thinking": True}, ("chat_template_kwargs.mood",))


def test_the_end_of_the_prompt_says_whether_reasoning_has_begun_or_ended() -> None:
    assert is_open("what is <think>?") is False
    assert is_open("assistant\n<think>\n") is True
    assert is_open("<think>\n\n</think>\n\n") is None


def test_a_message_that_is_continued_says_where_it_stands() -> None:
    assert is_open("", "<think>\nbecause") is True
    assert is_open("", "<think>\nbecause</think>So") is None
    assert is_open("", "So") is None


def test_without_a_parser_nothing_is_found_and_no_bound_is_taken() -> None:
    service = service_with(parser="none")
    body = ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "q"}]})
    assert reasoning_of(body, [1], service) is None
    with pytest.raises(ApiError) as refusal:
        reasoning_of(body.model_copy(update={"max_reasoning_tokens": 1}), [1], service)
    assert refusal.value.param == "max_reasoning_tokens"


@pytest.mark.parametrize(
    ("effort", "shown", "limit"),
    [("none", "low", 0), ("minimal", "low", 9), ("medium", "medium", 9), ("xhigh", "high", 9), ("max", "high", 9)],
)
def test_models_with_channels_get_an_effort_that_they_know(effort: Any, shown: str, limit: int) -> None:
    service = in_channels()
    assert template_variables(None, effort, service) == ({"reasoning_effort": shown}, ())
    body = ChatBody.model_validate(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "q"}],
            "reasoning_effort": effort,
            "max_reasoning_tokens": 9,
        }
    )
    found = reasoning_of(body, tokens_of("<|start|>assistant"), service)
    assert isinstance(found, Channels) and found.max_tokens == limit


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        ("<|start|>user<|message|>q<|end|><|start|>assistant", "<|start|>assistant"),
        ("<|end|><|start|>assistant<|channel|>final<|message|>it is", "<|start|>assistant<|channel|>final<|message|>"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>analysis<|message|>"),
        ("<|start|>assistant<|channel|>final<|message|>so<|return|>", ""),
        ("<|start|>user<|message|>q<|end|>", ""),
        ("plain", ""),
    ],
)
def test_the_message_that_a_prompt_has_begun_is_known(prompt: str, begun: str) -> None:
    body = ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "q"}]})
    found = reasoning_of(body, tokens_of(prompt), in_channels())
    assert isinstance(found, Channels) and found.begun == tuple(tokens_of(begun))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (None, None),
        (HARMONY, "thinking"),
        ("{{ message.content }}", None),
        ("{{ message.reasoning_content }}", "reasoning_content"),
        ("{% if message['reasoning'] %}{{ message['thinking'] }}{% endif %}", "reasoning"),
        ('{{ message["thinking"] }}', "thinking"),
        ("{% if thinking %}{{ reasoning }}{% endif %}", None),
        ("{{ message.reasoning_effort }}", None),
    ],
)
def test_a_template_is_given_earlier_reasoning_in_the_field_that_it_reads(source: str | None, name: str | None) -> None:
    assert reasoning_field(source) == name
