"""The store of answers and ratings: how much it keeps, for how long, and what is left of it after a crash."""

import stat
import time
from pathlib import Path

import pytest

from stellarbyte_server.batch.files import NoRoom
from stellarbyte_server.feedback import store as store_module
from stellarbyte_server.feedback.store import (
    FEEDBACK_FILE,
    KEPT_S,
    MAX_ANSWER_BYTES,
    Answered,
    Choice,
    Feedback,
    FeedbackStore,
    NoSuchAnswer,
    NoSuchChoice,
)


def answered(text: str = "two", *, question: str = "1 + 1?") -> Answered:
    choice = Choice(message={"role": "assistant", "content": text}, finish_reason="stop")
    return Answered(model="m", adapter=None, messages=[{"role": "user", "content": question}], choices=[choice])


def rate(store: FeedbackStore, request: str, owner: str = "ann", **fields: object) -> Feedback:
    given = {"index": 0, "rating": "bad", "answer": None, "comment": None} | fields
    return store.rate(owner, request, answer_id=f"chatcmpl-{request}", created_by=owner, **given)  # type: ignore[arg-type]


def is_kept(store: FeedbackStore, request: str, owner: str = "ann") -> bool:
    try:
        rate(store, request, owner)
    except NoSuchAnswer:
        return False
    return True


def open_store(folder: Path, max_bytes: int = 10**6) -> FeedbackStore:
    return FeedbackStore.open(str(folder), max_bytes)


def test_a_rating_has_the_request_and_the_answer_and_only_its_owner_can_give_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.keep("r1", "ann", answered())
    with pytest.raises(NoSuchAnswer):
        rate(store, "r1", "bob")
    with pytest.raises(NoSuchChoice, match="1"):
        rate(store, "r1", index=1)
    given = rate(store, "r1", answer="2", comment="digits")
    assert (given.messages, given.choice) == (answered().messages, answered().choices[0])
    assert (given.rating, given.answer, given.comment, given.created_by) == ("bad", "2", "digits", "ann")
    assert store.page(limit=9, after=None, rating=None) == ([given], False)


def test_a_second_rating_takes_the_place_of_the_first(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.keep("r1", "ann", answered())
    rate(store, "r1")
    last = rate(store, "r1", rating="good")
    assert store.page(limit=9, after=None, rating=None) == ([last], False)


def test_pages_go_from_the_newest_to_the_oldest_of_a_rating(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    given = []
    for number in range(5):
        store.keep(f"r{number}", "ann", answered())
        given.insert(0, rate(store, f"r{number}", rating="good" if number % 2 else "bad"))
    assert store.page(limit=2, after=None, rating=None) == (given[:2], True)
    assert store.page(limit=3, after=given[1].id, rating=None) == (given[2:], False)
    assert store.page(limit=9, after=None, rating="good") == ([given[1], given[3]], False)
    with pytest.raises(KeyError):
        store.page(limit=9, after="feedback-none", rating=None)


def test_answers_are_forgotten_after_a_day_and_ratings_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.keep("old", "ann", answered(question="a secret of yesterday"))
    store.keep("rated", "ann", answered())
    given = rate(store, "rated")
    now = time.time()
    monkeypatch.setattr(store_module.time, "time", lambda: now + KEPT_S + 1)
    assert not is_kept(store, "old") and not is_kept(store, "rated")
    store.forget_old()
    assert store.page(limit=9, after=None, rating=None) == ([given], False)
    store.close()
    assert b"a secret of yesterday" not in (tmp_path / FEEDBACK_FILE).read_bytes()
    assert b"1 + 1?" in (tmp_path / FEEDBACK_FILE).read_bytes()


def test_the_oldest_answers_of_a_key_make_room_for_its_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_ANSWERS", 3)
    store = open_store(tmp_path)
    for owner, numbers in (("bob", range(1)), ("ann", range(1, 6))):
        for number in numbers:
            store.keep(f"r{number}", owner, answered())
    assert [is_kept(store, f"r{number}") for number in range(1, 6)] == [False, False, True, True, True]
    assert is_kept(store, "r0", "bob")
    size = len(store_module.msgspec.json.encode(answered("x" * 1000)))
    monkeypatch.setattr(store_module, "MAX_ANSWERS_BYTES", 2 * size + 5)
    for number in range(3):
        store.keep(f"long{number}", "ann", answered("x" * 1000))
    assert [is_kept(store, f"long{number}") for number in range(3)] == [False, True, True]


def test_an_answer_that_is_too_long_is_not_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.keep("long", "ann", answered("x" * MAX_ANSWER_BYTES))
    assert not is_kept(store, "long")


def test_the_ratings_of_a_key_have_a_limit(tmp_path: Path) -> None:
    store = open_store(tmp_path, max_bytes=1000)
    for number in range(9):
        for owner in ("ann", "bob"):
            store.keep(f"{owner}{number}", owner, answered())
    with pytest.raises(NoRoom, match="at most 1000 are allowed"):
        for number in range(9):
            rate(store, f"ann{number}")
    given, _ = store.page(limit=99, after=None, rating=None)
    assert 1 <= len(given) < 9
    assert rate(store, "bob0", "bob").rating == "bad"
    with pytest.raises(NoRoom):  # and the earlier rating stays
        rate(store, "ann0", answer="x" * 1000)
    assert given[-1] in store.page(limit=99, after=None, rating=None)[0]
    assert store.remove(given[0].id) and not store.remove(given[0].id)
    assert not is_kept(store, f"ann{len(given) - 1}")  # the answer has gone with its rating


def test_a_torn_end_of_the_file_loses_only_what_was_being_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    store = open_store(tmp_path / "a")
    for number in range(2):
        store.keep(f"r{number}", "ann", answered())
    first = rate(store, "r0")
    log = tmp_path / "a" / f"{FEEDBACK_FILE}-wal"
    whole = log.stat().st_size
    rate(store, "r1", comment="torn")
    copy = tmp_path / "b"  # as a crash in the middle of the last write would leave the folder
    copy.mkdir()
    (copy / FEEDBACK_FILE).write_bytes((tmp_path / "a" / FEEDBACK_FILE).read_bytes())
    content = log.read_bytes()
    assert len(content) > whole
    (copy / log.name).write_bytes(content[: whole + (len(content) - whole) // 2])
    again = open_store(copy)
    assert again.page(limit=9, after=None, rating=None) == ([first], False)
    assert is_kept(again, "r1")


def test_only_the_server_can_read_the_file_and_it_is_no_link(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.keep("r1", "ann", answered())
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    store.close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FEEDBACK_FILE).symlink_to(tmp_path / FEEDBACK_FILE)
    with pytest.raises(OSError):
        open_store(tmp_path / "other")
