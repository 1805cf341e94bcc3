"""The official openai client, strict about what it gets, and short ways to ask with it."""

from typing import Any

import httpx
import openai

from tests.support.models.references import MODEL_NAME

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "The sky is"


def strict_client(url: str) -> openai.OpenAI:
    """Raises when an answer is not of the type that the client promises."""
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="unused", timeout=60, max_retries=0, _strict_response_validation=True
    )


def lenient(client: openai.OpenAI) -> openai.OpenAI:
    """For what OpenAI answers itself but the client's types do not allow: base64 vectors, and completions without
    a finish_reason yet or with no log-probability for their first token.
    """
    return client.copy(_extra_kwargs={"_strict_response_validation": False})


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 8} | fields
    if fields.get("stream") or fields.get("echo"):
        client = lenient(client)
    return client.completions.create(model=MODEL_NAME, prompt=prompt, **fields)


def chat(client: openai.OpenAI, messages: Any = QUESTION, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 60} | fields
    return client.chat.completions.create(model=MODEL_NAME, messages=messages, **fields)


def post(client: openai.OpenAI, path: str, **body: Any) -> Any:
    """One of the routes that are outside /v1 and have no method in the client."""
    url = str(client.base_url).removesuffix("/v1/")
    return client.with_options(base_url=url).post(path, body=body, cast_to=httpx.Response).json()


def token_ids(client: openai.OpenAI, text: str) -> list[int]:
    return post(client, "/tokenize", prompt=text)["tokens"]
