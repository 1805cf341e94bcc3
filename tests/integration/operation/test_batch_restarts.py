"""Batches go on after whatever ends in the middle: the server, its engine, one of its HTTP processes."""

import os
import signal
import time
from pathlib import Path

import httpx
import openai

from tests.support.batches import completions, line, results, start, wait
from tests.support.clients.openai_client import strict_client
from tests.support.over_http import get_often
from tests.support.servers.fake_engine import SLOW
from tests.support.servers.processes import worker_pids
from tests.support.servers.server_process import FAKE, ServerProcess, running, the_error_line

NUM_LINES = 160


def slow_lines(number: int) -> bytes:
    body = {"model": "fake", "max_tokens": 20}
    return b"".join(line(f"r{i}", body | {"prompt": f"{SLOW} {i:03} "}) for i in range(number))


def wait_for(client: openai.OpenAI, batch_id: str, completed: int) -> None:
    deadline_s = time.monotonic() + 300  # on a busy machine
    while client.batches.retrieve(batch_id).request_counts.completed < completed:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def done(folder: Path, batch_id: str) -> set[bytes]:
    """The whole lines that a running batch has written."""
    text = (folder / "work" / f"{batch_id}.output").read_bytes()
    return set(text[: text.rfind(b"\n") + 1].splitlines())


def test_what_was_done_is_not_done_again_and_nothing_is_lost(fake_model: str, tmp_path: Path) -> None:
    # Few at once, so that a machine that is busy with other things kills the server in the middle, too.
    flags = ["--model", fake_model, "--data-dir", str(tmp_path / "data"), "--max-num-seqs", "16"]
    folder = tmp_path / "data"
    with running(FAKE, *flags) as server, strict_client(server.url) as client:
        second = ServerProcess(FAKE, *flags)
        assert str(folder) in the_error_line(second)
        batch_id = start(client, slow_lines(NUM_LINES)).id
        other_id = start(client, completions(1)).id
        wait(client, other_id)
        kept = client.batches.retrieve(other_id)
        wait_for(client, batch_id, 20)
        server.process.kill()  # in the middle of anything
        server.wait()
    before = done(folder, batch_id)
    assert 20 <= len(before) < NUM_LINES
    with open(folder / "work" / f"{batch_id}.output", "ab") as file:
        file.write(b'{"id": "batch_req_0", "custom_id": "r29')  # as if it had been cut off
    (folder / "uploads" / "left").write_bytes(b"x")
    (folder / "files" / "file-left").write_bytes(b"x")

    with running(FAKE, *flags, "--restart-engine", "3") as server, strict_client(server.url) as client:
        assert client.batches.retrieve(other_id) == kept and results(client, kept.output_file_id)
        assert not list((folder / "uploads").iterdir()) and not (folder / "files" / "file-left").exists()
        wait_for(client, batch_id, len(before) + 10)
        os.kill(server.engine_pid(), signal.SIGKILL)  # requests that ran then are not to blame
        wait_for(client, batch_id, len(before) + 30)
        assert server.stop() == 0
    again = done(folder, batch_id)
    assert before < again and not (folder / "work" / f"{batch_id}.errors").read_bytes()

    with running(FAKE, *flags) as server, strict_client(server.url) as client:
        ended = wait(client, batch_id)
        assert (ended.status, ended.error_file_id) == ("completed", None)
        answers = results(client, ended.output_file_id)
        assert answers.keys() == {f"r{i}" for i in range(NUM_LINES)}
        assert again <= set(client.files.content(ended.output_file_id).content.splitlines())
        assert not list((folder / "work").iterdir())


def test_one_http_process_runs_batches_and_another_takes_over(fake_model: str, tmp_path: Path) -> None:
    flags = ["--model", fake_model, "--data-dir", str(tmp_path), "--http-workers", "2"]
    with running(FAKE, *flags) as server, strict_client(server.url) as client:
        batch_id = start(client, slow_lines(NUM_LINES)).id
        wait_for(client, batch_id, 20)
        lock = os.stat(tmp_path / "runner.lock").st_ino
        (holder,) = {
            int(fields[4])
            for text in Path("/proc/locks").read_text().splitlines()
            if (fields := text.split())[5].endswith(f":{lock}") and fields[1] == "FLOCK"
        }
        assert holder in worker_pids(server)
        os.kill(holder, signal.SIGKILL)
        while True:  # requests may be in the share of the one that is gone
            try:
                ended = wait(client, batch_id)
                break
            except openai.APIConnectionError:
                time.sleep(0.1)
        assert ended.request_counts.model_dump() == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
        assert results(client, ended.output_file_id).keys() == {f"r{i}" for i in range(NUM_LINES)}
        assert len({answer.text for answer in get_often(server, f"/v1/batches/{batch_id}")}) == 1


def test_a_folder_that_leads_elsewhere_is_refused(fake_model: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "files").symlink_to(tmp_path / "elsewhere")
    server = ServerProcess(FAKE, "--model", fake_model, "--data-dir", str(tmp_path / "data"))
    assert "--data-dir" in the_error_line(server)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_batch_whose_key_is_gone_ends(fake_model: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    both = '[ann]\nkey = "key-of-ann"\n[bob]\nkey = "key-of-bob"\n'
    keys.write_text(both)
    keys.chmod(0o600)
    flags = ["--model", fake_model, "--data-dir", str(tmp_path / "data"), "--keys", str(keys)]
    with running(FAKE, *flags) as server, strict_client(server.url) as client:
        ann = client.with_options(api_key="key-of-ann")
        batch_id = start(ann, slow_lines(NUM_LINES)).id
        wait_for(ann, batch_id, 10)
        keys.write_text('[bob]\nkey = "key-of-bob"\n')
        server.process.send_signal(signal.SIGHUP)
        while server.metric("vllm:num_requests_running"):
            time.sleep(0.05)
        keys.write_text(both.replace("key-of-ann", "new-key-of-ann"))
        server.process.send_signal(signal.SIGHUP)
        ann = client.with_options(api_key="new-key-of-ann")  # the same name: the same files
        deadline_s = time.monotonic() + 30
        while (
            httpx.get(f"{server.url}/v1/files", headers={"Authorization": "Bearer new-key-of-ann"}).status_code == 401
        ):
            assert time.monotonic() < deadline_s
        ended = wait(ann, batch_id)
        assert ended.status == "failed" and [problem.code for problem in ended.errors.data] == ["invalid_api_key"]
        assert 10 <= len(results(ann, ended.output_file_id)) == ended.request_counts.completed < NUM_LINES
