"""Results of jobs that go live under a name, and are compared with what was live there; a full disk on the way."""

import errno
import json
import os
from pathlib import Path

import msgspec
import pytest

from stellarbyte_server.tuning import examples as examples_module
from stellarbyte_server.tuning import runner as runner_module
from stellarbyte_server.tuning import store as store_module
from stellarbyte_server.tuning.jobs import Publication, Status
from stellarbyte_server.tuning.runner import CannotLoad, EngineAway
from tests.support.tuning.chats import chats
from tests.support.tuning.place import Place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(runner_module, "LOOK_S", 0.01)
    monkeypatch.setattr(runner_module, "_RETRY_S", 0.01)
    return Place(tmp_path)


def test_a_result_is_live_before_its_job_has_succeeded(place: Place) -> None:
    asked = Publication(name="pirate", share=0.1, caller="admin")
    place.when_published = lambda job_id: seen.append((place.find(job_id).status, place.find(job_id).goes_live))
    seen: list[tuple[Status, bool]] = []
    (job,) = place.run_to_end(place.job(publish=asked))
    assert seen == [("running", True)]
    assert job.status == "succeeded" and not job.goes_live
    assert job.publish == msgspec.structs.replace(asked, version=1)
    assert place.published == [(job.id, "pirate", str(place.store.adapter(job.id)))]
    assert place.messages(job.id)[-2:] == ["Live as pirate, version 1, with a share of 0.1", "The job has completed"]


def test_a_result_that_fails_its_probe_stays_under_its_own_name(place: Place) -> None:
    place.publish_error = CannotLoad("It changes no logit.")
    (job,) = place.run_to_end(place.job(publish=Publication(name="pirate")))
    assert job.status == "succeeded" and job.fine_tuned_model in place.loaded
    assert job.publish == Publication(name="pirate", error="It changes no logit.")
    assert "Not live as pirate: It changes no logit." in place.messages(job.id)


def test_a_result_goes_live_once_the_engine_is_back(place: Place) -> None:
    job_id = place.job(publish=Publication(name="pirate"))
    place.publish_error = EngineAway()

    async def act() -> None:
        await place.until(lambda: place.find(job_id).goes_live)
        place.publish_error = None
        await place.until(lambda: place.find(job_id).is_over)

    place.run(act)
    assert place.find(job_id).publish == Publication(name="pirate", version=1) and len(place.starts()) == 1


def test_a_result_is_compared_with_the_version_that_was_live_when_its_job_began(place: Place) -> None:
    for number, loss in enumerate((2.5, 3.5)):
        folder = place.folder / f"version-{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(str(loss))
    place.live = place.folder / "version-0", 3
    place.script(steps=30, pause_s=0.02)
    job_id = place.job(validation=chats(2), publish=Publication(name="pirate"), evaluate=("exact_match",))
    place.run(lambda: place.until(lambda: place.find(job_id).last_step > 2))
    place.live = place.folder / "version-1", 4  # loaded while the job trains, and the server starts again
    (job,) = place.run_to_end(job_id)
    assert len(place.starts()) == 2 and job.status == "succeeded"
    assert job.losses["previous_valid"] == 2.5
    assert job.exact_match == {"valid": 0.75, "base_valid": 0.25}
    messages = place.messages(job_id)
    assert messages.count("Compares with pirate, version 3") == 1 and "Mind this." in messages
    assert (
        "Compared on the validation file: exact match=0.7500, base exact match=0.2500, previous loss=2.5000" in messages
    )
    assert place.left(job_id) == ["adapter", "step-3"]


@pytest.mark.parametrize("live", [None, (Path("/absent"), 2)])
def test_without_a_version_before_nothing_is_compared(place: Place, live: tuple[Path, int] | None) -> None:
    place.live = live
    (job,) = place.run_to_end(place.job(validation=chats(2), publish=Publication(name="pirate")))
    assert job.status == "succeeded" and "previous_valid" not in job.losses
    assert json.loads((place.folder / "settings.json").read_text())["previous"] is None


def test_a_job_that_was_cancelled_does_not_go_live(place: Place) -> None:
    place.when_loaded = lambda _: place.set(job_id, "cancelled")
    job_id = place.job(publish=Publication(name="pirate"))
    place.run(lambda: place.until(lambda: place.find(job_id).is_over and place.loaded == {}))
    assert place.published == [] and place.find(job_id).status == "cancelled"


@pytest.mark.parametrize("when", ["checked", "published"])
def test_a_full_disk_of_the_server_ends_the_job(place: Place, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """While the examples are stored, or the version that the result is compared with."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place.live = place.folder, 1
    if when == "checked":
        monkeypatch.setattr(examples_module, "write_all", full)
    else:
        monkeypatch.setattr(store_module.shutil, "copyfile", full)
    (job,) = place.run_to_end(place.job(validation=chats(2), publish=Publication(name="pirate")))
    assert job.status == "failed" and job.error is not None and "No space left on device" in job.error.message
    assert job.error.code == {"checked": "storage_unavailable", "published": "server_error"}[when]
    assert place.starts() == [] and place.left(job.id) == []
