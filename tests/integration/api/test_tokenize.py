"""/tokenize and /detokenize over a real socket: what a request will be in tokens, and back."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.over_http import assert_error
from tests.support.servers.fake_engine import MAX_MODEL_LEN, make_tokenizer
from tests.support.servers.server_process import FAKE, running
from tests.support.servers.server_process import FAKE_MODEL as MODEL

START, END = make_tokenizer().token_to_id("<|im_start|>"), make_tokenizer().token_to_id("<|im_end|>")
CHAT = [{"role": "user", "content": "hi"}]


def tokenize(server, **fields) -> httpx.Response:
    return httpx.post(f"{server.url}/tokenize", json=fields, timeout=300)


def detokenize(server, **fields) -> httpx.Response:
    return httpx.post(f"{server.url}/detokenize", json=fields, timeout=30)


@pytest.mark.parametrize("text", ["hé", "", "<|im_end|>", "x" * 5000])
def test_tokens_become_the_prompt_again(fake_server, text):
    answer = tokenize(fake_server, model=MODEL, prompt=text).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == MAX_MODEL_LEN
    assert answer["token_strs"] is None
    assert detokenize(fake_server, model=MODEL, tokens=answer["tokens"]).json() == {"prompt": text}


def test_tokens_are_spelled_when_asked(fake_server):
    answer = tokenize(fake_server, prompt="a <|end|>", return_token_strs=True).json()
    assert answer["token_strs"] == ["a", "Ġ", "<|end|>"]


def test_a_chat_counts_what_the_chat_route_counts(fake_server):
    counted = tokenize(fake_server, messages=CHAT).json()["count"]
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 1}
    answer = httpx.post(f"{fake_server.url}/v1/chat/completions", json=body, timeout=30).json()
    assert counted == answer["usage"]["prompt_tokens"]


def test_a_chat_may_end_before_the_answer_or_within_it(fake_server):
    question = [START, *b"user\nhi", END, *b"\n"]
    header = [START, *b"assistant\n"]
    assert tokenize(fake_server, messages=CHAT).json()["tokens"] == question + header
    assert tokenize(fake_server, messages=CHAT, add_generation_prompt=False).json()["tokens"] == question
    begun = [*CHAT, {"role": "assistant", "content": "I am "}]
    answer = tokenize(fake_server, messages=begun, continue_final_message=True).json()
    assert answer["tokens"] == [*question, *header, *b"I am "]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "messages": CHAT}, "messages"),
        ({"prompt": "a", "mood": "good"}, "mood"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "hi"}], "mood": "good"}, "mood"),
        ({"messages": CHAT, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_name(fake_server, fields, param):
    assert_error(tokenize(fake_server, **fields), 400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "tokens"),
        ({"tokens": [1, 259]}, "tokens"),
        ({"tokens": [-1]}, "tokens[0]"),
        ({"tokens": [10**30]}, "tokens[0]"),
        ({"tokens": [2**31 - 1]}, "tokens"),
        ({"tokens": [True]}, "tokens[0]"),
        ({"tokens": [], "mood": "good"}, "mood"),
    ],
)
def test_what_is_no_token_is_refused(fake_server, fields, param):
    assert_error(detokenize(fake_server, **fields), 400, param)


def test_another_model_does_not_exist(fake_server):
    assert_error(tokenize(fake_server, model="gpt-9", prompt="a"), 404, "model", "model_not_found")
    assert_error(detokenize(fake_server, model="gpt-9", tokens=[1]), 404, "model", "model_not_found")


def test_bytes_that_are_no_text_do_not_hurt(fake_server):
    assert detokenize(fake_server, tokens=[0xC3]).json() == {"prompt": "\ufffd"}


def test_chats_do_not_wait_for_the_long_texts_of_others(fake_model):
    """Many are answered in the time that a few texts take."""
    num_texts, text = 4, "a b" * 200_000
    chat = {"model": MODEL, "messages": CHAT, "max_tokens": 1}
    with (
        running(FAKE, "--model", fake_model) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(num_texts) as threads,
    ):
        texts = [threads.submit(tokenize, server, prompt=text) for _ in range(num_texts)]
        num_chats = 0
        while not all(answer.done() for answer in texts):
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
            num_chats += 1
        assert [answer.result().status_code for answer in texts] == [200] * num_texts
    assert num_chats > 5 * num_texts


@pytest.mark.slow
def test_what_waits_to_be_tokenized_is_bounded(fake_model):
    """Of all those without a key together; the others are answered."""
    num_texts, text = 40, "<|im_end|>" * 180_000  # of few tokens for its size: waiting is counted in characters
    with running(FAKE, "--model", fake_model) as server, ThreadPoolExecutor(num_texts) as threads:
        answers = list(threads.map(lambda _: tokenize(server, prompt=text), range(num_texts)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in refused:
        assert_error(answer, 429, code="queue_full")
        assert answer.headers["retry-after"] == "1"
