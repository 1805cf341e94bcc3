"""DELETE /v1/models/{name}, around an engine that refuses to unload."""

import asyncio
import time
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.routes.tuning import jobs
from stellarbyte_server.api.routes.tuning.jobs import delete_model
from stellarbyte_server.client.engine_client import EngineDead
from stellarbyte_server.protocol.request import ADAPTER_LOADING, ADAPTER_NOT_FOUND, RequestRejected
from stellarbyte_server.tuning.jobs import Hyperparameters, Job, new_job_id
from stellarbyte_server.tuning.store import TuningStore

NAME = "ft:tiny:x:01234567"


def store_with_model(folder: Path) -> TuningStore:
    store = TuningStore.open(str(folder))
    job = Job(
        id=new_job_id(),
        owner="",
        model="tiny",
        training_file="file-1",
        validation_file=None,
        suffix="x",
        seed=1,
        metadata=None,
        hyperparameters=Hyperparameters(),
        created_at=int(time.time()),
    )
    store.jobs.create(job, most=1)
    store.jobs.change(job.id, lambda now: msgspec.structs.replace(now, fine_tuned_model=NAME))
    return store


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 200),
        (RequestRejected("It is not there.", ADAPTER_NOT_FOUND), 200),
        (RequestRejected("It is being loaded.", ADAPTER_LOADING), 409),
        (EngineDead("The engine process ended."), 503),
    ],
)
def test_a_model_that_is_still_loaded_stays(
    tmp_path: Path, error: Exception | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with_model(tmp_path)

    class Versions:
        def __init__(self, *_: Any) -> None:
            pass

        async def unload(self, name: str, caller: str) -> Awaitable[None]:
            assert (name, caller) == (NAME, "")
            if error is not None:
                raise error
            return asyncio.sleep(0)

    monkeypatch.setattr(jobs, "AdapterVersions", Versions)
    (tmp_path / "locks").mkdir()
    http: Any = SimpleNamespace(scope={"state": {}})
    service: Any = SimpleNamespace(tuning=store, registry=SimpleNamespace(locks=tmp_path / "locks"))
    if status == 200:
        assert asyncio.run(delete_model(NAME, http, service))["deleted"]
    else:
        with pytest.raises(ApiError) as refused:
            asyncio.run(delete_model(NAME, http, service))
        assert refused.value.status == status
    assert (store.jobs.of_model(NAME) is None) == (status == 200)
    store.close()
