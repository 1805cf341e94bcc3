"""The official openai client against the demo model: completions and chat, whole and streamed, models, errors."""

import openai
import pytest

from tests.integration.conftest import MODEL_NAME

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(demo_server):
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="unused", timeout=60, max_retries=0) as client:
        yield client


def test_a_chat_knows_the_capital_of_france(client):
    answer = client.chat.completions.create(model=MODEL_NAME, messages=QUESTION, temperature=0, max_tokens=32)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_is_the_same_text(client):
    ask = {"model": MODEL_NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    same = {"prompt_tokens", "completion_tokens", "total_tokens"}  # and the prompt is in the cache by now
    assert chunks[-1].usage.model_dump(include=same) == whole.usage.model_dump(include=same)


def test_a_completion_whole_and_streamed(client):
    ask = {"model": MODEL_NAME, "prompt": "The sky is", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**ask)
    streamed = client.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    assert whole.usage.completion_tokens <= 12


def test_a_seed_repeats_an_answer(client):
    ask = {"model": MODEL_NAME, "prompt": "Once upon a time", "temperature": 1, "max_tokens": 12}
    first, second = (client.completions.create(**ask, seed=7).choices[0].text for _ in range(2))
    assert first == second
    others = {client.completions.create(**ask).choices[0].text for _ in range(3)}
    assert others != {first}


def test_a_stop_string_is_not_in_the_answer(client):
    ask = {"model": MODEL_NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 32}
    answer = client.chat.completions.create(**ask, stop="Paris").choices[0]
    assert (answer.finish_reason, "Paris" in answer.message.content) == ("stop", False)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model=MODEL_NAME, messages=QUESTION, n=2)
    assert unsupported.value.param == "n"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL_NAME, prompt="word " * 10_000)
    assert too_long.value.code == "context_length_exceeded"
