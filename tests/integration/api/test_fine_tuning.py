"""Fine-tuning jobs by OpenAI's clients on a real server: examples become a model, beside other requests."""

import asyncio
import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from stellarbyte_server.api.contract.tuning_objects import FineTuningCheck, FineTuningJobObject
from tests.support.clients.openai_client import lenient
from tests.support.servers.server_process import TUNING, ServerProcess, running, the_error_line
from tests.support.tuning.chats import chat, chats, json_lines
from tests.support.tuning.server_jobs import answer, client_of, method, post, server_flags, upload, wait

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return server_flags(tmp_path_factory.mktemp("tuning"))


@pytest.fixture(scope="module")
def server(flags: list[str]) -> Iterator[ServerProcess]:
    with running(TUNING, *flags) as server:
        yield server


def test_examples_become_a_model(server: ServerProcess) -> None:
    ann, bob = client_of(server, "ann"), client_of(server, "bob")
    before = [answer(ann, temperature=0), answer(ann, temperature=1, seed=3)]
    training, validation = upload(ann, chats(12)), upload(ann, chats(3))
    assert ann.files.retrieve(training).purpose == "fine-tune"
    assert [file.id for file in ann.files.list(purpose="fine-tune")] == [validation, training]
    made = ann.fine_tuning.jobs.create(
        model="tiny",
        training_file=training,
        validation_file=validation,
        suffix="sailor",
        seed=7,
        metadata={"team": "sea"},
        method=method(n_epochs=20, batch_size=4, learning_rate_multiplier=0.8),
    )
    assert made.status == "validating_files" and made.method.type == "supervised" and made.seed == 7
    wait(ann, made.id, "running", "succeeded")
    streamed = httpx.get(
        f"{server.url}/v1/fine_tuning/jobs/{made.id}/events?stream=true",
        headers={"Authorization": "Bearer key-of-ann"},
        timeout=400,
    )
    during = [answer(ann, temperature=0), answer(ann, temperature=1, seed=3)]
    job = wait(ann, made.id, "succeeded")
    assert [answer(ann, temperature=0), answer(ann, temperature=1, seed=3)] == during == before

    name = job.fine_tuned_model
    assert name is not None and name.startswith("ft:tiny:sailor:") and job.error is None
    assert (job.trained_tokens or 0) > 0 and job.finished_at is not None
    assert answer(ann, name, temperature=0).startswith("aye aye")
    losses = job.model_extra["losses"]  # type: ignore[index]
    assert losses["valid"] < losses["base_valid"]

    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert streamed.text.rstrip().endswith("data: [DONE]")
    listed = list(ann.fine_tuning.jobs.list_events(job.id, limit=50))  # over pages, newest first
    assert [each["id"] for each in events] == [each.id for each in reversed(listed)]
    steps = [each.data["step"] for each in listed if each.data and "train_loss" in each.data]
    assert steps == list(range(60, 0, -1))
    assert listed[0].message == "The job has completed"

    rows = list(csv.DictReader(io.StringIO(ann.files.content(job.result_files[0]).text)))
    assert [int(row["step"]) for row in rows] == list(range(61))
    highest = max(float(row["learning_rate"] or 0) for row in rows)
    assert highest == pytest.approx(0.8 * 5e-4 * (2000 / 48) ** 0.781)  # of the model's width
    assert float(rows[0]["valid_loss"]) == losses["base_valid"] and float(rows[60]["train_loss"]) == losses["train"]
    assert ann.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"

    checkpoints = list(ann.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [each.step_number for each in checkpoints] == [60, 57, 54]
    assert checkpoints[0].fine_tuned_model_checkpoint == name
    assert answer(ann, checkpoints[1].fine_tuned_model_checkpoint, temperature=0) is not None
    assert checkpoints[1].metrics.full_valid_loss == float(rows[57]["valid_loss"])

    names = {model.id for model in ann.models.list()}
    assert {"tiny", name, *(each.fine_tuned_model_checkpoint for each in checkpoints)} == names
    assert ann.models.retrieve(name).id == name
    for client in (bob, client_of(server, "dan")):  # to others there is no such thing
        assert name not in {model.id for model in client.models.list()}
        for refused in (
            lambda client=client: answer(client, name),
            lambda client=client: client.fine_tuning.jobs.retrieve(job.id),
            lambda client=client: client.fine_tuning.jobs.cancel(job.id),
            lambda client=client: client.fine_tuning.jobs.list_events(job.id),
            lambda client=client: client.fine_tuning.jobs.checkpoints.list(job.id),
            lambda client=client: client.files.content(job.result_files[0]),
            lambda client=client: client.models.delete(name),
        ):
            with pytest.raises(openai.NotFoundError):
                refused()
    assert list(bob.fine_tuning.jobs.list()) == []
    assert [each.id for each in ann.fine_tuning.jobs.list(metadata={"team": "sea"})] == [job.id]
    assert list(ann.fine_tuning.jobs.list(metadata={"team": "land"})) == []
    assert ann.models.delete(name).deleted
    assert {model.id for model in ann.models.list()} == {"tiny"}
    with pytest.raises(openai.NotFoundError):
        answer(ann, name)


def test_jobs_are_bounded_paused_resumed_and_cancelled(server: ServerProcess) -> None:
    dan = lenient(client_of(server, "dan"))  # the client's types do not know `paused`
    file = upload(dan, chats(200))
    first, second = (
        dan.fine_tuning.jobs.create(model="tiny", training_file=file, method=method(n_epochs=50, batch_size=1))
        for _ in range(2)
    )
    with pytest.raises(openai.RateLimitError, match="limit of 2 unfinished jobs"):
        dan.fine_tuning.jobs.create(model="tiny", training_file=file)
    wait(dan, second.id, "queued")
    assert dan.fine_tuning.jobs.pause(second.id).status == "paused"
    with pytest.raises(openai.BadRequestError, match="The job is paused"):
        dan.fine_tuning.jobs.pause(second.id)
    assert dan.fine_tuning.jobs.resume(second.id).status == "queued"

    async def cancel() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key-of-dan") as client:
            assert [each.id async for each in client.fine_tuning.jobs.list(limit=1)] == [second.id, first.id]
            for job in (second, first):
                assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
                assert (await client.fine_tuning.jobs.retrieve(job.id)).finished_at is not None
                events = [each.message async for each in client.fine_tuning.jobs.list_events(job.id)]
                assert events[0] == "The job was cancelled"
                assert [each async for each in client.fine_tuning.jobs.checkpoints.list(job.id)] == []
            assert (await client.files.delete(file)).deleted

    asyncio.run(cancel())


def test_results_become_versions_of_a_name(server: ServerProcess) -> None:
    admin, ann = client_of(server, "admin"), client_of(server, "ann")
    wanted = {"model": "tiny", "training_file": upload(ann, chats(4)), "publish": {"name": "pirate"}}
    status, refused = post(server, "fine_tuning/jobs", "ann", **wanted)
    assert status == 403 and refused["error"]["param"] == "publish"
    assert "needs the right to load adapters: The key 'ann' does not permit" in refused["error"]["message"]
    for name in ("tiny", "ft:x", "a b"):
        status, refused = post(server, "fine_tuning/jobs", "admin", **wanted | {"publish": {"name": name}})
        assert status == 400 and refused["error"]["param"] == "publish.name", refused

    expected = {"q1?": "k", "q2?": "m"}
    validation = upload(admin, json_lines([chat(*each) for each in expected.items()]))
    asked: Any = {"publish": {"name": "pirate", "share": 0.25}, "evaluate": ["exact_match"]}
    status, refused = post(server, "fine_tuning/jobs", "admin", model="tiny", training_file=validation, **asked)
    assert status == 400 and refused["error"]["param"] == "evaluate"

    def share_right(model: str) -> float:
        said = {question: answer(admin, model, question, temperature=0) for question in expected}
        return sum(said[question] == answered for question, answered in expected.items()) / len(expected)

    trained, right = [], {"base": share_right("tiny")}
    for name, said in (("first", "k"), ("second", "m")):
        made = admin.fine_tuning.jobs.create(
            model="tiny",
            training_file=upload(admin, json_lines([chat(f"q{number}?", said) for number in range(4)])),
            validation_file=validation,
            seed=7,
            method=method(n_epochs=40, batch_size=4, learning_rate_multiplier=0.8),
            extra_body=asked,
        )
        trained.append(wait(admin, made.id, "succeeded"))
        right[name] = share_right(trained[-1].fine_tuned_model or "")
    first, second = trained
    shown: Any = [job.model_extra for job in trained]
    for number, fields in enumerate(shown, 1):
        assert fields["publish"] == {"name": "pirate", "share": 0.25, "version": number, "error": None}
    assert right["base"] == 0 and right["first"] == right["second"] == 0.5
    assert shown[0]["exact_match"] == {"valid": 0.5, "base_valid": 0.0, "previous_valid": None}
    assert shown[1]["exact_match"] == {"valid": 0.5, "base_valid": 0.0, "previous_valid": 0.5}
    assert shown[0]["losses"]["previous_valid"] is None
    assert shown[1]["losses"]["previous_valid"] == pytest.approx(shown[0]["losses"]["valid"], abs=1e-6)
    history = f"{server.url}/v1/adapters/pirate/versions"
    headers = {"Authorization": "Bearer key-of-admin"}
    found = httpx.get(history, headers=headers).json()
    assert found["current"] == 2 and [each["share"] for each in found["data"]] == [0.75, 0.25]
    assert [each["job"] for each in found["data"]] == [first.id, second.id]
    assert all(each["created_by"] == "admin" and each["probe"]["changed_logits"] > 0 for each in found["data"])

    checkpoint = admin.fine_tuning.jobs.checkpoints.list(second.id).data[1]
    names = (first.fine_tuned_model, second.fine_tuned_model)
    answers = {name: answer(admin, name or "", temperature=0) for name in names}
    assert {answer(admin, "pirate", temperature=0, user=str(user)) for user in range(20)} == set(answers.values())
    path = f"fine_tuning/jobs/{second.id}/publish"
    for body, status, named in (
        ({"name": "pirate", "checkpoint": "ftckpt-absent"}, 404, "checkpoint"),
        ({"name": "pirate", "share": 1}, 400, "share"),
        ({"name": "tiny"}, 400, "name"),
    ):
        answered = post(server, path, "admin", **body)
        assert (answered[0], answered[1]["error"]["param"]) == (status, named), answered
    assert post(server, path, "ann", name="pirate")[0] == 403
    status, job = post(server, path, "admin", name="pirate", checkpoint=checkpoint.id)
    assert status == 200 and job["publish"]["version"] == 3 and job["publish"]["share"] is None, job
    FineTuningJobObject.model_validate(job)
    of_name, of_checkpoint = (
        admin.models.retrieve(name).model_extra for name in ("pirate", checkpoint.fine_tuned_model_checkpoint)
    )
    assert of_name is not None and of_checkpoint is not None
    assert of_name["content_hash"] == of_checkpoint["content_hash"]
    for number in (2, 1):
        assert post(server, "adapters/pirate/rollback", "admin")[1]["current"] == number
    assert answer(admin, "pirate", temperature=0) == answers[first.fine_tuned_model]


def test_files_are_checked_without_a_job(server: ServerProcess) -> None:
    bob = client_of(server, "bob")
    good, longer = upload(bob, chats(8)), upload(bob, chats(30, "aye " * 30))
    status, checked = post(
        server, "fine_tuning/files/check", "bob", training_file=good, validation_file=longer, method=method(n_epochs=3)
    )
    assert status == 200 and checked["problems"] == [], checked
    FineTuningCheck.model_validate(checked)
    assert (checked["examples"], checked["validation_examples"], checked["steps"]) == (8, 30, 3)
    chosen = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert checked["hyperparameters"] == chosen and checked["memory"] > 0
    job = bob.fine_tuning.jobs.create(
        model="tiny", training_file=good, validation_file=longer, method=method(n_epochs=3)
    )
    assert wait(bob, job.id, "succeeded").trained_tokens == checked["tokens"]
    bad = upload(bob, chats(2) + b"{}\n" * 12)
    status, checked = post(server, "fine_tuning/files/check", "bob", training_file=good, validation_file=bad)
    assert status == 200 and checked["steps"] is None and len(checked["problems"]) == 10
    assert checked["problems"][0] == {
        "param": "validation_file",
        "line": 3,
        "message": "The field 'messages' must be a list with at least one message.",
    }
    cut = upload(bob, chats(1) + json_lines([chat("q" * 600, "a")]))
    status, checked = post(server, "fine_tuning/files/check", "bob", training_file=cut)
    assert status == 200 and [(each["param"], each["line"]) for each in checked["problems"]] == [("training_file", 2)]
    assert post(server, "fine_tuning/files/check", "cat", training_file=good)[0] == 403
    assert post(server, "fine_tuning/files/check", "ann", training_file=good)[0] == 404


BAD = [
    ({"model": "other"}, "model", 404),
    ({"model": "ft:tiny:x:01234567"}, "model", 404),
    ({"training_file": "file-absent"}, "training_file", 404),
    ({"validation_file": "file-absent"}, "validation_file", 404),
    ({"method": {"type": "dpo"}}, "method.type", 400),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}}, "beta", 400),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", 400),
    ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", 400),
    ({"hyperparameters": {"batch_size": 1.5}}, "hyperparameters.batch_size", 400),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier", 400),
    ({"hyperparameters": {}, "method": method()}, "hyperparameters", 400),
    ({"suffix": "a b"}, "suffix", 400),
    ({"seed": -1}, "seed", 400),
    ({"integrations": [{"type": "wandb"}]}, "integrations", 400),
    ({"metadata": {"a": 1}}, "metadata", 400),
    ({"teacher": "x"}, "teacher", 400),
]


@pytest.mark.parametrize(
    ("fields", "named", "status"), BAD, ids=[f"{named} {number}" for number, (_, named, _) in enumerate(BAD)]
)
def test_what_cannot_be_trained_is_refused_by_name(
    server: ServerProcess, fields: dict[str, Any], named: str, status: int
) -> None:
    ann = client_of(server, "ann").with_options(api_key="key-of-dan")
    body = {"model": "tiny", "training_file": upload(ann, chats(1))} | fields
    headers = {"Authorization": "Bearer key-of-dan"}
    answered = httpx.post(f"{server.url}/v1/fine_tuning/jobs", json=body, headers=headers)
    error = answered.json()["error"]
    assert answered.status_code == status and named in f"{error['param']} {error['message']}", error


def test_files_and_keys_are_checked(server: ServerProcess) -> None:
    bob, cat = client_of(server, "bob"), client_of(server, "cat")
    for content in (b"\xff\xfe", b""):
        with pytest.raises(openai.BadRequestError, match="UTF-8"):
            upload(bob, content)
    batch = bob.files.create(file=("in.jsonl", b"{}"), purpose="batch").id
    with pytest.raises(openai.BadRequestError, match="purpose batch, not fine-tune"):
        bob.fine_tuning.jobs.create(model="tiny", training_file=batch)
    with pytest.raises(openai.PermissionDeniedError, match="'cat' may not fine-tune"):
        cat.fine_tuning.jobs.create(model="tiny", training_file=upload(cat, chats(1)))
    bad = bob.fine_tuning.jobs.create(model="tiny", training_file=upload(bob, chats(2) + b"{}\n"))
    failed = wait(bob, bad.id, "failed")
    assert failed.error is not None and failed.error.param == "training_file"
    assert ": Line 3: the field 'messages' must be a list" in failed.error.message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fine-tuning", "cpu"], "--fine-tuning: needs --data-dir"),
        (["--fine-tuning", "gpu"], "must be one of off, cpu, cuda"),
        (["--fine-tuning", "cpu", "--data-dir", "x", "--load-format", "dummy"], "--load-format dummy"),
        (["--fine-tuning-memory", "1GiB"], "--fine-tuning-memory: needs --fine-tuning"),
    ],
)
def test_impossible_settings_stop_the_start(flags: list[str], said: str) -> None:
    assert said in the_error_line(ServerProcess("stellarbyte_server", *flags))
