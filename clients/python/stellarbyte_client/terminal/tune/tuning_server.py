"""The server's files, fine-tuning jobs and ratings, by OpenAI's client; every failure is one sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai

from stellarbyte_client.address import DEFAULT_TIMEOUT_S, GENERATION_TIMEOUT_S
from stellarbyte_client.client import StellarByte
from stellarbyte_client.errors import server_error, timed_out, unreachable
from stellarbyte_client.terminal.connection import CommandFailed, server_problem

ENDED = ("succeeded", "failed", "cancelled")
_PAGE = 100


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of the validation file with the new model, without it, and with the version that was live before."""

    valid: float | None = None
    base_valid: float | None = None
    previous_valid: float | None = None


class Losses(Compared, frozen=True, kw_only=True):
    train: float | None = None


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """Of a job's result under another name; `version` once it is live there."""

    name: str
    share: float | None = None
    version: int | None = None
    error: str | None = None


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    message: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    status: str
    model: str
    created_at: int
    training_file: str
    validation_file: str | None = None
    result_files: list[str] = []
    fine_tuned_model: str | None = None
    user_provided_suffix: str | None = None
    estimated_finish: int | None = None
    error: JobError | None = None
    losses: Losses = Losses()
    exact_match: Compared | None = None
    publish: Publication | None = None

    @property
    def is_over(self) -> bool:
        return self.status in ENDED

    @property
    def inputs(self) -> set[str]:
        return {self.training_file} if self.validation_file is None else {self.training_file, self.validation_file}


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """`data` of a step: step, total_steps and its losses."""

    id: str
    message: str
    level: str = "info"
    data: dict[str, float] | None = None


class FileProblem(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    param: str | None = None
    line: int | None = None


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """What a job with these files would do; numbers are None as far as they are not known."""

    examples: int
    problems: list[FileProblem]
    validation_examples: int | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None


class RatedChoice(msgspec.Struct, frozen=True, kw_only=True):
    message: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: str | None = None


class Rated(msgspec.Struct, frozen=True, kw_only=True):
    """A rating with the request and the answer that it is about."""

    id: str
    rating: str
    choice: RatedChoice
    answer: str | None = None  # a better one
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str | None = None


class TuningServer:
    """Calls of one server; each raises StellarByteError on failure."""

    def __init__(self, client: StellarByte) -> None:
        self._client = client
        self._openai = client.openai()

    def upload(self, path: Path) -> str:
        """The id of the file. CommandFailed if it cannot be read."""
        try:
            with path.open("rb") as file, self._failures_told():
                return self._openai.files.create(file=(path.name, file), purpose="fine-tune").id
        except OSError as error:
            raise CommandFailed(f"{path} cannot be read: {error.strerror}.") from None

    def delete_file(self, file_id: str) -> None:
        with self._failures_told():
            self._openai.files.delete(file_id)

    def check(self, body: dict[str, Any]) -> Check:
        """May take minutes: the server counts tokens in idle time only."""
        checked = self._post("/fine_tuning/files/check", body, timeout_s=GENERATION_TIMEOUT_S)
        return msgspec.convert(checked, Check)

    def start(self, body: dict[str, Any]) -> Job:
        return msgspec.convert(self._post("/fine_tuning/jobs", body), Job)

    def job(self, job_id: str) -> Job:
        return msgspec.convert(self._get(f"/fine_tuning/jobs/{job_id}"), Job)

    def jobs(self) -> list[Job]:
        """The newest ones."""
        return msgspec.convert(self._get("/fine_tuning/jobs", limit=_PAGE)["data"], list[Job])

    def cancel(self, job_id: str) -> Job:
        return msgspec.convert(self._post(f"/fine_tuning/jobs/{job_id}/cancel", {}), Job)

    def resume(self, job_id: str) -> Job:
        return msgspec.convert(self._post(f"/fine_tuning/jobs/{job_id}/resume", {}), Job)

    def delete_remains(self, job: Job) -> tuple[str | None, int]:
        """Delete the model and the files of a job that is over; files that an unfinished job reads stay.

        Returns the model's name, None if there is none, and the number of deleted files.
        """
        purposes = ("fine-tune", "fine-tune-results")
        stored = {file["id"] for purpose in purposes for file in self._get("/files", purpose=purpose)["data"]}
        being_read = {file_id for other in self.jobs() if not other.is_over for file_id in other.inputs}
        model = job.fine_tuned_model if job.status == "succeeded" else None
        if model is not None:
            with self._failures_told():
                self._openai.models.delete(model)
        own = (job.inputs | set(job.result_files)) & stored - being_read
        for file_id in own:
            self.delete_file(file_id)
        return model, len(own)

    def events_since(self, job_id: str, last: str | None) -> list[JobEvent]:
        """Events after `last`, the oldest first."""
        found: list[JobEvent] = []
        path, after = f"/fine_tuning/jobs/{job_id}/events", None
        while True:
            page = self._get(path, limit=_PAGE, after=after)
            events = msgspec.convert(page["data"], list[JobEvent])  # newest first
            for event in events:
                if event.id == last:
                    return found[::-1]
                found.append(event)
            if not page["has_more"]:
                return found[::-1]
            after = found[-1].id

    def ratings(self) -> Iterator[Rated]:
        """All ratings, the newest first; the server wants its admin key."""
        after = None
        while True:
            page = self._get("/feedback", is_admin=True, limit=_PAGE, after=after)
            yield from msgspec.convert(page["data"], list[Rated])
            if not page["has_more"]:
                return
            after = page["last_id"]

    def _get(self, path: str, *, is_admin: bool = False, **query: Any) -> Any:
        given = {name: value for name, value in query.items() if value is not None}
        with self._failures_told(is_admin=is_admin):
            return self._openai.get(path, cast_to=object, options={"params": given})

    def _post(self, path: str, body: dict[str, Any], timeout_s: float = DEFAULT_TIMEOUT_S) -> Any:
        with self._failures_told():
            return self._openai.post(path, cast_to=object, body=body, options={"timeout": timeout_s})

    @contextlib.contextmanager
    def _failures_told(self, *, is_admin: bool = False) -> Iterator[None]:
        try:
            yield
        except openai.APIStatusError as error:
            refused = server_error(error.response)
            problem = server_problem(refused.status, refused.message, refused.retry_after_s, is_admin=is_admin)
            raise CommandFailed(problem) from None
        except openai.APITimeoutError:
            raise timed_out(self._client.base_url) from None
        except openai.APIConnectionError as error:
            raise unreachable(self._client.base_url, error.__cause__ or error) from None
