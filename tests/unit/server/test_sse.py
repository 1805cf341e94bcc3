"""Chunks made by splicing are the JSON a client expects."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.sse import ChunkWriter

BASE = {"id": "x-1", "object": "chunk", "created": 5, "model": 'a "name"\n', "system_fingerprint": "fp"}


def content(event: bytes) -> dict:
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    assert event.count(b"\n") == 2 and b"\r" not in event
    return json.loads(event[6:])


@given(st.text(), st.booleans(), st.booleans())
def test_any_text_comes_out_as_it_went_in(text, is_chat, include_usage):
    chunk = content(ChunkWriter(BASE, is_chat=is_chat, include_usage=include_usage).text(text))
    place = {"delta": {"content": text}} if is_chat else {"text": text}
    choice = {"index": 0, **place, "logprobs": None, "finish_reason": None}
    assert chunk == BASE | {"choices": [choice]} | ({"usage": None} if include_usage else {})


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_other_chunks_share_the_form(is_chat):
    writer = ChunkWriter(BASE, is_chat=is_chat, include_usage=True)
    finish = content(writer.finish("length"))
    assert finish["choices"][0] | {"delta": 0, "text": 0} == {
        "index": 0,
        "delta": 0,
        "text": 0,
        "logprobs": None,
        "finish_reason": "length",
    }
    assert content(writer.usage({"total_tokens": 3})) == BASE | {"choices": [], "usage": {"total_tokens": 3}}
    assert content(writer.role())["choices"][0]["delta"] == {"role": "assistant", "content": ""}
