"""What befalls jobs of a real server: processes and servers that are killed, several jobs at once, bad lines."""

import os
import signal
import time
from pathlib import Path

import openai
import pytest

from tests.support.servers.server_process import TUNING, ServerProcess, running
from tests.support.tuning.chats import chats
from tests.support.tuning.server_jobs import ENDED, answer, client_of, method, server_flags, upload, wait

pytest.importorskip("accelerate")


@pytest.mark.slow
def test_what_befalls_jobs_changes_no_answer(tmp_path: Path) -> None:
    """Two jobs at once, a process that is killed, and a third job with bad lines, beside requests that go on."""
    flags = server_flags(tmp_path)
    with running(TUNING, *flags) as server:
        ann = client_of(server, "ann")
        before = [answer(ann, temperature=0), answer(ann, temperature=1, seed=3)]
        content = chats(40)
        jobs = [
            ann.fine_tuning.jobs.create(
                model="tiny", training_file=upload(ann, each), seed=5, method=method(n_epochs=20, batch_size=2)
            ).id
            for each in (content, content, content + b"{}\n[]\n")
        ]
        _wait_for_step(ann, jobs[0], 60)
        (pid,) = _trainers(server)
        os.kill(pid, signal.SIGKILL)
        seen, deadline_s = [], time.monotonic() + 400
        while not all(ann.fine_tuning.jobs.retrieve(job).status in ENDED for job in jobs):
            assert time.monotonic() < deadline_s
            seen.append([answer(ann, temperature=0), answer(ann, temperature=1, seed=3)])
        assert len(seen) > 10 and all(each == before for each in seen)
        first, second, bad = (ann.fine_tuning.jobs.retrieve(job) for job in jobs)
        assert first.status == second.status == "succeeded" and bad.status == "failed"
        assert bad.error is not None and ": Line 41: " in bad.error.message
        events = [event.message for event in ann.fine_tuning.jobs.list_events(first.id)]
        assert sum("unexpectedly (signal 9)" in message for message in events) == 1
        files = [ann.files.content(job.result_files[0]).text for job in (first, second)]
        assert files[0] == files[1]


def _trainers(server: ServerProcess) -> list[int]:
    """The processes of the server that train."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"eager_trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_jobs_and_models_survive_whatever_ends_the_server(tmp_path: Path) -> None:
    flags = server_flags(tmp_path)
    with running(TUNING, *flags) as server:
        ann = client_of(server, "ann")
        content = chats(60)
        whole = ann.fine_tuning.jobs.create(
            model="tiny", training_file=upload(ann, content), seed=5, method=method(n_epochs=20, batch_size=2)
        )
        wait(ann, whole.id, "succeeded")
        parts = ann.fine_tuning.jobs.create(
            model="tiny", training_file=upload(ann, content), seed=5, method=method(n_epochs=20, batch_size=2)
        )
        _wait_for_step(ann, parts.id, 60)
        server.process.send_signal(signal.SIGKILL)
        server.wait()
    with running(TUNING, *flags) as server:
        ann = client_of(server, "ann")
        _wait_for_step(ann, parts.id, 200)
        assert server.stop() == 0
    with running(TUNING, *flags) as server:
        ann = client_of(server, "ann")
        ended = wait(ann, parts.id, "succeeded")
        first = ann.fine_tuning.jobs.retrieve(whole.id)
        files = [ann.files.content(job.result_files[0]).text for job in (first, ended)]
        assert files[0] == files[1]
        assert {answer(ann, job.fine_tuned_model or "", temperature=0) for job in (first, ended)} == {
            answer(ann, first.fine_tuned_model or "", temperature=0)
        }


def _wait_for_step(client: openai.OpenAI, job_id: str, step: int) -> None:
    deadline_s = time.monotonic() + 400
    while True:
        (last,) = client.fine_tuning.jobs.list_events(job_id, limit=1).data
        if isinstance(last.data, dict) and last.data["step"] >= step:
            return
        assert time.monotonic() < deadline_s, last
        time.sleep(0.05)
