"""examples/adapters, and what its adapters make of the demo model."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from stellarbyte.checkpoint.info import read_record
from stellarbyte.checkpoint.native import load_config
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.lora import read_adapter
from stellarbyte.model.parts import adaptable_modules
from tests.support.servers.server_process import REAL, ROOT, running

pytest.importorskip("accelerate")
QUESTIONS = ("What is the capital of France?", "What is 2 + 2?", "How do I boil an egg?", "What color is the sky?")
NAMES = ("pirate", "json")


def train(name: str, folder: Path, *overrides: str) -> Path:
    """The adapter of an example, trained into `folder`."""
    output = folder / "adapters" / name
    settings = [f"run.dir={folder / 'runs' / name}", f"run.output={output}", *overrides]
    command = [sys.executable, "-m", "stellarbyte.cli.main", "train", "lora", f"examples/adapters/{name}.yaml"]
    command += [part for setting in settings for part in ("--set", setting)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.parametrize("name", NAMES)
def test_an_example_writes_where_its_first_line_and_the_pages_say(name: str) -> None:
    file = ROOT / "examples" / "adapters" / f"{name}.yaml"
    assert f"scripts/train lora examples/adapters/{name}.yaml" in file.read_text(encoding="utf-8").splitlines()[0]
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["run"]["output"] == f"adapters/{name}"


@pytest.mark.slow
def test_two_steps_write_an_adapter_for_the_model(tmp_path: Path) -> None:
    rank, steps = "lora.r=4", ("train.epochs=0.11", "train.warmup=1")
    chats = tmp_path / "few.jsonl"
    lines = (ROOT / "examples/data/pirate.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    chats.write_text("".join(lines[:100]), encoding="utf-8")
    out = train(
        "pirate", tmp_path, rank, *steps, f"data.chats=[{chats}]", "train.batch_tokens=256", "train.micro_batch=1"
    )
    record = read_record(out)
    assert record is not None and record.steps == 2 and record.held_out["eval_loss"] > 0
    modules = adaptable_modules(load_config(resolve_model("demo")))
    adapter = read_adapter(out / "adapter_config.json", out / "adapter_model.safetensors", modules, max_rank=4)
    assert adapter.weights.keys() == modules.keys()


@pytest.mark.slow
def test_the_adapters_of_the_readme_answer_as_they_were_taught(tmp_path: Path) -> None:
    for name in NAMES:
        train(name, tmp_path)
    with running(REAL, "--adapter-dir", str(tmp_path / "adapters")) as server:
        command = [sys.executable, "clients/examples/adapters.py", QUESTIONS[0], *NAMES]
        result = subprocess.run(
            command, cwd=ROOT, env={"STELLARBYTE_URL": server.url}, capture_output=True, text=True, check=True
        )
        assert result.stdout.count("Paris") == 3, result.stdout
        for question in QUESTIONS:
            answers = {}
            for name in NAMES:
                messages = [{"role": "user", "content": question}]
                body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 100}
                answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
                answers[name] = answer["choices"][0]["message"]["content"]
            assert answers["pirate"].startswith(("Arr", "Ahoy", "Aye")), answers
            assert set(json.loads(answers["json"])) == {"answer", "topic"}, answers
