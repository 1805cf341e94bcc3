"""Fine-tuning jobs and their events. Every change of state is one transaction of their index.

A change by a request (cancel, pause, resume) takes effect in the index at once; the runner sees it there.
"""

import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec

from stellarbyte_server.batch.files import DAY_S, NoRoom
from stellarbyte_server.batch.index import Index

KEPT_S = 30 * DAY_S  # of a job without a model, after its end
MAX_UNFINISHED = 32  # jobs of all keys
MAX_MODELS = 100  # of one key
Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Evaluation = Literal["exact_match"]
Level = Literal["info", "warn", "error"]
_UNFINISHED = ("validating_files", "queued", "running", "paused")
TUNING_VERSION = 1
TUNING_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    model TEXT,
    content BLOB NOT NULL
) STRICT;
CREATE INDEX jobs_of_owner ON jobs (owner, number);
CREATE INDEX jobs_by_status ON jobs (status, number);
CREATE INDEX jobs_by_model ON jobs (model) WHERE model IS NOT NULL;
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    content BLOB NOT NULL
) STRICT;
CREATE INDEX events_of_job ON events (job, number);
"""


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str
    param: str | None = None


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter after an epoch that is not the last."""

    id: str
    step: int
    created_at: int


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    """None: chosen when the files have been checked."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """A name under which the adapter is to be live, and what became of it.

    The version that is live there when the job begins is evaluated, too.
    """

    name: str
    share: float | None = None  # of the name's callers; None: all
    caller: str = ""  # the name of the key that asked for it
    version: int | None = None  # of the name, once it is live
    error: str | None = None  # one sentence: why it is not live


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job in its current state. Times are Unix seconds."""

    id: str
    owner: str
    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int
    metadata: dict[str, str] | None
    hyperparameters: Hyperparameters
    status: Status = "validating_files"
    created_at: int
    estimated_finish: int | None = None
    finished_at: int | None = None
    error: JobError | None = None
    steps: int | None = None  # of the whole job
    last_step: int = 0  # with a noted loss
    last_evaluation: int = -1  # the step of it
    tokens: int = 0  # read up to `last_step`
    checkpoints: tuple[Checkpoint, ...] = ()
    evaluate: tuple[Evaluation, ...] = ()
    losses: dict[str, float] = {}  # train, valid, base_valid (without an adapter), previous_valid (see `Publication`)
    exact_match: dict[str, float] = {}  # valid, base_valid, previous_valid: shares of the validation file's answers
    num_lost: int = 0  # processes that ended by themselves
    fine_tuned_model: str | None = None
    publish: Publication | None = None
    goes_live: bool = False  # under the name of `publish`: too late to cancel or pause it
    result_files: tuple[str, ...] = ()

    @property
    def result_checkpoint(self) -> str:
        """The id of the checkpoint that is the result."""
        return f"ftckpt-{self.id.removeprefix('ftjob-')}"

    @property
    def is_over(self) -> bool:
        return self.status not in _UNFINISHED


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """`data` None: a message; else the metrics of a step."""

    message: str
    level: Level = "info"
    data: dict[str, Any] | None = None
    created_at: int = msgspec.field(default_factory=lambda: int(time.time()))


Change = Callable[[Job], Job]


class Jobs:
    """Any thread; every method may block on the disk."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def create(self, job: Job, *, most: int) -> None:
        """Add a job; NoRoom if its owner has `most` unfinished ones, or there are too many jobs or models."""
        unfinished = f"status IN ({', '.join('?' * len(_UNFINISHED))})"
        with self._index.transaction() as database:
            (everyones,) = database.execute(f"SELECT COUNT(*) FROM jobs WHERE {unfinished}", _UNFINISHED).fetchone()
            query = f"SELECT COUNT(*) FROM jobs WHERE owner = ? AND {unfinished}"
            (own,) = database.execute(query, (job.owner, *_UNFINISHED)).fetchone()
            query = "SELECT COUNT(*) FROM jobs WHERE owner = ? AND model IS NOT NULL"
            (models,) = database.execute(query, (job.owner,)).fetchone()
            if own >= most:
                raise NoRoom(f"The limit of {most} unfinished jobs is reached; wait until one has ended, or cancel it.")
            if everyones >= MAX_UNFINISHED:
                raise NoRoom(f"The server's limit of {MAX_UNFINISHED} unfinished jobs is reached; try again later.")
            if models >= MAX_MODELS:
                raise NoRoom(f"The limit of {MAX_MODELS} fine-tuned models is reached; delete one (DELETE /v1/models).")
            database.execute(
                "INSERT INTO jobs (id, owner, status, content) VALUES (?, ?, ?, ?)",
                (job.id, job.owner, job.status, msgspec.json.encode(job)),
            )
            _add_events(database, job.id, [Event(message=f"Created fine-tuning job: {job.id}")])

    def find(self, job_id: str, owner: str | None = None) -> Job | None:
        """A job of an owner; `owner` None: of any owner."""
        with self._index.reading() as database:
            row = database.execute("SELECT owner, content FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None or (owner is not None and row["owner"] != owner) else _job(row)

    def of_model(self, name: str) -> Job | None:
        """The job whose result is this model."""
        with self._index.reading() as database:
            row = database.execute("SELECT content FROM jobs WHERE model = ?", (name,)).fetchone()
        return None if row is None else _job(row)

    def page(
        self, owner: str, *, limit: int, after: str | None, metadata: dict[str, str] | None
    ) -> tuple[list[Job], bool]:
        """Up to `limit` jobs after `after`, newest first, and whether more follow; KeyError if `after` is absent.

        `metadata`: only jobs with these entries; {}: only jobs without metadata.
        """
        found: list[Job] = []
        with self._index.reading() as database:
            number = _number(database, "jobs", "id = ? AND owner = ?", after, owner)
            rows = database.execute(
                "SELECT content FROM jobs WHERE owner = ? AND number < ? ORDER BY number DESC", (owner, number)
            )
            for row in rows:
                job = _job(row)
                if metadata is None or (
                    metadata.items() <= (job.metadata or {}).items() if metadata else not job.metadata
                ):
                    found.append(job)
                if len(found) > limit:
                    break
        return found[:limit], len(found) > limit

    def with_status(self, *statuses: Status) -> list[Job]:
        """All jobs in these states, the oldest first."""
        query = f"SELECT content FROM jobs WHERE status IN ({', '.join('?' * len(statuses))}) ORDER BY number"
        with self._index.reading() as database:
            return [_job(row) for row in database.execute(query, statuses).fetchall()]

    def with_models(self) -> list[Job]:
        with self._index.reading() as database:
            query = "SELECT content FROM jobs WHERE model IS NOT NULL ORDER BY number"
            return [_job(row) for row in database.execute(query).fetchall()]

    def tokens_per_s(self, model: str) -> float | None:
        """The speed of the newest job of a model that has succeeded; None if there is none, or it was too short."""
        with self._index.reading() as database:
            rows = database.execute("SELECT content FROM jobs WHERE status = 'succeeded' ORDER BY number DESC")
            last = next((job for job in map(_job, rows) if job.model == model), None)
        if last is None:
            return None
        steps = [
            (event.created_at, event.data["tokens"])
            for _, event in self.events_since(last.id, None, -1)
            if event.data is not None and "tokens" in event.data
        ]
        seconds = steps[-1][0] - steps[0][0] if steps else 0
        return None if seconds == 0 else float(steps[-1][1] - steps[0][1]) / seconds

    def change(self, job_id: str, change: Change, events: Iterable[Event] = ()) -> Job | None:
        """Replace a job with the result of `change`, and return it; None if the job does not exist.

        If `change` alters the job, the events are added to it.
        """
        with self._index.transaction() as database:
            row = database.execute("SELECT content FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None:
                return None
            before = _job(row)
            after = change(before)
            if after != before:
                database.execute(
                    "UPDATE jobs SET status = ?, model = ?, content = ? WHERE id = ?",
                    (after.status, after.fine_tuned_model, msgspec.json.encode(after), job_id),
                )
                _add_events(database, job_id, events)
        return after

    def note(self, job_id: str, event: Event) -> None:
        """Add an event to a job."""
        with self._index.transaction() as database:
            _add_events(database, job_id, [event])

    def events(self, job_id: str, *, limit: int, after: str | None) -> tuple[list[tuple[str, Event]], bool]:
        """Up to `limit` events with their ids, newest first, and whether more follow; KeyError."""
        with self._index.reading() as database:
            number = _event_number(database, job_id, after, 2**62)
            rows = database.execute(
                "SELECT number, content FROM events WHERE job = ? AND number < ? ORDER BY number DESC LIMIT ?",
                (job_id, number, limit + 1),
            ).fetchall()
        return [_event(row) for row in rows[:limit]], len(rows) > limit

    def events_since(self, job_id: str, after: str | None, limit: int) -> list[tuple[str, Event]]:
        """Up to `limit` events after `after`, the oldest first; KeyError."""
        with self._index.reading() as database:
            number = _event_number(database, job_id, after, 0)
            rows = database.execute(
                "SELECT number, content FROM events WHERE job = ? AND number > ? ORDER BY number LIMIT ?",
                (job_id, number, limit),
            ).fetchall()
        return [_event(row) for row in rows]

    def forget_old(self) -> None:
        """Delete jobs without a model that ended long ago."""
        for job in self.with_status("failed", "cancelled", "succeeded"):
            if job.fine_tuned_model is None and job.finished_at is not None and job.finished_at + KEPT_S < time.time():
                with self._index.transaction() as database:
                    database.execute("DELETE FROM events WHERE job = ?", (job.id,))
                    database.execute("DELETE FROM jobs WHERE id = ?", (job.id,))


def new_job_id() -> str:
    return f"ftjob-{secrets.token_hex(12)}"


def _job(row: Any) -> Job:
    return msgspec.json.decode(row["content"], type=Job)


def _event(row: Any) -> tuple[str, Event]:
    return f"ftevent-{row['number']}", msgspec.json.decode(row["content"], type=Event)


def _event_number(database: Any, job_id: str, after: str | None, otherwise: int) -> int:
    if after is None:
        return otherwise
    text = after.removeprefix("ftevent-")
    if not text.isdecimal() or len(text) > 18:
        raise KeyError(after)
    row = database.execute("SELECT number FROM events WHERE job = ? AND number = ?", (job_id, int(text))).fetchone()
    if row is None:
        raise KeyError(after)
    return int(row["number"])


def _number(database: Any, table: str, where: str, after: str | None, owner: str) -> int:
    if after is None:
        return 2**62
    row = database.execute(f"SELECT number FROM {table} WHERE {where}", (after, owner)).fetchone()
    if row is None:
        raise KeyError(after)
    return int(row["number"])


def _add_events(database: Any, job_id: str, events: Iterable[Event]) -> None:
    rows = [(job_id, msgspec.json.encode(event)) for event in events]
    database.executemany("INSERT INTO events (job, content) VALUES (?, ?)", rows)
