"""The render endpoints: the tokens that the generating endpoints use, and their refusals."""

from typing import Any

import httpx
import openai
import pytest

from tests.support.documented_objects import conforms
from tests.support.servers.server_process import ServerProcess

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "user"}, {"role": "user", "content": " What\nis é? "}]


def ask(server: ServerProcess, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "fake", **fields}, timeout=30)


def check(server: ServerProcess, rendered: dict[str, Any]) -> None:
    """What is true of every rendered prompt."""
    stretches = rendered["stretches"]
    assert "".join(stretch["text"] for stretch in stretches) == rendered["prompt"]
    ends = [0, *(stretch["end"] for stretch in stretches)]
    assert [stretch["start"] for stretch in stretches] == ends[:-1]
    assert ends[-1] == rendered["count"] == len(rendered["token_ids"])
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert conforms(document, "RenderedPrompt", rendered)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": MESSAGES},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "It "}], "continue_final_message": True},
        {"messages": MESSAGES, "add_generation_prompt": False, "add_special_tokens": True},
    ],
)
def test_a_chat_has_the_tokens_that_its_answer_begins_from(fake_server: ServerProcess, fields: dict[str, Any]) -> None:
    answered = ask(fake_server, CHAT, **fields, max_tokens=3, return_token_ids=True, n=2).json()
    rendered = ask(fake_server, f"{CHAT}/render", **fields, max_tokens=3, n=2).json()
    assert rendered["token_ids"] == answered["prompt_token_ids"]
    assert (rendered["max_tokens"], rendered["model"]) == (3, "fake")
    assert rendered["max_model_len"] == ask(fake_server, "/tokenize", prompt="a").json()["max_model_len"]
    check(fake_server, rendered)
    of_messages = [(s["message"], s["role"], s["text"]) for s in rendered["stretches"] if s["source"] == "message"]
    assert of_messages == [
        (number, message["role"], message["content"]) for number, message in enumerate(fields["messages"])
    ]
    for stretch in rendered["stretches"]:  # the fake model has one token for each byte, and one for each special token
        if stretch["source"] == "message":
            assert stretch["end"] - stretch["start"] == len(stretch["text"].encode())


@pytest.mark.parametrize("prompt", ["a text", ["one", "é two"], [104, 105], [[104], [105, 106]]])
def test_a_completion_has_a_rendered_prompt_for_each_prompt(fake_server: ServerProcess, prompt: Any) -> None:
    answered = ask(fake_server, COMPLETIONS, prompt=prompt, max_tokens=2, return_token_ids=True, n=2).json()
    rendered = ask(fake_server, f"{COMPLETIONS}/render", prompt=prompt, max_tokens=2, n=2).json()
    assert [each["token_ids"] for each in rendered] == [
        choice["prompt_token_ids"] for choice in answered["choices"][::2]
    ]
    texts = [prompt] if isinstance(prompt, str) else prompt
    for number, each in enumerate(rendered):
        check(fake_server, each)
        assert {stretch["source"] for stretch in each["stretches"]} <= {"prompt", "tokenizer"}
        if isinstance(texts[0], str):
            assert each["prompt"] == texts[number]


REFUSED = [
    (COMPLETIONS, {"prompt": "a", "model": "other"}),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 100_000}),
    (COMPLETIONS, {"prompt": ""}),
    (COMPLETIONS, {"prompt": "a", "mood": "good"}),
    (COMPLETIONS, {"prompt": "a", "best_of": 1, "n": 2}),
    (COMPLETIONS, {"prompt": [10_000]}),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "("}),
    (COMPLETIONS, {"prompt": "a", "adapters": [{"name": "x"}, {"name": "x"}]}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": MESSAGES, "model": "other@12345678"}),
    (CHAT, {"messages": MESSAGES, "tool_choice": "required"}),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 1_000_000}]}),
    (CHAT, {"messages": [{"role": "tool", "content": "a", "tool_call_id": "none"}]}),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_schema"}}),
]


@pytest.mark.parametrize(("path", "fields"), REFUSED)
def test_what_generating_refuses_is_refused_alike(
    fake_server: ServerProcess, path: str, fields: dict[str, Any]
) -> None:
    wanted, seen = ask(fake_server, path, **fields), ask(fake_server, f"{path}/render", **fields)
    assert wanted.status_code >= 400
    assert (seen.status_code, seen.json()) == (wanted.status_code, wanted.json())


def test_nothing_is_generated(fake_server: ServerProcess) -> None:
    before = fake_server.metric("vllm:prompt_tokens_total")
    assert ask(fake_server, f"{CHAT}/render", messages=MESSAGES, stream=True).status_code == 200
    assert fake_server.metric("vllm:prompt_tokens_total") == before


def test_the_openai_client_reaches_them_by_their_paths(fake_server: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{fake_server.url}/v1", api_key="unused")
    rendered = client.post(
        "/chat/completions/render", cast_to=httpx.Response, body={"model": "fake", "messages": MESSAGES}
    ).json()
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=1)
    assert answer.usage.prompt_tokens == rendered["count"]
