"""The official openai client against the demo model: /v1/completions with all its fields, whole and streamed."""

import math

import pytest

from tests.support.clients.openai_client import PROMPT, complete, post, strict_client, token_ids


@pytest.fixture(scope="module")
def client(demo_server):
    with strict_client(demo_server.url) as client:
        yield client


def text_of(client, prompt=PROMPT, **fields) -> str:
    return complete(client, prompt, **fields).choices[0].text


def test_the_four_forms_of_a_prompt_say_the_same(client) -> None:
    texts = [PROMPT, "Once upon a time"]
    alone = [text_of(client, text) for text in texts]
    ids = [token_ids(client, text) for text in texts]
    assert text_of(client, ids[0]) == alone[0]
    for prompts in (texts, ids):
        choices = complete(client, prompts).choices
        assert [(choice.index, choice.text) for choice in choices] == list(enumerate(alone))


def test_choices_differ_and_a_seed_repeats_them(client) -> None:
    ask = {"n": 3, "temperature": 1, "max_tokens": 12}
    first, second = ([choice.text for choice in complete(client, seed=7, **ask).choices] for _ in range(2))
    assert first == second
    assert len(set(first)) == 3
    assert {choice.text for choice in complete(client, **ask).choices} != set(first)


def test_the_same_prompt_several_times_without_a_seed_gets_several_answers(client) -> None:
    """All prompts of a request had one seed, so that equal ones got equal answers."""
    answer = complete(client, prompt=[PROMPT] * 4, temperature=1.5, max_tokens=12)
    assert len({choice.text for choice in answer.choices}) > 1


def test_best_of_shows_the_likeliest_of_its_candidates(client) -> None:
    ask = {"temperature": 1, "seed": 3, "logprobs": 0}

    def likelihood(choice):
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    candidates = sorted(complete(client, n=3, **ask).choices, key=likelihood, reverse=True)
    best = complete(client, n=2, best_of=3, **ask)
    assert [choice.text for choice in best.choices] == [choice.text for choice in candidates[:2]]
    assert best.usage.completion_tokens > sum(len(choice.logprobs.tokens) for choice in best.choices)


def test_echo_puts_the_prompt_and_its_logprobs_first(client) -> None:
    (choice,) = complete(client, echo=True, logprobs=2).choices
    assert choice.text == PROMPT + text_of(client)
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None and max(logprobs.token_logprobs[1:]) <= 0
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text.startswith(token, offset)
    (scored,) = complete(client, echo=True, logprobs=2, max_tokens=0).choices
    assert scored.text == PROMPT
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(logprobs.token_logprobs[1 : len(scored.logprobs.tokens)])


def test_logprobs_show_that_greedy_takes_the_likeliest_token(client) -> None:
    logprobs = complete(client, logprobs=3).choices[0].logprobs
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())
        assert sum(map(math.exp, top.values())) <= 1.0001


@pytest.mark.parametrize(
    "penalty",
    [{"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repetition_penalty": 1.5}}],
    ids=lambda penalty: min(penalty),
)
def test_a_penalty_makes_an_answer_repeat_itself_less(client, penalty) -> None:
    def num_different(**fields):
        return len(
            set(
                complete(client, "Shopping list: eggs, eggs, eggs,", max_tokens=12, logprobs=0, **fields)
                .choices[0]
                .logprobs.tokens
            )
        )

    assert num_different(**penalty) > num_different()


def test_logit_bias_forces_and_forbids_tokens(client) -> None:
    (paris,) = token_ids(client, " Paris")
    assert text_of(client, max_tokens=3, logit_bias={str(paris): 100}) == " Paris" * 3
    likeliest = complete(client, logprobs=0).choices[0].logprobs.tokens[0]
    (banned,) = token_ids(client, likeliest)
    assert not text_of(client, logit_bias={str(banned): -100}).startswith(likeliest)


def test_an_answer_has_min_tokens_however_much_it_wants_to_end(client, tokenizer) -> None:
    wants_to_end = {str(tokenizer.eos_token_id): 100}
    ended = complete(client, logit_bias=wants_to_end)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
    longer = complete(client, logit_bias=wants_to_end, extra_body={"min_tokens": 4})
    assert longer.usage.completion_tokens == 5  # and the end itself
    assert longer.choices[0].text == text_of(client, max_tokens=4)


def test_special_tokens_are_shown_only_on_request(client, tokenizer) -> None:
    ask = {"max_tokens": 2, "logit_bias": {str(tokenizer.eos_token_id): 100}}
    assert text_of(client, **ask, extra_body={"ignore_eos": True}) == ""
    shown = text_of(client, **ask, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert shown == tokenizer.eos_token * 2


def test_token_ids_are_those_of_the_texts(client) -> None:
    choice = complete(client, extra_body={"return_token_ids": True}).choices[0]
    assert choice.prompt_token_ids == token_ids(client, PROMPT)
    assert len(choice.token_ids) == 8
    assert post(client, "/detokenize", tokens=choice.token_ids)["prompt"] == choice.text


def test_a_stop_token_or_string_ends_an_answer(client) -> None:
    whole = complete(client, extra_body={"return_token_ids": True}).choices[0]
    before = post(client, "/detokenize", tokens=whole.token_ids[:3])["prompt"]
    stopped = complete(client, extra_body={"stop_token_ids": [whole.token_ids[3]]}).choices[0]
    assert (stopped.text, stopped.finish_reason) == (before, "stop")
    stop = post(client, "/detokenize", tokens=whole.token_ids[3:5])["prompt"]
    stopped = complete(client, stop=["never said", stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (before, "stop")
    assert text_of(client, stop=stop, extra_body={"include_stop_str_in_output": True}) == before + stop


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "temperature": 1, "seed": 5},
        {"prompt": ["Water is", "Fire is"]},
        {"echo": True, "logprobs": 2},
        {"stop": " the"},
        {"extra_body": {"return_token_ids": True}},
    ],
    ids=str,
)
def test_a_streamed_completion_says_what_the_whole_one_says(client, fields) -> None:
    whole = complete(client, **fields)
    chunks = list(complete(client, **fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts][-1] == choice.finish_reason
        assert (choice.logprobs is not None) == ("logprobs" in fields)
        assert hasattr(choice, "token_ids") == ("extra_body" in fields)
        if choice.logprobs is not None:
            streamed = [token for part in parts if part.logprobs for token in part.logprobs.tokens]
            assert streamed == choice.logprobs.tokens
        if hasattr(choice, "token_ids"):
            assert [token for part in parts for token in getattr(part, "token_ids", [])] == choice.token_ids
