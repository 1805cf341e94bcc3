"""Which server and model a command means."""

import pytest

from stellarbyte.cli.arguments.parser import make_parser
from stellarbyte_client import Model
from stellarbyte_client.terminal.connection import CommandFailed, Connection, check_model, default_model


def model(name: str, parent: str | None) -> Model:
    return Model(
        id=name, created=0, owned_by="", root=name, parent=parent, max_model_len=9, content_hash=None
    )  # fmt: skip


BASE, FIRST, SECOND = model("base", None), model("first", "base"), model("second", "base")


def test_the_served_model_answers_unless_a_key_may_use_adapters_only() -> None:
    assert default_model([FIRST, BASE, SECOND]) is BASE
    assert default_model([FIRST, SECOND]) is FIRST


def test_models_are_named_as_requests_name_them() -> None:
    for name in ("base", "first", "first@0123"):
        check_model(name, [BASE, FIRST])
    with pytest.raises(CommandFailed, match=r"no model or adapter 'second@0123'; it has base, first\."):
        check_model("second@0123", [BASE, FIRST])


@pytest.mark.parametrize("url", ["http://x:1", "http://x:1/", "http://x:1/v1", "http://x:1/v1/"])
def test_an_address_may_be_that_of_the_openai_package(url: str) -> None:
    assert Connection(url=url, api_key="secret").base_url == "http://x:1"


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(Connection(url="http://x", api_key="secret", admin_api_key="secret"))


def test_of_the_keys_that_a_server_takes_from_the_variable_the_first_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, used in (("one two", "one"), (" one\n", "one"), (" ", None), ("", None)):
        monkeypatch.setenv("STELLARBYTE_API_KEY", value)
        assert make_parser().parse_args(["chat"]).api_key == used
