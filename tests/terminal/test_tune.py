"""`stellarbyte tune` with a real server that trains a tiny model: in pipes, in a terminal, and when things fail."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stellarbyte_client import StellarByte
from stellarbyte_client.terminal.tune import job_view
from tests.support.clients.openai_client import strict_client
from tests.support.clients.terminal import CTRL_C, ENTER, Terminal
from tests.support.servers.server_process import TUNING, ServerProcess, running
from tests.support.tuning.chat_model import make_chat_model
from tests.support.tuning.chats import chats
from tests.terminal.command import Command, Result

pytest.importorskip("accelerate")
KEYS = """
[ann]
key = "key-of-ann"
[bob]
key = "key-of-bob"
fine_tune = false
"""
ADMIN = ("--admin-api-key", "key-of-admin")
ANN = ("--api-key", "key-of-ann")
JOB_S = 300.0  # until a training process has begun, on a busy machine


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tune")
    (folder / "keys.toml").write_text(KEYS)
    (folder / "keys.toml").chmod(0o600)
    model = ["--model", str(make_chat_model(folder / "model")), "--served-model-name", "tiny"]
    keys = ["--keys", str(folder / "keys.toml"), *ADMIN]
    return [*model, "--data-dir", str(folder / "data"), "--fine-tuning", "cpu", "--feedback", *keys]


@pytest.fixture(scope="module")
def server(flags: list[str]) -> Iterator[ServerProcess]:
    with running(TUNING, *flags) as server:
        yield server


@pytest.fixture
def tune(stellarbyte: Command, server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(job_view, "LOOK_S", 0.05)

    def run(*arguments: str) -> Result:
        return stellarbyte("tune", *arguments, "--url", server.url)

    return run


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("examples") / "examples.jsonl"
    path.write_bytes(chats(12))
    return str(path)


def get(server: ServerProcess, path: str, who: str = "ann") -> Any:
    headers = {"Authorization": f"Bearer key-of-{who}"}
    return httpx.get(server.url + path, headers=headers, timeout=30).raise_for_status().json()


def post(server: ServerProcess, path: str, **body: Any) -> None:
    headers = {"Authorization": "Bearer key-of-admin"}
    httpx.post(server.url + path, headers=headers, json=body, timeout=60).raise_for_status()


def job_of(text: str) -> str:
    found = re.search(r"ftjob-[0-9a-f]+", text)
    assert found is not None, text
    return found[0]


def test_examples_become_a_model_that_is_live_and_can_be_taken_back(
    tune: Any, server: ServerProcess, examples: str, tmp_path: Path
) -> None:
    validation = tmp_path / "validation.jsonl"
    validation.write_bytes(chats(3))
    hyperparameters = ("--epochs", "40", "--batch-size", "2", "--learning-rate-multiplier", "1", "--seed", "7")
    given = ("--validation", str(validation), "--exact-match", "--suffix", "sailor", "--publish", "pirate")
    start = (examples, *given, *hyperparameters, "--url", server.url, *ADMIN)
    with Terminal("tune", *start, home=tmp_path, rows=40) as terminal:
        terminal.wait_for(r"^Checked \S+: 12 examples, 3 for validation, 240 steps, [\d,]+ tokens", JOB_S)
        terminal.wait_for(r"step [1-9]\d* of 240", JOB_S)
        terminal.wait_for(r"^ *\d+\.\d\d ┤").wait_for(r"^· training loss \d\.\d{3}   ● validation loss \d\.\d{3}")
        terminal.type(CTRL_C)
        terminal.wait_for("d: detach, the job continues; c: cancel the job; Enter: watch again >").type(ENTER)
        terminal.wait_for(r"(?s)watch again >.*^ftjob-\w+  succeeded$.*step 240 of 240", JOB_S)
        terminal.wait_for("A prompt for both models").type("q1?" + ENTER)
        terminal.wait_for(r"^ *tiny +ft:tiny:sailor:\w+").wait_for(r"^ .* aye aye")  # side by side
        terminal.wait_for(r"(?s)aye aye.*A prompt for both models").type(ENTER)
        assert terminal.wait_end() == 0
        text = terminal.scrolled_text
    (job,) = get(server, "/v1/fine_tuning/jobs", "admin")["data"]
    losses, exact = job["losses"], job["exact_match"]
    assert f"\nThe new model is {job['fine_tuned_model']}.\n" in text
    assert f"\nValidation loss: {losses['base_valid']:.3f} without it, {losses['valid']:.3f} with it.\n" in text
    assert f"\nExact answers: {exact['base_valid']:.0%} without it, {exact['valid']:.0%} with it.\n" in text
    assert "\nIt is live as pirate, version 1; stellarbyte tune --back pirate goes back.\n" in text

    listed = tune("--list", *ADMIN)
    assert [job["id"], "succeeded"] == listed.out.splitlines()[3].split()[:2], listed
    assert f"{losses['valid']:.3f} valid" in listed.out and job["fine_tuned_model"] in listed.out
    assert tune("--list", *ANN).out == "There are no fine-tuning jobs.\n"

    checkpoint = get(server, f"/v1/fine_tuning/jobs/{job['id']}/checkpoints", "admin")["data"][1]["id"]
    post(server, f"/v1/fine_tuning/jobs/{job['id']}/publish", name="pirate", checkpoint=checkpoint)
    assert tune("--back", "pirate", *ADMIN) == Result(0, "pirate is at version 1 again.\n", "")
    assert StellarByte(server.url, admin_api_key="key-of-admin").adapters.versions("pirate").current == 1

    shown = tune("--resume", job["id"], "--prompt", "q1?", *ADMIN)  # in a pipe
    assert shown.status == 0, shown
    events = get(server, f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100", "admin")["data"]
    assert [each["message"] for each in reversed(events)] == shown.out.partition("\nThe new model")[0].splitlines()[
        -100:
    ]
    base, new = re.split(r"\n(?:tiny|ft:tiny:sailor:\w+):\n", shown.out)[1:]
    assert new.startswith("aye aye") and not base.startswith("aye aye")

    deleted = f"Deleted 3 files and the model {job['fine_tuned_model']}.\n"
    assert tune("--delete", job["id"], *ADMIN) == Result(0, deleted, "")
    assert get(server, "/v1/files", "admin")["data"] == []
    served = [model["id"] for model in get(server, "/v1/models", "admin")["data"]]
    assert job["fine_tuned_model"] not in served and "pirate" in served


def test_ctrl_c_leaves_a_job_running_or_cancels_it(
    tune: Any, server: ServerProcess, examples: str, tmp_path: Path
) -> None:
    client = strict_client(server.url).with_options(api_key="key-of-ann")
    file_id = client.files.create(file=Path(examples), purpose="fine-tune").id
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id
    for key, status, message in (
        ("d", 0, f"The job continues on the server; stellarbyte tune --resume {job_id} shows it again."),
        ("c", 1, f"error: The job {job_id} was cancelled"),
    ):
        with Terminal("tune", "--resume", job_id, "--url", server.url, *ANN, home=tmp_path) as terminal:
            terminal.wait_for(r"^ftjob-").type(CTRL_C)
            terminal.wait_for("watch again >").type(key + ENTER)
            assert terminal.wait_end() == status
            assert message in terminal.text
        ended = client.fine_tuning.jobs.retrieve(job_id).status == "cancelled"
        assert ended == (key == "c")
        if not ended:
            refused = tune("--delete", job_id, *ANN)
            assert refused.status == 1 and refused.err.endswith("; cancel it with --cancel before.\n"), refused
    reader = client.fine_tuning.jobs.create(model="tiny", training_file=file_id).id
    assert tune("--delete", job_id, *ANN) == Result(0, "Deleted 0 files.\n", "")  # another job reads it
    client.fine_tuning.jobs.cancel(reader)
    assert tune("--delete", job_id, *ANN) == Result(0, "Deleted 1 file.\n", "")
    assert list(client.files.list()) == []


def test_lines_that_cannot_be_used_are_named_and_nothing_is_left(
    tune: Any, server: ServerProcess, tmp_path: Path
) -> None:
    before = get(server, "/v1/files"), get(server, "/v1/fine_tuning/jobs")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(chats(2) + b"{\n" + chats(1) + b'{"messages": []}\n')
    refused = tune(str(bad), *ANN)
    assert (refused.status, refused.out) == (1, "")
    first, second, last = refused.err.splitlines()
    assert re.match(rf"{bad}, line 3: .*not valid JSON", first, re.IGNORECASE)
    assert re.match(rf"{bad}, line 5: .*'messages' must be a list", second, re.IGNORECASE)
    assert last == "error: No job was started, because of these problems."
    assert (get(server, "/v1/files"), get(server, "/v1/fine_tuning/jobs")) == before


def test_what_cannot_be_done_is_one_sentence(tune: Any, server: ServerProcess, examples: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    files = len(get(server, "/v1/files", "bob")["data"])
    for arguments, message in (
        ((str(tmp_path / "none.jsonl"), *ANN), f"{tmp_path}/none.jsonl cannot be read: No such file or directory."),
        (
            (str(tmp_path / "empty.jsonl"), *ANN),
            f"{tmp_path}/empty.jsonl must be a file with one example per line; it is empty.",
        ),
        (("--resume", "ftjob-1", *ANN), "The fine-tuning job 'ftjob-1' does not exist."),
        (("--cancel", "ftjob-1", *ANN), "The fine-tuning job 'ftjob-1' does not exist."),
        ((examples,), "The server needs one of its API keys; give it with --api-key or in STELLARBYTE_API_KEY."),
        ((examples, "--api-key", "key-of-bob"), "The key 'bob' may not fine-tune models."),
        (("--back", "none", *ADMIN), "There is no adapter 'none' that was loaded over HTTP; only those have versions."),
        (("--from-feedback", examples, *ADMIN), f"{examples} already exists; give another name."),
    ):  # fmt: skip
        assert tune(*arguments) == Result(1, "", f"error: {message}\n")
    assert len(get(server, "/v1/files", "bob")["data"]) == files


def test_ratings_in_a_chat_become_examples(tune: Any, server: ServerProcess, tmp_path: Path) -> None:
    out = tmp_path / "examples.jsonl"
    with Terminal("chat", "--max-tokens", "4", "--quiet", "--url", server.url, *ANN, home=tmp_path) as terminal:
        terminal.wait_for(r"^❯$").type("/good" + ENTER)
        terminal.wait_for("There is no complete answer to rate.")
        terminal.type("q1?" + ENTER)
        terminal.wait_for(r"(?s)q1\?.*^❯$").type("/bad aye aye" + ENTER)
        terminal.wait_for("Rated as bad.")
    refused = tune("--from-feedback", str(out), *ANN)
    assert (refused.status, out.exists()) == (1, False) and "admin-api-key" in refused.err
    assert tune("--from-feedback", str(out), *ADMIN) == Result(0, f"Wrote 1 example to {out}.\n", "")
    chat = [{"role": "user", "content": "q1?"}, {"role": "assistant", "content": "aye aye"}]
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"messages": chat}]
    assert out.stat().st_mode & 0o077 == 0


def test_feedback_that_is_off_is_said(stellarbyte: Command, fake_server: ServerProcess, tmp_path: Path) -> None:
    refused = stellarbyte("tune", "--from-feedback", str(tmp_path / "out"), "--url", fake_server.url)
    assert refused.status == 1 and refused.err.startswith("error: This request is disabled"), refused
    with Terminal("chat", "--max-tokens", "4", "--quiet", "--url", fake_server.url, home=tmp_path) as terminal:
        terminal.wait_for(r"^❯$").type("hello" + ENTER)
        terminal.wait_for(r"(?s)hello.*^❯$").type("/good" + ENTER)
        terminal.wait_for("Feedback is off because the server was started without --feedback.")


@pytest.mark.slow
def test_a_job_can_be_started_and_left_at_once(tune: Any, server: ServerProcess, examples: str) -> None:
    files = get(server, "/v1/files")
    refused = tune(examples, "--publish", "x", *ANN)  # once the examples have been checked
    assert refused.err.startswith("error: The field 'publish' needs the right to load adapters: The key 'ann'")
    assert refused.status == 1 and get(server, "/v1/files") == files
    started = tune(examples, "--detach", *ANN)
    assert started.status == 0 and "stellarbyte tune --resume ftjob-" in started.out
    job_id = job_of(started.out)
    assert tune("--cancel", job_id, *ANN) == Result(0, f"Cancelled {job_id}.\n", "")


@pytest.mark.slow
def test_a_paused_job_continues_and_a_server_that_starts_again_finishes_it(
    server: ServerProcess, flags: list[str], examples: str, tmp_path: Path
) -> None:
    options = ("--epochs", "25", "--batch-size", "1", "--url", server.url, *ANN)
    with Terminal("tune", examples, *options, home=tmp_path) as terminal:
        terminal.wait_for(r"step [1-9]\d* of 300", JOB_S)
        job_id = job_of(terminal.text)
        httpx.post(f"{server.url}/v1/fine_tuning/jobs/{job_id}/pause", headers={"Authorization": "Bearer key-of-ann"})
        terminal.wait_for(r"^ftjob-\w+  paused").type(CTRL_C)
        terminal.wait_for("watch again >").type("d" + ENTER)
        assert terminal.wait_end() == 0
    with Terminal("tune", "--resume", job_id, "--url", server.url, *ANN, home=tmp_path) as terminal:
        terminal.wait_for(r"^ftjob-\w+  running.*\n.*step [1-9]\d* of 300", JOB_S)
        server.process.kill()
        server.wait()
        terminal.wait_for(r"the server does not answer, trying again \(Ctrl-C leaves the job running\)", JOB_S)
        again = ServerProcess(TUNING, *flags, port=server.port)
        try:
            again.wait_ready()
            terminal.wait_for(r"^ftjob-\w+  succeeded", JOB_S).wait_for("The new model is ft:tiny:")
            terminal.wait_for("A prompt for both models").type(ENTER)
            assert terminal.wait_end() == 0
        finally:
            again.stop()
