"""What a key adds to requests and takes from them, whatever the caller wrote."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from stellarbyte_server.access.keys import Key, keys_of_flags, parse_keys
from stellarbyte_server.api.caller import require_permitted, with_key
from stellarbyte_server.api.contract.bodies.body import Body, parse_body
from stellarbyte_server.api.contract.bodies.chat import ChatBody
from stellarbyte_server.api.contract.bodies.completion import CompletionBody
from stellarbyte_server.api.contract.bodies.responses.body import ResponsesBody
from stellarbyte_server.api.contract.errors import ApiError
from stellarbyte_server.api.generation import Bounds
from stellarbyte_server.api.routes.embeddings import EmbeddingsBody
from stellarbyte_server.config.command_line import parse_settings
from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.config.settings import EngineSettings, ServerSettings
from stellarbyte_server.protocol.messages import KeyLimits
from tests.support.engines.engine import make_request


def http_with(key: Key | None) -> Any:
    return SimpleNamespace(scope={"state": {} if key is None else {"key": key}})


def make_key(name: str, **fields: Any) -> Key:
    return Key(name=name, digest=name, limits=KeyLimits(key_name=name), **fields)


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


def caller(key: Key | None, user: str, request_id: str = "1", **fields: Any) -> str:
    http = http_with(key)
    http.scope["state"]["record"] = SimpleNamespace(request_id=request_id)
    (request,) = with_key(http, [make_request([1], caller=user, **({"adapter": "x"} | fields))])
    return request.caller


def test_a_caller_is_the_user_else_the_key_else_the_request() -> None:
    a, b = make_key("a"), make_key("b")
    assert caller(a, "ann") == caller(b, "ann", "2") == caller(None, "ann") != caller(a, "bob")
    assert caller(a, "") == caller(a, "", "2") != caller(b, "")
    assert caller(None, "") != caller(None, "", "2")
    assert len({caller(None, "x"), caller(make_key("x"), ""), caller(None, "", "x")}) == 3
    assert "ann" not in caller(a, "ann") and caller(a, "ann", adapter=None) == ""


BODIES: list[tuple[type[Body], dict[str, Any]]] = [
    (CompletionBody, {"prompt": "a"}),
    (ChatBody, {"messages": [{"role": "user", "content": "a"}]}),
    (ResponsesBody, {"input": "a"}),
    (EmbeddingsBody, {"input": "a"}),
]


def refusal(key: Key | None, *, tuning: object = None, served: str = "base", **fields: Any) -> ApiError | None:
    """What every way to use the model says to these fields."""
    settings = ServerSettings(engine=EngineSettings(model="m"), served_model_name=served)
    service: Any = SimpleNamespace(settings=settings, tuning=tuning)
    refusals = []
    for body_class, others in BODIES:
        body, _ = parse_body(body_class, json.dumps(others | {"model": "base"} | fields).encode(), warn_unknown=False)
        try:
            require_permitted(http_with(key), service, body)
        except ApiError as error:
            refusals.append(error)
    assert len(refusals) in (0, len(BODIES))
    return refusals[0] if refusals else None


@pytest.mark.parametrize("scale", [0, 1e-30, 0.001, 0.5, 0.999, 1.001, 8])
def test_a_scale_gives_no_key_the_answers_of_a_base_model_that_it_may_not_use(scale: float) -> None:
    only_adapter, both = make_key("a", models=("pirate",)), make_key("b", models=("pirate", "base"))
    for model in ("pirate", "pirate@0123"):
        error = refusal(only_adapter, model=model, adapter_scale=scale)
        assert error is not None and (error.status, error.param) == (403, "adapter_scale")
        assert "'base'" in str(error) and str(error).count(".") == 1
        for allowed in (1, 1.0, None):
            assert refusal(only_adapter, model=model, adapter_scale=allowed) is None
        for key in (both, make_key("c"), None):
            assert refusal(key, model=model, adapter_scale=scale) is None


def test_a_key_may_mix_only_adapters_that_it_may_use_and_only_at_scale_1_without_the_base() -> None:
    one, two = make_key("a", models=("pirate",)), make_key("b", models=("pirate", "bard"))
    all_three = make_key("c", models=("pirate", "bard", "base"))
    for model in ("pirate+bard", "bard@01234567+pirate", "pirate+bard+nobody"):
        error = refusal(one, model=model)
        assert error is not None and (error.status, error.param) == (403, "model")
    assert refusal(two, model="pirate+bard") is None
    for scale in (0, 0.5, 2):
        given = {"adapters": [{"name": "pirate"}, {"name": "bard", "scale": scale}]}
        error = refusal(two, model="pirate+bard", **given)
        assert error is not None and (error.status, error.param) == (403, "adapters")
        assert refusal(all_three, model="pirate+bard", **given) is None
        error = refusal(two, model="pirate+bard", adapter_scale=scale)
        assert error is not None and (error.status, error.param) == (403, "adapter_scale")
    assert refusal(two, model="pirate+bard", adapters=[{"name": "pirate", "scale": 1}, {"name": "bard"}]) is None


def test_a_fine_tuned_model_is_for_the_key_that_made_it_and_for_nobody_before_its_job_has_it() -> None:
    ann, bob, boss = make_key("ann"), make_key("bob"), make_key("admin", is_admin=True)
    owners = {"ft:m:x:1": ann.owner}
    tuning = SimpleNamespace(owner_of=owners.get)
    for model in ("ft:m:x:1", "ft:m:x:1@0123", "ft:m:x:1+pirate"):
        assert refusal(ann, tuning=tuning, model=model) is None
    for key, model in ((bob, "ft:m:x:1"), (bob, "ft:m:x:2"), (ann, "ft:m:x:2"), (ann, "ft:m:x:1+ft:m:x:2")):
        error = refusal(key, tuning=tuning, model=model)
        assert error is not None and (error.status, error.code) == (404, "model_not_found"), (key.name, model)
        assert refusal(boss, tuning=tuning, model=model) is refusal(None, tuning=tuning, model=model) is None
    assert refusal(bob, model="ft:m:x:2") is None, "without --fine-tuning it is a name like others"
    assert refusal(bob, tuning=tuning, served="ft:mine", model="ft:mine") is None


def test_priorities_are_between_0_and_100_unless_the_file_of_keys_says_otherwise() -> None:
    file = """
        [plain]
        key = "1"
        [urgent]
        key = "2"
        min_priority = -5
        max_priority = 5
        [batch]
        key = "3"
        min_priority = 50
    """
    flags = ServerSettings(engine=EngineSettings(model="m"), api_key=("user",), admin_api_key="boss")
    keys = {key.name: key for key in (*keys_of_flags(flags), *parse_keys(file))}
    bounds: dict[Key | None, tuple[int, int]] = {
        None: (0, 100),
        keys["api-key-1"]: (0, 100),
        keys["admin"]: (-100, 100),
        keys["plain"]: (0, 100),
        keys["urgent"]: (-5, 5),
        keys["batch"]: (50, 100),
    }
    for key, (lowest, highest) in bounds.items():
        for priority in (lowest, highest, None):
            assert refusal(key, priority=priority) is None
        for priority in {lowest - 1, highest + 1} & set(range(-100, 101)):
            error = refusal(key, priority=priority)
            assert error is not None and (error.status, error.param) == (400, "priority")
            assert f"between {lowest} and {highest}" in str(error)
        (request,) = with_key(http_with(key), [make_request([1])])
        assert request.priority == min(max(0, lowest), highest), "of a request that does not say"


def bounds(key: Key | None, *flags: str, **fields: Any) -> Bounds | ApiError:
    service: Any = SimpleNamespace(settings=parse_settings(flags, {}), info=SimpleNamespace(max_model_len=1000))
    body, _ = parse_body(
        CompletionBody, json.dumps({"model": "m", "prompt": "a"} | fields).encode(), warn_unknown=False
    )
    try:
        return Bounds.of(http_with(key), body, service)
    except ApiError as error:
        return error


def test_neither_server_nor_key_lets_an_answer_be_longer_than_it_says() -> None:
    short = make_key("short", max_tokens_per_request=50)
    for key, flags, most in (
        (None, (), None),
        (None, ("--max-tokens-per-request", "100"), 100),
        (short, (), 50),
        (short, ("--max-tokens-per-request", "100"), 50),
        (short, ("--max-tokens-per-request", "20"), 20),
        (make_key("other"), ("--max-tokens-per-request", "100"), 100),
    ):
        found = bounds(key, *flags, max_tokens=most)
        assert isinstance(found, Bounds) and found.answer == most
        assert found.default_tokens(4096) == (4096 if most is None else most)
        if most is not None:
            error = bounds(key, *flags, max_tokens=most + 1)
            assert isinstance(error, ApiError) and (error.status, error.param) == (400, "max_tokens")
            assert f"at most {most} tokens" in str(error)


def test_who_may_not_slide_is_refused_or_ends_with_the_context() -> None:
    never, plain = make_key("never", may_slide=False), make_key("plain")
    for key, flags, may in (
        (None, (), True),
        (plain, (), True),
        (never, (), False),
        (never, ("--context-overflow", "slide"), False),
        (None, ("--no-allow-slide",), False),
        (plain, ("--no-allow-slide",), False),
    ):
        asked = bounds(key, *flags, context_overflow="slide")
        if may:
            assert isinstance(asked, Bounds) and asked.overflow == "slide" and asked.context > 10**9
        else:
            assert isinstance(asked, ApiError) and (asked.status, asked.param) == (403, "context_overflow")
            silent = bounds(key, *flags)
            assert isinstance(silent, Bounds) and (silent.overflow, silent.context) == ("error", 1000)


def test_settings_that_contradict_each_other_stop_the_start() -> None:
    with pytest.raises(SettingsError, match="--no-allow-slide"):
        parse_settings(("--context-overflow", "slide", "--no-allow-slide"), {})


@pytest.mark.parametrize(
    "line", ["slide = 1", "slide = 'no'", "max_tokens_per_request = 0", "max_tokens_per_request = true"]
)
def test_a_file_of_keys_with_wrong_bounds_is_refused(line: str) -> None:
    with pytest.raises(SettingsError, match=line.split()[0]):
        parse_keys(f"[a]\nkey = '1'\n{line}\n")


def test_a_file_of_keys_bounds_answers() -> None:
    (key,) = parse_keys("[a]\nkey = '1'\nslide = false\nmax_tokens_per_request = 7\n")
    assert (key.may_slide, key.max_tokens_per_request) == (False, 7)
