"""What a key adds to requests and takes from them, whatever the caller wrote."""

from types import SimpleNamespace
from typing import Any

from server.api.caller import with_key
from server.keys import Key
from tests.engine import make_request


def http_with(key: Key | None) -> Any:
    return SimpleNamespace(scope={"state": {} if key is None else {"key": key}})


def make_key(name: str, **fields: Any) -> Key:
    return Key(name=name, digest=name, **fields)


def salt(key: Key | None, given: str = "") -> str:
    (request,) = with_key(http_with(key), [make_request([1], cache_salt=given)])
    return request.cache_salt


def test_no_name_share_or_salt_makes_the_prefix_cache_of_one_key_that_of_another() -> None:
    names = ["a", "b", "team", "share", "key"]
    owners = [None, *map(make_key, names), *(make_key(f"of-{share}", share=share) for share in names)]
    salts = ["", "a", "team", "key", '"', '", "', *(salt(owner) for owner in owners)]
    salts += [salt(owner, given) for owner in owners for given in salts]
    seen = {salt(owner, given) for owner in owners for given in salts}
    assert len(seen) == len(owners) * len(set(salts))


def test_keys_share_the_prefix_cache_if_they_say_so_and_send_the_same_salt() -> None:
    first, second = make_key("a", share="team"), make_key("b", share="team")
    for given in ("", "x"):
        assert salt(first, given) == salt(second, given)
    assert salt(first, "x") != salt(second, "y")
