"""Files of requests for batches, and waiting for a batch's end."""

import json
import time
from collections.abc import Iterable
from typing import Any

import openai
from openai.types import Batch

ENDED = ("completed", "failed", "expired", "cancelled")


def line(custom_id: str, body: object, url: str = "/v1/completions", **others: object) -> bytes:
    """One request of a batch."""
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | others).encode() + b"\n"


def completions(number: int, **fields: object) -> bytes:
    """Requests to the fake engine, which repeats prompts."""
    body = {"model": "fake", "max_tokens": 8} | fields
    return b"".join(line(f"r{i}", body | {"prompt": f"<{i:03}>"}) for i in range(number))


def upload(client: openai.OpenAI, content: bytes, name: str = "in.jsonl") -> str:
    return client.files.create(file=(name, content), purpose="batch").id


def start(client: openai.OpenAI, content: bytes, endpoint: Any = "/v1/completions", **fields: Any) -> Batch:
    file_id = upload(client, content)
    return client.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h", **fields)


def wait(client: openai.OpenAI, batch_id: str, statuses: Iterable[str] = ENDED, limit_s: float = 90) -> Batch:
    """The batch once it has one of these statuses."""
    deadline_s = time.monotonic() + limit_s
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in statuses:
            return batch
        assert time.monotonic() < deadline_s, batch
        time.sleep(0.05)


def results(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of a batch's output or error file, by custom_id; none without a file."""
    if file_id is None:
        return {}
    lines = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    found = {result["custom_id"]: result for result in lines}
    assert len(found) == len(lines), "a request was answered twice"
    return found
