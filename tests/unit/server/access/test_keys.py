"""The file of keys is read exactly or refused in one sentence, and no key is ever shown."""

import hashlib
import logging

import pytest

from stellarbyte_server.access.keys import Keyring, keys_of_flags, parse_keys, read_keys, read_keys_again
from stellarbyte_server.config.command_line import parse_settings
from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.config.settings import EngineSettings, ServerSettings
from stellarbyte_server.protocol.messages import KeyLimits

SECRET = "sk-very-secret"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()


def settings(**fields):
    return ServerSettings(engine=EngineSettings(model="m"), **fields)


def test_a_file_names_keys_and_their_limits():
    alice, bob = parse_keys(
        f"""
        [alice]
        key = "{SECRET}"
        models = ["base", "pirate"]
        requests_per_minute = 60
        concurrent_streams = 2
        share = "team"
        fine_tune = false
        max_fine_tuning_jobs = 1
        max_fine_tuning_tokens = 500
        [bob]
        sha256 = "{"AB" * 32}"
        """
    )
    assert alice.digest == DIGEST and bob.digest == "ab" * 32
    assert alice.limits == KeyLimits(key_name="alice", requests_per_minute=60, concurrent_streams=2)
    assert bob.limits == KeyLimits(key_name="bob") and bob.models is None
    assert (alice.share, bob.share) == ("team", None)
    assert (alice.may_fine_tune, alice.max_fine_tuning_jobs, alice.max_fine_tuning_tokens) == (False, 1, 500)
    assert (bob.may_fine_tune, bob.max_fine_tuning_jobs, bob.max_fine_tuning_tokens) == (True, 4, None)
    assert alice.allows("ft:mine+base", "base", {"ft:mine"}) and not alice.allows("ft:mine+json", "base", {"ft:mine"})
    assert alice.allows("base", "base") and alice.allows("pirate@0123", "base")
    assert not alice.allows("json", "base") and not alice.allows("@", "base")
    assert bob.allows("anything", "base")


def test_a_key_is_found_however_it_was_given():
    keyring = Keyring(settings(api_key=("one", "two"), admin_api_key="boss"), parse_keys(f"[a]\nsha256 = '{DIGEST}'"))
    found = {given: keyring.find(given.encode()) for given in ("one", "two", "boss", SECRET, "", "on", "one ", DIGEST)}
    assert {given: key.name for given, key in found.items() if key is not None} == {
        "one": "api-key-1",
        "two": "api-key-2",
        "boss": "admin",
        SECRET: "a",
    }
    assert [given for given, key in found.items() if key is not None and key.is_admin] == ["boss"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"[a\nkey = '{SECRET}'", "line 1"),
        (f"[a]\nkey = {SECRET}", "line 2"),
        (f"[a]\nkey = '{SECRET}'\nkey = 'b'", "TOML"),
        (f"[a]\nkey = '{SECRET}'\n[a]\nkey = 'b'", "line 3"),
        (f"{SECRET} = 'a'", "table"),
        (f"[a]\n{SECRET} = 'a'\nkey = 'x'\nkeys = 1", "unknown field"),
        ("[a]\nkey = 'x'\nrequests_per_hour = 1", "requests_per_hour"),
        ("[a]", "either 'key' or 'sha256'"),
        (f"[a]\nkey = '{SECRET}'\nsha256 = '{DIGEST}'", "either 'key' or 'sha256'"),
        (f"[a]\nkey = '{SECRET} '", "without spaces"),
        ("[a]\nkey = ''", "[a] key"),
        ("[a]\nkey = 5", "[a] key"),
        ("[a]\nsha256 = 'abc'", "64 hexadecimal"),
        ("[a]\nkey = 'x'\nmodels = 'pirate'", "models"),
        ("[a]\nkey = 'x'\nmodels = ['p', 1]", "models"),
        ("[a]\nkey = 'x'\nmodels = ['p', 'p']", "duplicate"),
        ("[a]\nkey = 'x'\nrequests_per_minute = 0", "requests_per_minute"),
        ("[a]\nkey = 'x'\ntokens_per_minute = 1.5", "tokens_per_minute"),
        ("[a]\nkey = 'x'\nconcurrent_streams = true", "concurrent_streams"),
        ("[a]\nkey = 'x'\nmin_priority = -101", "min_priority must be"),
        ("[a]\nkey = 'x'\nmax_priority = 1.5", "max_priority must be"),
        ("[a]\nkey = 'x'\nmin_priority = 5\nmax_priority = 4", "must be ≤ max_priority"),
        ("[a]\nkey = 'x'\nmax_priority = -1", "must be ≤ max_priority"),
        ("[a]\nkey = 'x'\nshare = true", "share"),
        ("[a]\nkey = 'x'\nshare = ''", "share"),
        ("['two words']\nkey = 'x'", "two words"),
        (f"[a]\nkey = '{SECRET}'\n[b]\nsha256 = '{DIGEST}'", "'a' and 'b'"),
        ("[admin]\nkey = 'x'", "[admin]"),
        ("[Alice]\nkey = 'x'\n[alice]\nkey = 'y'", "[Alice] and [alice]"),
        ("[a]\nkey = 'boss'", "'admin' and 'a'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_in_one_sentence_without_a_key(tmp_path, text, named):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as refusal:
        read_keys(settings(keys=str(file), admin_api_key="boss"))
    message = str(refusal.value)
    assert message.startswith(f"--keys: {file}: ") and named in message and "\n" not in message
    assert SECRET not in message and "boss" not in message


@pytest.mark.parametrize("name", ["admin", "Admin", "ADMIN", "api-key-1", "API-Key-1", "api-key-01", "api-key-99"])
@pytest.mark.parametrize("flags", [{}, {"api_key": ("one",), "admin_api_key": "boss"}])
def test_no_key_of_a_file_is_called_like_one_of_a_flag(name, flags):
    with pytest.raises(SettingsError, match="given as flags"):
        parse_keys(f"[{name}]\nkey = 'x'", taken=keys_of_flags(settings(**flags)))


@pytest.mark.parametrize("name", ["admins", "api-key", "api-key-a", "my-api-key-1", "administrator"])
def test_other_names_may_resemble_them(name):
    assert [key.name for key in parse_keys(f"[{name}]\nkey = 'x'")] == [name]


def test_a_broken_file_keeps_the_old_keys_and_logs_one_line(tmp_path, caplog):
    file = tmp_path / "keys.toml"
    file.write_text("[a]\nkey = 'one'")
    file.chmod(0o600)
    ours = settings(keys=str(file))
    old = read_keys(ours)
    caplog.set_level(logging.INFO)
    file.write_text("[a]\nkey = ")
    assert read_keys_again(ours, old) == old
    file.unlink()
    assert read_keys_again(ours, old) == old
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    file.write_bytes(b"\xff")
    assert read_keys_again(ours, old) == old
    file.write_text("[b]\nkey = 'two'")
    file.chmod(0o600)
    assert [key.name for key in read_keys_again(ours, old)] == ["b"]
    assert "two" not in caplog.text


def test_a_file_that_everybody_can_read_is_warned_of(tmp_path, caplog):
    file = tmp_path / "keys.toml"
    file.write_text("[a]\nkey = 'one'")
    for mode, warnings in ((0o640, 0), (0o644, 1)):
        caplog.clear()
        file.chmod(mode)
        read_keys(settings(keys=str(file)))
        assert len(caplog.records) == warnings


def test_no_key_is_shown_by_settings_help_or_refusals(capsys):
    environment = {"STELLARBYTE_API_KEY": f"{SECRET}-1 {SECRET}-2", "STELLARBYTE_ADMIN_API_KEY": f"{SECRET}-3"}
    made = parse_settings([], environment)
    assert made.api_key == (f"{SECRET}-1", f"{SECRET}-2") and made.admin_api_key == f"{SECRET}-3"
    assert SECRET not in repr(made) and SECRET not in repr(keys_of_flags(made))
    with pytest.raises(SystemExit):
        parse_settings(["--help"], environment)
    assert SECRET not in capsys.readouterr().out
    for arguments in (
        ["--api-kye", SECRET],
        [f"--api-kye={SECRET}"],
        ["--admin-api-key", "half", SECRET],
        ["--api-key", SECRET, f"{SECRET} x"],
        ["--api-key", SECRET, SECRET],
        ["--api-key", SECRET, "--admin-api-key", SECRET],
        ["--admin-api-key", f"{SECRET}é"],
    ):
        with pytest.raises(SettingsError) as refusal:
            parse_settings(arguments, {})
        assert SECRET not in str(refusal.value)
