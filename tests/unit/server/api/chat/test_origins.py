"""Where a prompt's text came from, compared with prompts put together by hand from parts whose origin is known."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stellarbyte_server.api.chat.messages import messages_for_template
from stellarbyte_server.api.chat.origins import Stretch, stretches_of_chat, with_tokens
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.tokens.tokenizer import ChatTemplate, PromptTokenizer
from tests.support.servers.fake_engine import make_tokenizer

TURNS = "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content SHOWN }}<|end|>\n{% endfor %}"
PLAIN, TRIMMING = TURNS.replace("SHOWN", ""), TURNS.replace("SHOWN", "| trim")
GENERATION = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
CONTENTS = st.text("ab \n<|>", max_size=8) | st.sampled_from(["user", "<|user|>", "<|end|>", " user ", "assistant"])


def body_of(*messages: tuple[str, str], **fields: object) -> ChatBody:
    listed = [{"role": role, "content": content} for role, content in messages]
    return ChatBody.model_validate({"model": "m", "messages": listed, **fields})


def renderer(source: str) -> Callable[[ChatBody], str]:
    template = ChatTemplate(source, {})
    return lambda body: template.render(messages_for_template(body.messages, None, source))


def origins(source: str, body: ChatBody) -> list[Stretch]:
    render = renderer(source)
    text = render(body)
    found = stretches_of_chat(body, text, render)
    assert "".join(stretch.text for stretch in found) == text
    return found


def joined(parts: list[Stretch]) -> list[Stretch]:
    """Without empty parts, and with the template's text in one piece."""
    result: list[Stretch] = []
    for part in parts:
        if result and part.source == result[-1].source == "template":
            result[-1] = Stretch("template", result[-1].text + part.text)
        elif part.text:
            result.append(part)
    return result


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), CONTENTS), min_size=1, max_size=5))
@pytest.mark.parametrize("trims", [False, True])
def test_each_content_is_found_whatever_it_looks_like(trims: bool, messages: list[tuple[str, str]]) -> None:
    expected: list[Stretch] = []
    for number, (role, content) in enumerate(messages):
        shown = content.strip() if trims else content
        expected += [Stretch("template", f"<|{role}|>\n"), Stretch("message", shown, number)]
        expected.append(Stretch("template", "<|end|>\n"))
    expected.append(Stretch("template", "<|assistant|>\n"))
    source = (TRIMMING if trims else PLAIN) + GENERATION
    assert origins(source, body_of(*messages)) == joined(expected)


def test_a_template_that_shows_the_end_of_a_content_or_shows_it_twice() -> None:
    thinks = PLAIN.replace("message.content", "message.content.split('</think>')[-1]")
    body = body_of(("user", "hi"), ("assistant", "<think>ha</think>bye"))
    assert origins(thinks, body) == [
        Stretch("template", "<|user|>\n"),
        Stretch("message", "hi", 0),
        Stretch("template", "<|end|>\n<|assistant|>\n"),
        Stretch("message", "bye", 1),
        Stretch("template", "<|end|>\n"),
    ]
    twice = origins("{{ messages[0].content }}, {{ messages[0].content }}!", body_of(("user", "hi")))
    assert twice == [
        Stretch("message", "hi", 0),
        Stretch("template", ", "),
        Stretch("message", "hi", 0),
        Stretch("template", "!"),
    ]


def test_reasoning_and_results_belong_to_their_messages() -> None:
    """Of a template without tools, for which calls and results become texts."""
    source = "{% for m in messages %}[{{ m.role }}:{{ m.reasoning_content }}/{{ m.content }}]{% endfor %}"
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    listed = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "why"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "result", "tool_call_id": "c"},
    ]
    found = origins(source, ChatBody.model_validate({"model": "m", "messages": listed}))
    shown = [(stretch.message, stretch.text) for stretch in found if stretch.source == "message"]
    assert shown == [(0, "q"), (1, "why"), (1, "a"), (2, "r"), (4, "result")]


def test_a_template_that_changes_contents_is_of_unknown_origin() -> None:
    assert origins(PLAIN.replace("message.content", "message.content | length"), body_of(("user", "hi"))) == [
        Stretch("unknown", "<|user|>\n2<|end|>\n")
    ]


@given(st.lists(st.text("aé☃😀\n", max_size=4), max_size=5), st.integers(0, 2), st.integers(0, 1))
def test_tokens_belong_to_the_stretch_that_has_their_first_character(
    texts: list[str], added_before: int, added_after: int
) -> None:
    """The tokenizer of the fake model has one token for each byte."""
    tokenizer = PromptTokenizer(make_tokenizer(), {}, 259)
    text = "".join(texts)
    starts = tokenizer.starts(text, add_special_tokens=False)
    assert starts == [i for i, character in enumerate(text) for _ in character.encode()]
    stretches = [Stretch("prompt", part) for part in texts]
    found = with_tokens(stretches, [*[None] * added_before, *starts, *[None] * added_after])
    ranges = [(start, end) for _, start, end in found]
    assert [start for start, _ in ranges[1:]] == [end for _, end in ranges[:-1]], "they follow each other"
    if ranges:
        assert (ranges[0][0], ranges[-1][1]) == (0, added_before + len(starts) + added_after)
    of_texts = [end - start for stretch, start, end in found if stretch.source == "prompt"]
    if added_before or texts:
        assert of_texts == [len(part.encode()) for part in texts]
