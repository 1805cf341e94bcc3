"""The process of a job: its messages, exact continuation, and what it refuses. Oracle: the plain run and loss."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from stellarbyte.checkpoint.info import read_record, record_lines
from stellarbyte.checkpoint.native import load_config, load_model
from stellarbyte.lora import LoRAConfig, apply_lora_to_model, load_adapter, save_adapter
from stellarbyte.train.callbacks.report import Messages
from stellarbyte.train.job.__main__ import give_way
from stellarbyte.train.job.__main__ import run as run_job
from stellarbyte.train.job.settings import Job, learning_rate, micro_batch, needed_memory
from tests.support.training.byte_tokenizer import ids_of
from tests.support.tuning.chat_model import make_chat_model
from tests.support.tuning.chats import chat, chats, json_lines

pytest.importorskip("accelerate")
VALIDATION = [chat("one?", "eins"), chat("two?", "zwei zwei")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("job") / "model")


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def settings(model: Path, folder: Path, content: bytes | None = None, **fields: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chats.jsonl").write_bytes(chats(10) if content is None else content)
    (folder / "validation.jsonl").write_bytes(json_lines(VALIDATION))
    return {
        "folder": str(folder),
        "model": str(model),
        "chats": str(folder / "chats.jsonl"),
        "validation": str(folder / "validation.jsonl"),
        "seed": 4,
        "epochs": 3,
        "batch": 4,
        "learning_rate_multiplier": 1.0,
        "rank": 4,
        "context": 128,
        "threads": 1,
        "memory": 1 << 40,
        **fields,
    }


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a job in this process."""
    file = io.BytesIO()
    run_job(Job(**job), Messages(file), threading.Event())
    return [json.loads(line) for line in file.getvalue().splitlines()]


def steps(messages: list[dict[str, Any]]) -> dict[int, tuple[float, float, int]]:
    return {
        each["step"]: (each["train_loss"], each["learning_rate"], each["tokens"])
        for each in messages
        if each["type"] == "step"
    }


def losses(messages: list[dict[str, Any]]) -> dict[int, float]:
    return {each["step"]: each["valid_loss"] for each in messages if each["type"] == "evaluation"}


def loss_of(model: Path, adapter: Path | None) -> float:
    """Nats per learned token of `VALIDATION`, in float64 from the logits of each chat by itself."""
    loaded = load_model(model, dtype=torch.float32)
    if adapter is not None:
        load_adapter(loaded, adapter)
    loaded.eval()
    total, count = 0.0, 0
    for each in VALIDATION:
        question, answer = (message["content"] for message in each["messages"])
        prompt = ids_of(f"<|im_start|>user\n{question}<|eos|>\n<|im_start|>assistant\n")
        ids = prompt + ids_of(f"{answer}<|eos|>")
        with torch.no_grad():
            log_probabilities = loaded(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place in range(len(prompt), len(ids)):
            total -= float(log_probabilities[place - 1, ids[place]])
            count += 1
    return total / count


def test_a_job_whose_process_was_killed_computes_what_one_without_pause_does(model: Path, tmp_path: Path) -> None:
    whole = run(settings(model, tmp_path / "whole"))
    plan = whole[0]
    assert plan["type"] == "plan" and plan["steps"] == 7 and whole[-1]["type"] == "finished"
    assert losses(whole)[0] == pytest.approx(loss_of(model, None), abs=1e-5)
    assert losses(whole)[7] == pytest.approx(loss_of(model, tmp_path / "whole" / "adapter"), abs=1e-5)
    assert losses(whole)[7] < losses(whole)[0]
    for step in (3, 5):  # the ends of the first two epochs of ten chats, four a step
        assert load_adapter(load_model(model, dtype=torch.float32), tmp_path / "whole" / f"step-{step}")
    record = read_record(tmp_path / "whole" / "adapter")
    assert record is not None and record.held_out["base_loss"] == losses(whole)[0]
    assert record.held_out["eval_loss"] == losses(whole)[7]
    assert "| base_loss |" in (tmp_path / "whole" / "adapter" / "README.md").read_text(encoding="utf-8")
    text = "<|im_start|>user\nq0?<|eos|>\n<|im_start|>assistant\naye aye 0<|eos|>\n"
    assert plan["tokens"] == 7 * 4 * len(ids_of(text)) == steps(whole)[7][2]

    parts = settings(model, tmp_path / "parts")
    command = [sys.executable, "-m", "tests.support.tuning.eager_trainer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(parts).encode() + b"\n")
        process.stdin.flush()
        while json.loads(process.stdout.readline()) != {"type": "saved", "step": 2}:
            pass
        process.send_signal(signal.SIGSTOP)  # so that it cannot end by itself
        process.kill()
    assert not (tmp_path / "parts" / "adapter").exists()
    again = run(parts)
    assert steps(again) == steps(whole) and losses(again) == losses(whole)
    ours, theirs = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert ours == theirs


def test_an_adapter_is_compared_with_the_one_before_and_with_the_base(model: Path, tmp_path: Path) -> None:
    before = tmp_path / "before"
    other = apply_lora_to_model(load_model(model, dtype=torch.float32), LoRAConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(other, before)
    plain = run(settings(model, tmp_path / "plain"))
    messages = run(settings(model, tmp_path / "job", previous=str(before), evaluate=["exact_match"]))
    (compared,) = (each["figures"] for each in messages if each["type"] == "compared")
    more = messages[0]["needed_memory"] - plain[0]["needed_memory"]
    assert more == 2 * (before / "adapter_model.safetensors").stat().st_size
    assert compared["previous_loss"] == pytest.approx(loss_of(model, before), abs=1e-5)
    assert {compared[f"{whose}_exact_match"] for whose in ("eval", "base", "previous")} == {0.0}
    record = read_record(tmp_path / "job" / "adapter")
    assert record is not None and record.held_out.items() >= compared.items()
    assert record.base_sha256 == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert dict(record_lines(record))["seed"] == "4"
    # the comparison leaves the adapter as it was
    assert losses(messages) == losses(plain)
    ours, theirs = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("job", "plain")
    )
    assert ours == theirs
    assert not [each for each in plain if each["type"] == "compared"]

    (before / "adapter_config.json").write_text("{}")
    messages = run(settings(model, tmp_path / "again", previous=str(before)))
    (warning,) = (each["message"] for each in messages if each["type"] == "warning")
    assert warning.startswith("The version before cannot be evaluated: ") and messages[-1]["type"] == "finished"
    assert str(tmp_path) not in warning


@pytest.mark.parametrize(
    ("fields", "about", "said"),
    [
        ({"memory": 1000}, "memory", "bytes of memory, and may use 1000"),
        ({"max_tokens": 500}, "data", "would read 990 tokens in all epochs; at most 500"),
        ({"context": 20}, "data", "training_file, line 1: no answer token is left of 20."),
        (
            {"content": chats(2) + b'\n{"messages": [{"role": "tool", "content": "x"}]}\n'},
            "data",
            "training_file, line 4: has no message of the assistant.",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_step(
    model: Path, tmp_path: Path, fields: dict[str, Any], about: str, said: str
) -> None:
    *before, refused = run(settings(model, tmp_path, **fields))
    assert [each["type"] for each in before] == (["plan"] if about == "memory" else [])
    assert (refused["type"], refused["about"]) == ("refused", about) and said in refused["message"]
    assert str(tmp_path) not in refused["message"]
    assert not (tmp_path / "adapter").exists()


def test_a_plan_alone_is_that_of_the_job(model: Path, tmp_path: Path) -> None:
    (planned,) = run(settings(model, tmp_path / "plan", only_plan=True))
    assert planned == run(settings(model, tmp_path / "job"))[0]
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["chats.jsonl", "validation.jsonl"]


def test_a_full_disk_ends_a_process_and_the_next_one_continues(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, saved = settings(model, tmp_path / "full"), []

    def save(state: object, path: Path) -> None:
        saved.append(path)
        if len(saved) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        torch_save(state, path)

    torch_save = torch.save
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", save)
        *before, refused = run(job)
    assert (refused["type"], refused["about"]) == ("refused", "run") and "No space left on device" in refused["message"]
    assert str(tmp_path) not in refused["message"] and not (tmp_path / "full" / "adapter").exists()
    assert any(each["type"] == "saved" for each in before)
    again = run(job)
    assert again[-1]["type"] == "finished"
    whole = run(settings(model, tmp_path / "whole"))
    assert steps(again) == steps(whole) and losses(again) == losses(whole)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux only")
def test_a_training_takes_only_time_that_nobody_wants(model: Path, tmp_path: Path) -> None:
    """In a thread of its own, as Linux has policies for each thread."""

    def policy(**fields: Any) -> tuple[int, int]:
        def act() -> None:
            give_way(Job(**settings(model, tmp_path, **fields)))
            found.append((os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)))

        found: list[tuple[int, int]] = []
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        return found[0]

    assert policy() == (os.SCHED_IDLE, 19)
    assert policy(only_plan=True) == (os.SCHED_OTHER, 10)


def test_memory_is_counted_from_the_shapes(model: Path, tmp_path: Path) -> None:
    config = load_config(model)
    job = Job(**settings(model, tmp_path))
    planned = job.run(10, 50, config)
    weights = sum(parameter.numel() for parameter in load_model(model, dtype=torch.float32).parameters())
    trained = sum(4 * (sum(shape)) for shape in 2 * [(48, 48)] * 4 + 2 * [(48, 96)] * 2 + 2 * [(96, 48)])
    kept = 4 * 50 * 2 * (12 * 48 + 4 * 96)
    assert planned.train.micro_batch == 4
    assert needed_memory(planned, config) == 4 * weights + 16 * trained + 4 * kept
    assert learning_rate(config) == pytest.approx(5e-4 * (2000 / 48) ** 0.781)
    assert [micro_batch(12, longest) for longest in (100, 300, 600, 5000)] == [12, 6, 3, 1]
