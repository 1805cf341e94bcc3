"""The record of a name: its versions, the one before, shares."""

import pytest

from stellarbyte_server.registry.record import NameRecord, Version, VersionError, next_number, with_version


def version(number: int, content: str | None = None) -> Version:
    return Version(
        number=number,
        content_hash=(f"{number:x}" * 64 if content is None else content)[:64],
        folder=f"{number:032x}",
        file_hashes=("", ""),
        source=f"v{number}",
        created_at=number,
        created_by="",
    )


def record_of(*numbers: int, history: int = 10) -> NameRecord:
    record = None
    for number in numbers:
        record = with_version(record, version(number), "x", history)
    assert record is not None
    return record


def test_a_history_is_bounded_and_numbers_are_never_used_again() -> None:
    record = record_of(1, 2, 3, 4, history=3)
    assert [each.number for each in record.versions] == [2, 3, 4] and record.current == 4
    assert next_number(record) == 5 and next_number(record.rolled_back(2)) == 5 and next_number(None) == 1


def test_the_version_before_is_that_of_the_current_one() -> None:
    record = record_of(1, 2, 3)
    assert record.before().number == 2
    assert record.rolled_back(2).before().number == 1
    with pytest.raises(VersionError, match="no version before"):
        record.rolled_back(1).before()


def test_a_version_is_found_by_its_number_or_its_hash() -> None:
    record = with_version(record_of(1, 2), version(3, "1" * 64), "x", 10)
    assert record.find("2").number == 2 and record.find("22222222").number == 2
    assert record.find("11111111").number == 3  # the newest with this content
    for text in ("4", "1111111", "99999999", ""):
        with pytest.raises(VersionError, match="no version"):
            record.find(text)


def test_callers_are_shared_between_the_current_version_and_another() -> None:
    record = record_of(1, 2, 3)
    assert record.version_before() == record.version(2) and record.rolled_back(1).version_before() is None
    assert dict(record.shared_with(record.version(1), 0.1).shares) == {1: pytest.approx(0.9), 3: 0.1}
    assert record.shared_with(None, 0.1) == record
    with pytest.raises(VersionError, match="no version '1' in its history"):  # it was the oldest of a full history
        record_of(1, 2, 3, history=2).shared_with(version(1), 0.1)


def test_shares_add_up_to_one_and_a_rollback_or_a_load_ends_them() -> None:
    record = record_of(1, 2).split({"1": 0.25, "22222222": 0.75})
    assert record.shares == ((1, 0.25), (2, 0.75))
    assert [each.number for each in record.live] == [2, 1]
    assert record.hashed_shares() == (("1" * 64, 0.25), ("2" * 64, 0.75))
    assert record.split({}).shares == record.rolled_back(1).shares == ()
    assert with_version(record, version(3), "x", 10).shares == ()
    for shares, said in (
        ({"1": 0.5}, "add up to 1, not 0.5"),
        ({"1": 1.5, "2": -0.5}, "from 0 to 1"),
        ({"1": float("nan"), "2": 1.0}, "from 0 to 1"),
        ({"1": 0.5, "11111111": 0.5}, "twice"),
        ({"7": 1.0}, "no version '7'"),
    ):
        with pytest.raises(VersionError, match=said):
            record.split(shares)


def test_a_bounded_history_keeps_what_is_current_even_after_a_rollback() -> None:
    """A load makes its own version current, so the oldest that go are never the current one."""
    record = with_version(record_of(1, 2, 3, history=3).rolled_back(1), version(4), "x", 3)
    assert [each.number for each in record.versions] == [2, 3, 4] and record.current == 4
