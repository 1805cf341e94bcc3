"""Recent answers and their ratings: feedback.sqlite3 in --data-dir, which all HTTP processes of a server open.

An answer is kept for a day, and only the last ones of a key; a rating copies it and stays until it is deleted. What is
deleted is overwritten in the file.
"""

import contextlib
import os
import secrets
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from stellarbyte_server.batch.files import DAY_S, NoRoom
from stellarbyte_server.batch.index import Index

FEEDBACK_FILE = "feedback.sqlite3"
KEPT_S = DAY_S  # of an answer
MAX_ANSWERS = 1000  # kept of one key, and their bytes
MAX_ANSWERS_BYTES = 32 * 2**20
MAX_ANSWER_BYTES = 2**18  # of one answer with its request; larger ones are not kept
DEFAULT_FEEDBACK_BYTES = 64 * 2**20  # of one key
_VERSION = 1
_SCHEMA = """
CREATE TABLE answers (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    request TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    kept_at INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    content BLOB NOT NULL
) STRICT;
CREATE INDEX answers_of_owner ON answers (owner, number, bytes);
CREATE INDEX answers_by_age ON answers (kept_at);
CREATE TABLE ratings (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    request TEXT NOT NULL,
    choice INTEGER NOT NULL,
    rating TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    content BLOB NOT NULL,
    UNIQUE (request, choice)
) STRICT;
CREATE INDEX ratings_of_owner ON ratings (owner, bytes);
"""

Rating = Literal["good", "bad"]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the answers to a request."""

    message: dict[str, Any] | None = None  # of a chat
    text: str | None = None  # of a completion
    finish_reason: str | None


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """A request and its answers. It has messages, or a prompt for each answer."""

    model: str  # as the request named it
    adapter: str | None  # NAME@HASH of the version that answered
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    prompts: list[str] | None = None
    choices: list[Choice]


class Feedback(msgspec.Struct, frozen=True, kw_only=True):
    """A rating with the request and the answer that it is about. `created_at`: Unix seconds."""

    id: str
    created_at: int
    created_by: str | None  # the name of a key; None: none was needed
    answer_id: str
    index: int  # of the choice
    rating: Rating
    answer: str | None  # a better one
    comment: str | None
    model: str
    adapter: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    prompt: str | None
    choice: Choice


class NoSuchAnswer(LookupError):
    """The owner has no such answer, or it is no longer kept."""


class NoSuchChoice(LookupError):
    """The answer has fewer choices; `args[0]` is their number."""


@dataclass(frozen=True)
class FeedbackStore:
    """Any thread; every method may block on the disk."""

    max_bytes: int  # of the ratings of one key
    answers: Index
    ratings: Index  # the same file: a rating is durable at once, an answer need not be

    @classmethod
    def open(cls, data_dir: str, max_bytes: int) -> "FeedbackStore":
        """Open the file in a folder that this server holds; OSError or ValueError if it cannot be used."""
        path = Path(data_dir).absolute() / FEEDBACK_FILE
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            answers, ratings = Index(path, _SCHEMA, _VERSION), Index(path, _SCHEMA, _VERSION)
            for index in (answers, ratings):
                with index.reading() as database:
                    database.execute("PRAGMA secure_delete = ON")
            with answers.reading() as database:
                database.execute("PRAGMA synchronous = NORMAL")
            ratings.prepare()
        except (sqlite3.Error, ValueError) as error:
            raise ValueError(f"cannot use {path}: {error}") from None
        store = cls(max_bytes, answers, ratings)
        store.forget_old()
        return store

    def keep(self, request: str, owner: str, answered: Answered) -> None:
        """Keep the answers to a request, unless they are too long; the owner's oldest make room."""
        content = msgspec.json.encode(answered)
        if len(content) > MAX_ANSWER_BYTES:
            return
        with self.answers.transaction() as database:
            database.execute(
                "INSERT INTO answers (request, owner, kept_at, bytes, content) VALUES (?, ?, ?, ?, ?)",
                (request, owner, int(time.time()), len(content), content),
            )
            number, num_bytes = database.execute(
                "SELECT COUNT(*), SUM(bytes) FROM answers WHERE owner = ?", (owner,)
            ).fetchone()
            while number > MAX_ANSWERS or num_bytes > MAX_ANSWERS_BYTES:
                query = "DELETE FROM answers WHERE number = (SELECT MIN(number) FROM answers WHERE owner = ?)"
                (freed,) = database.execute(f"{query} RETURNING bytes", (owner,)).fetchone()
                number, num_bytes = number - 1, num_bytes - freed

    def rate(
        self,
        owner: str,
        request: str,
        *,
        answer_id: str,
        index: int,
        rating: Rating,
        answer: str | None,
        comment: str | None,
        created_by: str | None,
    ) -> Feedback:
        """Store a rating of an owner's answer, in place of an earlier one.

        Raises:
            NoSuchAnswer, NoSuchChoice
            NoRoom: the owner's ratings would have too many bytes.
        """
        with self.ratings.transaction() as database:
            query = "SELECT content FROM answers WHERE request = ? AND owner = ? AND kept_at > ?"
            row = database.execute(query, (request, owner, int(time.time()) - KEPT_S)).fetchone()
            if row is None:
                raise NoSuchAnswer(answer_id)
            answered = msgspec.json.decode(row["content"], type=Answered)
            if index >= len(answered.choices):
                raise NoSuchChoice(len(answered.choices))
            feedback = Feedback(
                id=f"feedback-{secrets.token_hex(12)}",
                created_at=int(time.time()),
                created_by=created_by,
                answer_id=answer_id,
                index=index,
                rating=rating,
                answer=answer,
                comment=comment,
                model=answered.model,
                adapter=answered.adapter,
                messages=answered.messages,
                tools=answered.tools,
                prompt=None if answered.prompts is None else answered.prompts[index],
                choice=answered.choices[index],
            )
            content = msgspec.json.encode(feedback)
            database.execute("DELETE FROM ratings WHERE request = ? AND choice = ?", (request, index))
            query = "SELECT COALESCE(SUM(bytes), 0) FROM ratings WHERE owner = ?"
            (num_bytes,) = database.execute(query, (owner,)).fetchone()
            if num_bytes + len(content) > self.max_bytes:
                raise NoRoom(
                    f"The ratings of this key would have {num_bytes + len(content)} bytes; at most {self.max_bytes} are"
                    " allowed. The operator can delete some."
                )
            database.execute(
                "INSERT INTO ratings (id, owner, request, choice, rating, bytes, content) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (feedback.id, owner, request, index, rating, len(content), content),
            )
        return feedback

    def page(self, *, limit: int, after: str | None, rating: Rating | None) -> tuple[list[Feedback], bool]:
        """Up to `limit` ratings after `after`, newest first, and whether more follow; KeyError if `after` is absent."""
        where = "number < ?"
        values: list[int | str] = [2**62]
        with self.ratings.reading() as database:
            if after is not None:
                row = database.execute("SELECT number FROM ratings WHERE id = ?", (after,)).fetchone()
                if row is None:
                    raise KeyError(after)
                values = [row["number"]]
            if rating is not None:
                where, values = f"{where} AND rating = ?", [*values, rating]
            query = f"SELECT content FROM ratings WHERE {where} ORDER BY number DESC LIMIT ?"
            rows = database.execute(query, [*values, limit + 1]).fetchall()
        return [msgspec.json.decode(row["content"], type=Feedback) for row in rows[:limit]], len(rows) > limit

    def remove(self, feedback_id: str) -> bool:
        """Whether there was such a rating. The answer that it is about goes, too."""
        with self.ratings.transaction() as database:
            query = "DELETE FROM ratings WHERE id = ? RETURNING request"
            row = database.execute(query, (feedback_id,)).fetchone()
            if row is not None:
                database.execute("DELETE FROM answers WHERE request = ?", (row["request"],))
        return row is not None

    def forget_old(self) -> None:
        """Delete answers that are kept no longer."""
        with self.answers.transaction() as database:
            database.execute("DELETE FROM answers WHERE kept_at <= ?", (int(time.time()) - KEPT_S,))

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # so that nothing deleted is left in the write-ahead log
            with self.ratings.reading() as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.answers.close()
        self.ratings.close()
