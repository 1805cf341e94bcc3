"""The official openai client against the demo model: chats, embeddings, models, tokens and errors.

Completions are in test_openai_completions_tour.py; JSON, tools and responses in test_openai_structured_tour.py.
"""

import asyncio
import math

import openai
import pytest

from tests.support.clients.openai_client import QUESTION, chat, complete, lenient, post, strict_client, token_ids
from tests.support.models.references import MODEL_NAME


@pytest.fixture(scope="module")
def client(demo_server):
    with strict_client(demo_server.url) as client:
        yield client


# Chats


def test_a_chat_knows_the_capital_of_france(client) -> None:
    answer = chat(client)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chats_prompt_is_what_tokenize_says(client) -> None:
    answer = chat(client, max_tokens=1, extra_body={"return_token_ids": True})
    assert post(client, "/tokenize", messages=QUESTION)["tokens"] == answer.prompt_token_ids
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    chunks = list(chat(client, max_tokens=1, stream=True, extra_body={"return_token_ids": True}))
    shown = [chunk.prompt_token_ids for chunk in chunks if hasattr(chunk, "prompt_token_ids")]
    assert shown == [answer.prompt_token_ids]


def test_a_chats_logprobs_are_its_bytes_token_by_token(client) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=4).choices
    content = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == choice.message.content
    for token in content:
        assert len(token.top_logprobs) == 4
        likeliest = max(token.top_logprobs, key=lambda top: top.logprob)
        assert (likeliest.token, likeliest.logprob) == (token.token, token.logprob)
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_a_chats_choices_differ_and_a_seed_repeats_them(client) -> None:
    ask = {"n": 2, "temperature": 1.5, "seed": 11, "max_tokens": 12}
    first, second = ([choice.message.content for choice in chat(client, **ask).choices] for _ in range(2))
    assert first == second
    assert len(set(first)) == 2


def test_an_answer_goes_on_from_the_assistants_own_words(client) -> None:
    prefill = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    answer = chat(client, prefill, max_tokens=3, extra_body={"continue_final_message": True})
    assert answer.choices[0].message.content.startswith(" Paris")


def test_chats_take_stop_bias_and_text_parts(client) -> None:
    stopped = chat(client, stop="Paris").choices[0]
    assert (stopped.finish_reason, "Paris" in stopped.message.content) == ("stop", False)
    kept = chat(client, stop="Paris", extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.message.content == stopped.message.content + "Paris"
    (yes,) = token_ids(client, " yes")
    assert chat(client, max_tokens=2, logit_bias={str(yes): 100}).choices[0].message.content == " yes yes"
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert chat(client, parts).choices[0].message.content == chat(client).choices[0].message.content


def test_a_chat_without_max_tokens_ends_by_itself(client) -> None:
    assert chat(client, max_tokens=openai.omit, max_completion_tokens=openai.omit).choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "temperature": 1, "seed": 5, "max_tokens": 12},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": "Paris"},
    ],
    ids=str,
)
def test_a_streamed_chat_says_what_the_whole_one_says(client, fields) -> None:
    whole = chat(client, **fields)
    chunks = list(chat(client, **fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert [part.delta.role for part in parts] == ["assistant", *[None] * (len(parts) - 1)]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert parts[-1].finish_reason == choice.finish_reason
        assert (choice.logprobs is not None) == ("logprobs" in fields)
        if choice.logprobs is not None:
            assert [
                token for part in parts if part.logprobs for token in part.logprobs.content
            ] == choice.logprobs.content


def test_the_clients_own_stream_reader_puts_a_chat_together(client) -> None:
    ask = {"model": MODEL_NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    with client.chat.completions.stream(**ask) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.content == said
    assert said == chat(client).choices[0].message.content


def test_eight_streams_at_once_are_the_answers_one_gets_alone(client) -> None:
    prompts = [f"{word} is" for word in ("Water", "Fire", "Wind", "Snow", "Gold", "Time", "Love", "Rain")]

    async def read(parallel, prompt) -> str:
        stream = await parallel.completions.create(
            model=MODEL_NAME, prompt=prompt, temperature=0, max_tokens=8, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def read_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="unused", max_retries=0) as parallel:
            return await asyncio.gather(*(read(parallel, prompt) for prompt in prompts))

    assert asyncio.run(read_all()) == [choice.text for choice in complete(client, prompts).choices]


# Embeddings, models, errors


def test_embeddings_are_the_same_as_numbers_and_as_base64(client) -> None:
    texts = ["The cat sleeps.", "A cat is asleep.", "Interest rates rose again."]
    numbers = client.embeddings.create(model=MODEL_NAME, input=texts, encoding_format="float")
    by_default = lenient(client).embeddings.create(
        model=MODEL_NAME, input=texts
    )  # base64, which the client turns into numbers
    assert [item.embedding for item in by_default.data] == [item.embedding for item in numbers.data]
    assert numbers.usage.prompt_tokens == sum(len(token_ids(client, text)) for text in texts)
    cat, asleep, rates = (item.embedding for item in numbers.data)
    assert math.hypot(*cat) == pytest.approx(1, abs=1e-4)
    assert math.dist(cat, asleep) < math.dist(cat, rates)


def test_an_embedding_has_the_models_dimensions_and_no_others(client) -> None:
    ask = {"model": MODEL_NAME, "input": token_ids(client, "A cat"), "encoding_format": "float"}
    (vector,) = client.embeddings.create(**ask, dimensions=576).data
    assert len(vector.embedding) == 576
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(**ask, dimensions=64)
    assert error.value.param == "dimensions"


def test_models_are_listed(client) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_text_comes_back_from_its_tokens(client) -> None:
    text = "Grüße, 世界 🙂"
    answer = post(client, "/tokenize", prompt=text)
    assert answer["count"] == len(answer["tokens"])
    assert post(client, "/detokenize", tokens=answer["tokens"]) == {"prompt": text}


def test_errors_are_the_clients_own(client) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        complete(client, "word " * 10_000)
    assert (too_long.value.code, too_long.value.type) == ("context_length_exceeded", "invalid_request_error")
    assert too_long.value.param == "prompt"
