"""A training process without a model, which speaks as `stellarbyte.train.job` does: python -m … FOLDER

FOLDER/script.json decides what happens: {"steps": 6, "pause_s": 0.01, "die_at": [steps], "refuse": [about, message]}.
Each start adds a line to FOLDER/starts, and tells the steps before it again. A process dies at a step of `die_at` once.
Every second step is saved. What stdin has after the settings is added to FOLDER/heard.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

folder = Path(sys.argv[1])
settings = json.loads(sys.stdin.buffer.readline())
script = {"steps": 6, "pause_s": 0.01, "die_at": [], "refuse": None, **json.loads((folder / "script.json").read_text())}
run = Path(settings["folder"]) / "run"
run.mkdir(exist_ok=True)
(folder / "settings.json").write_text(json.dumps(settings))
asked: list[int] = []


def send(kind: str, **content: object) -> None:
    print(json.dumps({"type": kind, **content}), flush=True)  # noqa: T201


def tell(step: int) -> None:
    send("step", step=step, train_loss=10.0 - step, learning_rate=0.5, tokens=step * 100)
    if settings["validation"] is not None:
        send("evaluation", step=step, valid_loss=9.0 - step)


def follow_stdin() -> None:
    while heard := os.read(0, 100):
        with (folder / "heard").open("ab") as file:
            file.write(heard)
    os._exit(1)


def save(step: int) -> None:
    (run / "step").write_text(str(step))


def dies_at(step: int) -> bool:
    mark = folder / f"died-{step}-{script['die_at'].count(step)}"
    if step not in script["die_at"] or mark.exists():
        return False
    mark.touch()
    return True


signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
threading.Thread(target=follow_stdin, daemon=True).start()
start = int((run / "step").read_text()) if (run / "step").exists() else 0
with (folder / "starts").open("a") as file:
    file.write(f"{start} {os.getpid()}\n")
if script["refuse"] is not None:
    send("refused", about=script["refuse"][0], message=script["refuse"][1])
    sys.exit()
send("plan", steps=script["steps"])
if settings["validation"] is not None:
    send("evaluation", step=0, valid_loss=9.0)
for step in range(1, start + 1):
    tell(step)
send("begun", step=start)
for step in range(start + 1, script["steps"] + 1):
    time.sleep(script["pause_s"])
    if dies_at(step):
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 3:
        (Path(settings["folder"]) / "step-3").mkdir(exist_ok=True)
        send("epoch", step=3)
    tell(step)
    if step % 2 == 0 or asked:
        save(step)
    if asked:
        send("stopped", step=step)
        sys.exit()
if settings["evaluate"] or settings["previous"]:
    figures = {"eval_exact_match": 0.75, "base_exact_match": 0.25} if settings["evaluate"] else {}
    if settings["previous"]:
        figures["previous_loss"] = float((Path(settings["previous"]) / "adapter_model.safetensors").read_text())
    send("warning", message="Mind this.")
    send("compared", figures=figures)
adapter = Path(settings["folder"]) / "adapter"
adapter.mkdir()
for name in ("adapter_config.json", "adapter_model.safetensors"):
    (adapter / name).write_text(name)
send("finished", step=script["steps"])
