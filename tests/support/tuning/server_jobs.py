"""Fine-tuning jobs of a real server: its flags with keys, and what OpenAI's client asks of it."""

import time
from pathlib import Path
from typing import Any

import httpx
import openai
from openai.types.fine_tuning import FineTuningJob

from tests.support.clients.openai_client import strict_client
from tests.support.servers.server_process import ServerProcess
from tests.support.tuning.chat_model import make_chat_model

ENDED = ("succeeded", "failed", "cancelled")
KEYS = """
[ann]
key = "key-of-ann"
models = ["tiny"]
[bob]
key = "key-of-bob"
[cat]
key = "key-of-cat"
fine_tune = false
[dan]
key = "key-of-dan"
max_fine_tuning_jobs = 2
"""


def server_flags(folder: Path) -> list[str]:
    """Of a server with a tiny model, keys of `KEYS`, and the admin key key-of-admin; its data is in `folder`/data."""
    (folder / "keys.toml").write_text(KEYS)
    (folder / "keys.toml").chmod(0o600)
    model = ["--model", str(make_chat_model(folder / "model")), "--served-model-name", "tiny"]
    keys = ["--keys", str(folder / "keys.toml"), "--admin-api-key", "key-of-admin"]
    return [*model, "--data-dir", str(folder / "data"), "--fine-tuning", "cpu", *keys]


def client_of(server: ServerProcess, name: str) -> openai.OpenAI:
    return strict_client(server.url).with_options(api_key=f"key-of-{name}")


def upload(client: openai.OpenAI, content: bytes) -> str:
    return client.files.create(file=("chats.jsonl", content), purpose="fine-tune").id


def method(**hyperparameters: Any) -> Any:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def wait(client: openai.OpenAI, job_id: str, *statuses: str, limit_s: float = 400) -> FineTuningJob:
    deadline_s = time.monotonic() + limit_s
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in statuses:
        assert time.monotonic() < deadline_s and job.status not in ENDED, job
        time.sleep(0.1)
    return job


def answer(client: openai.OpenAI, model: str = "tiny", question: str = "q1?", **fields: Any) -> str | None:
    messages: Any = [{"role": "user", "content": question}]
    asked = client.chat.completions.create(model=model, messages=messages, max_tokens=24, **fields)
    return asked.choices[0].message.content


def post(server: ServerProcess, path: str, who: str, /, **body: Any) -> Any:
    """The status and the JSON of an answer."""
    headers = {"Authorization": f"Bearer key-of-{who}"}
    answered = httpx.post(f"{server.url}/v1/{path}", json=body, headers=headers, timeout=120)
    return answered.status_code, answered.json()
