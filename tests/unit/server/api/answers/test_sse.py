"""Chunks made by splicing are the JSON a client expects."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stellarbyte_server.api.answers.choices import Fragment
from stellarbyte_server.api.answers.sse import ChunkWriter

BASE = {"id": "x-1", "object": "chunk", "created": 5, "model": 'a "name"\n', "system_fingerprint": "fp"}


def content(event: bytes) -> dict:
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    assert event.count(b"\n") == 2 and b"\r" not in event
    return json.loads(event[6:])


@given(st.text(min_size=1), st.sampled_from(["chat", "completion"]), st.booleans())
def test_any_text_comes_out_as_it_went_in(text, kind, include_usage):
    writer = ChunkWriter(BASE, kind, 3, include_usage=include_usage)
    chunk = content(writer.fragment(2, Fragment(text=text)))
    place = {"delta": {"content": text}} if kind == "chat" else {"text": text}
    choice = {"index": 2, **place, "logprobs": None, "finish_reason": None}
    assert chunk == BASE | {"choices": [choice]} | ({"usage": None} if include_usage else {})


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_what_is_more_than_text_has_the_same_form(kind):
    writer = ChunkWriter(BASE, kind, 1, include_usage=False)
    assert writer.fragment(0, Fragment()) == b""
    logprobs, fields = {"content": []}, {"token_ids": [1], "prompt_token_ids": [2]}
    chunk = content(writer.fragment(0, Fragment(text="a", logprobs=logprobs, token_ids=[1], prompt_token_ids=[2])))
    if kind == "chat":  # which shows its prompt beside the choices, in the first chunk
        assert content(writer.role(0, prompt_token_ids=[2]))["prompt_token_ids"] == fields.pop("prompt_token_ids")
    place = {"delta": {"content": "a"}} if kind == "chat" else {"text": "a"}
    choice = {"index": 0, **place, "logprobs": logprobs, "finish_reason": None, **fields}
    assert chunk == BASE | {"choices": [choice]}


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_the_other_chunks_share_the_form(kind):
    writer = ChunkWriter(BASE, kind, 1, include_usage=True)
    finish = content(writer.fragment(0, Fragment(finish_reason="length")))
    assert finish["choices"][0] | {"delta": 0, "text": 0} == {
        "index": 0,
        "delta": 0,
        "text": 0,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    ended = content(
        writer.fragment(0, Fragment(finish_reason="stop", stop_reason="x", schema_violation="It is wrong."))
    )
    assert (ended["choices"][0]["stop_reason"], ended["choices"][0]["schema_violation"]) == ("x", "It is wrong.")
    assert content(writer.usage({"total_tokens": 3})) == BASE | {"choices": [], "usage": {"total_tokens": 3}}
    assert content(writer.role(0))["choices"][0]["delta"] == {"role": "assistant", "content": ""}
