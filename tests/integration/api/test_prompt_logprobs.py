"""Log-probabilities of prompts and answers over HTTP against transformers' LlamaForCausalLM on the same weights."""

import itertools
import math

import httpx
import pytest
import torch

from tests.support.models.references import MODEL_NAME, PROMPTS, transformers_model

LONG = " ".join(PROMPTS) * 2  # several chunks of a prompt that is scored
UNICODE = "Ein naïver Café-Besuch 漢字 👋🏽 – fin.\n\tEnde"

TOLERANCE = 5e-4  # of log-probabilities; an x86 matrix unit leaves out 2^-16 of a product


@pytest.fixture(scope="module")
def llama():
    return transformers_model()


def ask(server, **fields) -> dict:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": MODEL_NAME} | fields, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


@torch.inference_mode()
def reference(llama, token_ids: list[int]) -> torch.Tensor:
    """[T, V] log-probabilities of what follows each token."""
    return llama(torch.tensor([token_ids])).logits[0].double().log_softmax(dim=-1)


@pytest.mark.parametrize("text", [*PROMPTS[:4], UNICODE, LONG])
def test_a_scored_text_has_transformers_logprobs_and_perplexity(demo_server, tokenizer, llama, text) -> None:
    token_ids = tokenizer(text)["input_ids"]
    choice = ask(demo_server, prompt=text, max_tokens=0, echo=True, logprobs=3)["choices"][0]
    found = choice["logprobs"]
    expected = reference(llama, token_ids)
    chosen = [expected[i, token].item() for i, token in enumerate(token_ids[1:])]
    assert choice["text"] == text and found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(chosen, abs=TOLERANCE)
    perplexity = math.exp(-sum(found["token_logprobs"][1:]) / len(chosen))
    assert perplexity == pytest.approx(math.exp(-sum(chosen) / len(chosen)), rel=TOLERANCE)
    for i, top in enumerate(found["top_logprobs"][1:]):
        assert max(top.values()) == pytest.approx(expected[i].max().item(), abs=TOLERANCE)
    starts = [*found["text_offset"], len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(starts)]
    assert all(piece in ("", token) for piece, token in zip(pieces, found["tokens"], strict=True) if "\\x" not in token)
    assert "".join(pieces) == text


def test_an_answers_logprobs_equal_transformers_and_those_of_the_same_text_echoed(demo_server, llama) -> None:
    fields = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0.8, "seed": 1, "logprobs": 0}
    plain = ask(demo_server, **fields, return_token_ids=True)["choices"][0]
    token_ids = plain["prompt_token_ids"] + plain["token_ids"]
    expected = reference(llama, token_ids)
    first = len(plain["prompt_token_ids"])
    chosen = [expected[i - 1, token_ids[i]].item() for i in range(first, len(token_ids))]
    assert plain["logprobs"]["token_logprobs"] == pytest.approx(chosen, abs=TOLERANCE)
    echoed = ask(demo_server, **fields, echo=True)["choices"][0]
    assert echoed["text"] == PROMPTS[0] + plain["text"]
    assert echoed["logprobs"]["token_logprobs"][first:] == pytest.approx(chosen, abs=TOLERANCE)


@pytest.mark.parametrize("num_top", [0, 3, 20])
def test_prompt_logprobs_have_transformers_values_and_ranks(demo_server, tokenizer, llama, num_top) -> None:
    choice = ask(demo_server, prompt=UNICODE, max_tokens=0, prompt_logprobs=num_top)["choices"][0]
    assert choice["text"] == "" and choice["logprobs"] is None
    check_prompt_logprobs(choice["prompt_logprobs"], tokenizer(UNICODE)["input_ids"], num_top, tokenizer, llama)


def test_a_chat_has_them_once_beside_its_choices(demo_server, tokenizer, llama) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "n": 2, "prompt_logprobs": 1}
    answer = httpx.post(
        f"{demo_server.url}/v1/chat/completions",
        json={"model": MODEL_NAME, "return_token_ids": True} | body,
        timeout=120,
    ).json()
    assert not any("prompt_logprobs" in choice for choice in answer["choices"])
    check_prompt_logprobs(answer["prompt_logprobs"], answer["prompt_token_ids"], 1, tokenizer, llama)


def check_prompt_logprobs(found: list, token_ids: list[int], num_top: int, tokenizer, llama) -> None:
    expected = reference(llama, token_ids)
    assert found[0] is None and len(found) == len(token_ids)
    for i, (entries, token_id) in enumerate(zip(found[1:], token_ids[1:], strict=True)):
        likeliest = expected[i].topk(num_top).indices.tolist()
        assert next(iter(entries)) == str(token_id) and {int(name) for name in entries} == {token_id, *likeliest}
        for name, entry in entries.items():
            value = expected[i, int(name)]
            assert entry["logprob"] == pytest.approx(value.item(), abs=TOLERANCE)
            # Of values closer than the tolerance either may be the likelier one.
            assert (expected[i] > value + TOLERANCE).sum() < entry["rank"]
            assert entry["rank"] <= (expected[i] > value - TOLERANCE).sum() + 1
        assert "\ufffd" in entries[str(token_id)]["decoded_token"] or entries[str(token_id)]["decoded_token"] == (
            tokenizer.decode([token_id])
        )


def test_an_echo_shows_the_alternatives_of_its_own_field(demo_server, tokenizer) -> None:
    fields = {"prompt": PROMPTS[0], "max_tokens": 1, "echo": True, "temperature": 0}
    plain = ask(demo_server, **fields, logprobs=2)["choices"][0]["logprobs"]
    for more in (0, 7):
        choice = ask(demo_server, **fields, logprobs=2, prompt_logprobs=more)["choices"][0]
        assert choice["logprobs"] == plain
        own = {str(token_id) for token_id in tokenizer(PROMPTS[0])["input_ids"]}
        assert all(more <= len(entries) <= more + 1 for entries in choice["prompt_logprobs"][1:])
        assert {next(iter(entries)) for entries in choice["prompt_logprobs"][1:]} <= own


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": ["a " * 4000] * 16, "max_tokens": 1, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_its_field(demo_server, fields, param) -> None:
    body = {"model": MODEL_NAME, "prompt": "a"} | fields
    answer = httpx.post(f"{demo_server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_an_embedding_is_transformers_last_hidden_state(demo_server, tokenizer, llama) -> None:
    body = {"model": MODEL_NAME, "input": [PROMPTS[0], LONG], "encoding_format": "float"}
    for pooling in ("last", "mean"):
        answer = httpx.post(f"{demo_server.url}/v1/embeddings", json=body | {"pooling": pooling}, timeout=120).json()
        for entry, text in zip(answer["data"], body["input"], strict=True):
            with torch.inference_mode():
                hidden_TC = llama.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
            pooled_C = hidden_TC[-1] if pooling == "last" else hidden_TC.mean(dim=0)
            assert entry["embedding"] == pytest.approx((pooled_C / pooled_C.norm()).tolist(), abs=TOLERANCE)
