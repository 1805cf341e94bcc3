"""References to adapters: NAME, or NAME@HASH for one version."""

import msgspec
import pytest

from stellarbyte_server.protocol.adapter_reference import AdapterReference

HASH = "0123456789abcdef"


@pytest.mark.parametrize("text", ["a", "a@01234567", "a@", "a@b@c", "", "@", "组织/a"])
def test_a_reference_is_written_as_it_was_read_and_crosses_processes(text: str) -> None:
    reference = AdapterReference.parse(text)
    assert str(reference) == text
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(reference), type=AdapterReference) == reference


@pytest.mark.parametrize(
    ("text", "selects_read", "selects_unread"),
    [
        ("a", True, True),
        (f"a@{HASH}", True, True),
        (f"a@{HASH[:8]}", True, True),
        (f"a@{HASH[:7]}", False, False),  # too short to be sure
        ("a@", False, False),
        ("a@fedcba98", False, True),  # its files may turn out to have that hash
        (f"a@{HASH}0", False, True),
    ],
)
def test_a_pin_selects_the_version_whose_hash_begins_so(text: str, selects_read: bool, selects_unread: bool) -> None:
    reference = AdapterReference.parse(text)
    assert reference.name == "a"
    assert (reference.selects(HASH), reference.selects("")) == (selects_read, selects_unread)
