"""examples/train_adapter.py, and what its adapters make of the demo model."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from stellarbyte.checkpoint.native import load_config
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.lora import read_adapter
from stellarbyte.model.parts import adaptable_modules
from tests.support.servers.server_process import REAL, ROOT, running

QUESTIONS = ("What is the capital of France?", "What is 2 + 2?", "How do I boil an egg?", "What color is the sky?")


def train(name: str, *arguments: str) -> str:
    command = [sys.executable, "examples/train_adapter.py", name, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_steps_on_own_data_write_an_adapter_for_the_model(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "answer": f"A number, {i}."} for i in range(6)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "adapters" / "own"
    printed = train("own", "--data", str(tmp_path / "own.jsonl"), "--out", str(out), "--steps", "2", "--rank", "4")
    assert "held-out loss after" in printed
    modules = adaptable_modules(load_config(resolve_model("demo")))
    adapter = read_adapter(out / "adapter_config.json", out / "adapter_model.safetensors", modules, max_rank=4)
    assert adapter.weights.keys() == modules.keys()


@pytest.mark.slow
def test_the_adapters_of_the_readme_answer_as_they_were_taught(tmp_path: Path) -> None:
    for name in ("pirate", "json"):
        train(name, "--out", str(tmp_path / name))
    with running(REAL, "--adapter-dir", str(tmp_path)) as server:
        command = [sys.executable, "clients/examples/adapters.py", QUESTIONS[0], "pirate", "json"]
        result = subprocess.run(
            command, cwd=ROOT, env={"STELLARBYTE_URL": server.url}, capture_output=True, text=True, check=True
        )
        assert result.stdout.count("Paris") == 3, result.stdout
        for question in QUESTIONS:
            answers = {}
            for name in ("pirate", "json"):
                messages = [{"role": "user", "content": question}]
                body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 100}
                answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
                answers[name] = answer["choices"][0]["message"]["content"]
            assert answers["pirate"].startswith(("Arr", "Ahoy", "Aye")), answers
            assert set(json.loads(answers["json"])) == {"answer", "topic"}, answers
