"""The runner of fine-tuning jobs with scripted training processes: ends of all kinds, and a server that stops."""

import asyncio
import csv
import json
import os
import sys
import time
from pathlib import Path

import msgspec
import pytest

from stellarbyte_server.batch.files import NoRoom
from stellarbyte_server.tuning import jobs as jobs_module
from stellarbyte_server.tuning import runner as runner_module
from stellarbyte_server.tuning.jobs import Event, Hyperparameters, Status
from stellarbyte_server.tuning.runner import CannotLoad, EngineAway
from tests.support.tuning.chats import chats
from tests.support.tuning.place import Place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(runner_module, "LOOK_S", 0.01)
    monkeypatch.setattr(runner_module, "_RETRY_S", 0.01)
    return Place(tmp_path)


ALL_STEPS = [(step, 10.0 - step) for step in range(1, 7)]


def test_a_job_becomes_a_model_with_its_figures(place: Place) -> None:
    (job,) = place.run_to_end(place.job(validation=chats(2)))
    assert job.status == "succeeded" and job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith("ft:tiny-one:mine:") and len(job.fine_tuned_model.split(":")[3]) == 8
    assert job.hyperparameters == Hyperparameters(n_epochs=2, batch_size=8, learning_rate_multiplier=1.0)
    assert (job.losses["train"], job.losses["base_valid"], job.losses["valid"], job.tokens) == (4.0, 9.0, 3.0, 600)
    folder = place.store.of_job(job.id)
    assert place.loaded == {
        job.fine_tuned_model: str(folder / "adapter"),
        f"{job.fine_tuned_model}:ckpt-step-3": str(folder / "step-3"),
    }
    assert place.left(job.id) == ["adapter", "step-3"]
    assert place.steps(job.id) == ALL_STEPS
    assert place.messages(job.id)[:3] == [
        f"Created fine-tuning job: {job.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]
    (file,), _ = place.files.page("", limit=1, newest_first=True, after=None, purpose="fine-tune-results")
    assert (file.id,) == job.result_files
    rows = list(csv.DictReader(place.files.open(file).read().decode().splitlines()))
    assert [(row["step"], row["train_loss"], row["valid_loss"]) for row in rows] == [
        ("0", "", "9.0"),
        *[(str(step), str(loss), str(loss - 1)) for step, loss in ALL_STEPS],
    ]
    assert list((place.folder / "data" / "work").iterdir()) == []


def test_a_process_is_told_when_requests_begin_and_when_there_are_none(place: Place) -> None:
    place.script(pause_s=1000.0)
    heard = place.folder / "heard"
    place.job()

    async def act() -> None:
        await place.until(lambda: place.starts() != [])
        assert not heard.exists()
        for is_busy, lines in ((True, "busy\n"), (False, "busy\nidle\n"), (True, "busy\nidle\nbusy\n")):
            place.is_busy = is_busy
            await place.until(lambda lines=lines: heard.exists() and heard.read_text() == lines)

    place.run(act)


def test_a_process_gets_what_the_job_and_its_key_say(place: Place) -> None:
    (job,) = place.run_to_end(place.job())
    folder = place.store.of_job(job.id)
    assert json.loads((place.folder / "settings.json").read_text()) == {
        "folder": str(folder),
        "model": "/model",
        "chats": str(folder / "chats.jsonl"),
        "validation": None,
        "template": None,
        "seed": 1,
        "epochs": 2,
        "batch": 8,
        "learning_rate_multiplier": 1.0,
        "rank": 4,
        "context": 64,
        "device": "cpu",
        "threads": 1,
        "memory": None,
        "max_tokens": 5,
        "only_plan": False,
        "previous": None,
        "evaluate": [],
    }


def test_a_restarted_server_gets_the_models_again(place: Place) -> None:
    (job,) = place.run_to_end(place.job())
    first, place.loaded = place.loaded, {}
    place.run(lambda: place.until(lambda: len(place.loaded) == 2))
    assert place.loaded == first and place.find(job.id).status == "succeeded"


@pytest.mark.parametrize(("param", "line"), [("training_file", 3), ("validation_file", 2)])
def test_a_bad_line_ends_a_job_before_any_process_starts(place: Place, param: str, line: int) -> None:
    good, bad = chats(4), chats(line - 1) + b'{"messages": 1}\n{}\n'
    (job,) = place.run_to_end(place.job(bad, good) if param == "training_file" else place.job(good, bad))
    assert job.status == "failed" and job.error is not None
    assert (job.error.code, job.error.param) == (f"invalid_{param}", param)
    assert job.error.message.startswith(f"{getattr(job, param)}: Line {line}: the field 'messages' must be")
    assert job.error.message.endswith("(1 more line is wrong, too.)")
    assert any(message.startswith(f"Line {line + 1}: ") for message in place.messages(job.id))
    assert place.starts() == [] and place.left(job.id) == []


def test_a_file_that_was_deleted_ends_its_job(place: Place) -> None:
    job_id = place.job()
    place.files.remove(place.files.find("", place.find(job_id).training_file))  # type: ignore[arg-type]
    (job,) = place.run_to_end(job_id)
    assert job.error is not None and job.error.message.endswith("The file no longer exists.")


@pytest.mark.parametrize(
    ("refusal", "code", "param"),
    [
        (["data", "training_file, line 2: is cut."], "invalid_training_file", "training_file"),
        (["data", "validation_file, line 2: is cut."], "invalid_validation_file", "validation_file"),
        (["memory", "Too much."], "insufficient_memory", None),
        (["run", "checkpoint-4 could not be written (No space left on device)."], "training_failed", None),
    ],
)
def test_a_refusal_is_the_jobs_error_and_leaves_nothing(
    place: Place, refusal: list[str], code: str, param: str | None
) -> None:
    place.script(refuse=refusal)
    (job,) = place.run_to_end(place.job())
    assert job.error == jobs_module.JobError(code=code, message=refusal[1], param=param)
    assert place.left(job.id) == [] and len(place.starts()) == 1


def test_a_lost_process_continues_once(place: Place) -> None:
    place.script(die_at=[4])
    (job,) = place.run_to_end(place.job(validation=chats(2)))
    assert job.status == "succeeded" and [step for step, _ in place.starts()] == [0, 2]
    assert place.steps(job.id) == ALL_STEPS  # step 3 is told by both processes
    assert sum("unexpectedly (signal 9)" in message for message in place.messages(job.id)) == 1


def test_a_process_that_is_lost_again_ends_the_job(place: Place) -> None:
    place.script(die_at=[4, 5])
    (job,) = place.run_to_end(place.job())
    assert job.error is not None and job.error.code == "worker_lost" and "second time (signal 9)" in job.error.message
    assert place.left(job.id) == []


def test_jobs_run_one_after_the_other(place: Place) -> None:
    first, second = place.job(), place.job()
    seen: set[tuple[Status, Status]] = set()

    async def act() -> None:
        while not place.find(second).is_over:
            seen.add((place.find(first).status, place.find(second).status))
            await asyncio.sleep(0)

    place.run(act)
    assert ("running", "running") not in seen and ("running", "queued") in seen
    assert place.find(first).status == place.find(second).status == "succeeded"


def test_a_cancelled_job_leaves_its_record_only(place: Place) -> None:
    place.script(steps=1000)
    job_id, waiting = place.job(), place.job()

    async def act() -> None:
        await place.until(lambda: place.find(job_id).last_step > 3)
        place.set(job_id, "cancelled")
        place.set(waiting, "cancelled")
        await place.until(lambda: place.left(job_id) == place.left(waiting) == [])

    place.run(act)
    ((_, pid),) = place.starts()
    assert not Path(f"/proc/{pid}").exists()
    assert place.find(job_id).status == "cancelled" and place.loaded == {}
    assert place.messages(job_id)


def test_a_paused_job_saves_its_step_and_continues_behind_others(place: Place) -> None:
    place.script(steps=40, pause_s=0.02)
    job_id = place.job()

    async def pause() -> None:
        await place.until(lambda: place.find(job_id).last_step > 2)
        place.set(job_id, "paused")
        other = place.job()
        await place.until(lambda: place.find(other).is_over)
        place.set(job_id, "queued")
        await place.until(lambda: place.find(job_id).is_over)

    place.run(pause)
    assert place.find(job_id).status == "succeeded"
    (first, _), (other, _), (again, _) = place.starts()
    assert first == other == 0 and 2 < again < 40  # whatever the step was, it was saved
    assert place.steps(job_id) == [(step, 10.0 - step) for step in range(1, 41)]


@pytest.mark.parametrize("status", ["running", "paused"])
def test_a_stopped_server_saves_its_job(place: Place, status: Status) -> None:
    place.script(steps=30, pause_s=0.02)
    job_id = place.job()
    place.run(lambda: place.until(lambda: place.find(job_id).last_step > 2))
    assert place.find(job_id).status == "running"
    if status == "paused":
        place.set(job_id, "paused")

        async def wait() -> None:
            await asyncio.sleep(0.2)

        place.run(wait)
        assert len(place.starts()) == 1
        place.set(job_id, "queued")
    place.run_to_end(job_id)
    (_, pid), (again, _) = place.starts()
    assert not Path(f"/proc/{pid}").exists() and again > 2
    assert place.steps(job_id) == [(step, 10.0 - step) for step in range(1, 31)]


def test_a_process_ends_with_its_server(place: Place) -> None:
    """The server may be killed: then nothing but the closed pipe tells the process."""
    place.script(steps=10_000)
    (place.folder / "data" / "work").mkdir(exist_ok=True)
    read, write = os.pipe()
    settings = json.dumps({"folder": str(place.folder), "validation": None}).encode()
    command = [sys.executable, "-m", "tests.support.tuning.scripted_trainer", str(place.folder)]
    pid = os.posix_spawn(sys.executable, command, dict(os.environ), file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
    os.close(read)
    os.write(write, settings + b"\n")
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_an_adapter_that_is_complete_is_not_trained_again(place: Place) -> None:
    job_id = place.job()
    place.load_error = EngineAway()

    async def wait() -> None:
        await place.until(lambda: place.store.adapter(job_id).exists())
        await asyncio.sleep(0.2)

    place.run(wait)
    assert place.find(job_id).status == "running" and len(place.starts()) == 1
    place.load_error = None
    (job,) = place.run_to_end(job_id)
    assert job.status == "succeeded" and len(place.starts()) == 1


def test_an_adapter_that_the_engine_refuses_ends_its_job(place: Place) -> None:
    place.load_error = CannotLoad("It is bad.")
    (job,) = place.run_to_end(place.job())
    assert job.error is not None and job.error.message == "The adapter cannot be served: It is bad."
    assert job.fine_tuned_model is None


def test_what_was_loaded_for_a_job_without_a_model_is_unloaded(place: Place) -> None:
    """A checkpoint is refused after the model was loaded, and a job is cancelled after both were."""

    def refuse(name: str) -> None:
        if name.endswith(":ckpt-step-3"):
            raise CannotLoad("It is bad.")

    place.when_loaded = refuse
    (job,) = place.run_to_end(place.job())
    assert job.status == "failed" and job.fine_tuned_model is None and place.loaded == {}

    def cancel(name: str) -> None:
        if name.endswith(":ckpt-step-3"):
            place.set(cancelled, "cancelled")

    place.when_loaded = cancel
    cancelled = place.job()
    place.run(lambda: place.until(lambda: place.find(cancelled).is_over and place.loaded == {}))
    assert place.find(cancelled).status == "cancelled" and place.find(cancelled).fine_tuned_model is None


def test_a_job_whose_key_is_gone_ends(place: Place) -> None:
    (job,) = place.run_to_end(place.job(owner="gone"))
    assert job.error is not None and job.error.code == "invalid_api_key" and place.starts() == []


def test_keys_have_a_number_of_jobs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.job(owner="ann", most=1)
    with pytest.raises(NoRoom, match="limit of 1 unfinished"):
        place.job(owner="ann", most=1)
    monkeypatch.setattr(jobs_module, "MAX_UNFINISHED", 2)
    place.job(owner="bob", most=1)
    with pytest.raises(NoRoom, match="server's limit of 2"):
        place.job(owner="cat", most=1)


def test_the_speed_is_that_of_the_newest_job_of_a_model_that_has_succeeded(place: Place) -> None:
    jobs = place.store.jobs
    assert jobs.tokens_per_s("tiny") is None
    (job,) = place.run_to_end(place.job())
    first = next(each for _, each in jobs.events_since(job.id, None, -1) if each.data and "tokens" in each.data)
    for number, (tokens, after_s) in enumerate(((700, 30), (1100, 50)), 7):
        event = Event(message="", data={"step": number, "tokens": tokens}, created_at=first.created_at + after_s)
        jobs.note(job.id, event)
    assert jobs.tokens_per_s("tiny") == (1100 - 100) / 50
    assert jobs.tokens_per_s("other") is None
    place.script(refuse=["run", "No."])
    place.run_to_end(place.job())
    assert jobs.tokens_per_s("tiny") is not None  # the newest one has failed


def test_old_records_are_forgotten_and_models_are_not(place: Place) -> None:
    (kept,) = place.run_to_end(place.job())
    place.script(refuse=["run", "No."])
    (failed,) = place.run_to_end(place.job())
    long_ago = int(time.time()) - 31 * 86_400
    for job in (kept, failed):
        place.store.jobs.change(job.id, lambda now: msgspec.structs.replace(now, finished_at=long_ago))
    place.store.jobs.forget_old()
    assert place.store.jobs.find(failed.id) is None and place.messages(failed.id) == []
    assert place.store.jobs.find(kept.id) is not None
