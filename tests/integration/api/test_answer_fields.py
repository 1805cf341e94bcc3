"""Fields of answers beside their text: what ended them, and the ids of their tokens."""

import json

import httpx

from tests.support.clients.openai_client import QUESTION


def ask(server, path: str, **fields) -> httpx.Response:
    fields = {"model": "fake", "max_tokens": 20} | fields
    fields |= {"messages": QUESTION} if path == "chat/completions" else {"prompt": "one two three"}
    answer = httpx.post(f"{server.url}/v1/{path}", json=fields, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer


def chunks(answer: httpx.Response) -> list[dict]:
    return [json.loads(event[6:]) for event in answer.text.split("\n\n") if event.startswith("data: {")]


def test_an_answer_tells_which_stop_string_ended_it(fake_server) -> None:
    for path in ("completions", "chat/completions"):
        for fields, ended_by in (({"stop": ["zzz", "t", "nt"]}, "t"), ({"stop": "zzz"}, None)):
            if path == "completions":
                ended_by = None if ended_by is None else "t"
            (choice,) = ask(fake_server, path, **fields).json()["choices"]
            assert (choice["stop_reason"] is None) == (ended_by is None)
            last = chunks(ask(fake_server, path, **fields, stream=True))[-1]["choices"][0]
            assert last["stop_reason"] == choice["stop_reason"] and last["finish_reason"] == choice["finish_reason"]
            assert choice["stop_reason"] in (None, "t", "nt")


def test_the_first_chunk_of_a_chat_has_the_ids_of_its_prompt(fake_server) -> None:
    whole = ask(fake_server, "chat/completions", return_token_ids=True).json()
    first, *others = chunks(ask(fake_server, "chat/completions", return_token_ids=True, stream=True))
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["prompt_token_ids"] == whole["prompt_token_ids"] != []
    assert not any("prompt_token_ids" in chunk for chunk in others)


def test_logprobs_of_0_show_the_chosen_tokens(demo_server) -> None:
    body = {"model": "smollm2-135m-instruct", "prompt": "The sky is", "max_tokens": 4, "temperature": 0, "logprobs": 0}
    (model,) = [card["id"] for card in httpx.get(f"{demo_server.url}/v1/models").json()["data"]]
    answer = httpx.post(f"{demo_server.url}/v1/completions", json=body | {"model": model}, timeout=60)
    found = answer.json()["choices"][0]["logprobs"]
    chosen = [{token: logprob} for token, logprob in zip(found["tokens"], found["token_logprobs"], strict=True)]
    assert len(chosen) == 4 and found["top_logprobs"] == chosen


def test_a_prediction_without_effect_is_named(fake_server) -> None:
    """The engine without a model verifies no guesses."""
    for content in ("one two", [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]):
        predicted = {"prediction": {"type": "content", "content": content}}
        answer = ask(fake_server, "chat/completions", **predicted)
        assert answer.headers["x-ignored-fields"] == "prediction"
        assert "completion_tokens_details" not in answer.json()["usage"]
    assert "x-ignored-fields" not in ask(fake_server, "chat/completions", speculative=False).headers
    for wrong in ("one", {"type": "content"}, {"type": "text", "content": "a"}, {"type": "content", "content": None}):
        body = {"model": "fake", "messages": QUESTION, "prediction": wrong}
        refusal = httpx.post(f"{fake_server.url}/v1/chat/completions", json=body, timeout=30)
        assert refusal.status_code == 400 and refusal.json()["error"]["param"].startswith("prediction")


def test_a_prediction_is_counted_in_the_usage(demo_server) -> None:
    (model,) = [card["id"] for card in httpx.get(f"{demo_server.url}/v1/models").json()["data"]]
    body = {"model": model, "messages": QUESTION, "max_tokens": 12, "temperature": 0}

    def chat(**fields) -> dict:
        answer = httpx.post(f"{demo_server.url}/v1/chat/completions", json=body | fields, timeout=60)
        assert answer.status_code == 200 and "x-ignored-fields" not in answer.headers, answer.text
        return answer.json()

    whole = chat(speculative=False)
    text = whole["choices"][0]["message"]["content"]
    predicted = chat(prediction={"type": "content", "content": text + " and more"})
    assert predicted["choices"][0]["message"] == whole["choices"][0]["message"]
    num_tokens, details = predicted["usage"]["completion_tokens"], predicted["usage"]["completion_tokens_details"]
    assert num_tokens - 2 <= details["accepted_prediction_tokens"] <= num_tokens, "all but the end"
    assert details["rejected_prediction_tokens"] >= 1
