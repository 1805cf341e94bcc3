"""Flags and variables: what they become, and that what cannot be used is refused in one sentence."""

import pytest

from stellarbyte_server.config.command_line import parse_settings
from stellarbyte_server.config.setting_values import SettingsError


def test_defaults_serve_the_demo_model_on_the_loopback_address():
    settings = parse_settings([], {})
    assert (settings.engine.model, settings.host, settings.port) == ("demo", "127.0.0.1", 8000)
    assert settings.model_name == "SmolLM2-135M-Instruct"
    assert settings.engine.sliding_window == "model"
    assert settings.engine.kv_cache_memory is None


def test_a_flag_wins_over_its_variable():
    environment = {"STELLARBYTE_PORT": "9000", "STELLARBYTE_MAX_NUM_SEQS": "3"}
    settings = parse_settings(["--port", "9001"], environment)
    assert (settings.port, settings.engine.max_num_seqs) == (9001, 3)


def test_local_operators_are_for_servers_that_only_this_machine_reaches_and_that_have_no_keys():
    assert not parse_settings([], {}).allow_local_admin
    assert parse_settings(["--allow-local-admin"], {}).allow_local_admin
    for others in (["--host", "0.0.0.0"], ["--host", "box.lan"], ["--api-key", "a"], ["--admin-api-key", "a"]):
        with pytest.raises(SettingsError, match="--admin-api-key"):
            parse_settings(["--allow-local-admin", *others], {})


def test_allowed_hosts_are_names_without_ports():
    variable = {"STELLARBYTE_ALLOWED_HOST": "LLM.example server [::1] 10.0.0.7"}
    assert parse_settings([], variable).allowed_host == ("llm.example", "server", "::1", "10.0.0.7")
    for wrong in ("llm.example:8000", "http://llm.example", "*", "", "a b", ".example"):
        with pytest.raises(SettingsError, match="--allowed-host"):
            parse_settings(["--allowed-host", wrong], {})


@pytest.mark.parametrize("name", ["STELLARBYTE_API_KEYS", "STELLARBYTE_ADMIN_KEY", "STELLARBYTE_"])
def test_a_variable_that_is_no_setting_is_named(name):
    with pytest.raises(SettingsError, match=name):
        parse_settings([], {name: "x"})


def test_what_kubernetes_and_clients_are_told_is_no_misspelt_setting():
    """A container beside a Service called stellarbyte-server gets such variables."""
    others = {
        "STELLARBYTE_SERVER_SERVICE_HOST": "10.0.0.1",
        "STELLARBYTE_SERVER_SERVICE_PORT": "8000",
        "STELLARBYTE_SERVER_SERVICE_PORT_HTTP": "8000",
        "STELLARBYTE_SERVER_PORT": "tcp://10.0.0.1:8000",
        "STELLARBYTE_SERVER_PORT_8000_TCP_ADDR": "10.0.0.1",
        "STELLARBYTE_URL": "http://127.0.0.1:8000",
        "STELLARBYTE_CACHE": "/var/cache",
    }
    assert parse_settings([], others) == parse_settings([], {})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/tiny", "tiny"),
        ("/models/tiny/", "tiny"),
        ("/models/a/../tiny", "tiny"),
        ("/models/tiny.Q8_0.gguf", "tiny.Q8_0"),
        ("org/tiny", "org/tiny"),
        ("org/tiny-0.6B@refs/pr/1", "org/tiny-0.6B"),
        ("here/tiny", "tiny"),  # there is a path of this name
    ],
)
def test_the_served_name_is_the_models_unless_given(path, name, tmp_path, monkeypatch):
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_settings(["--model", path], {}).model_name == name
    assert parse_settings(["--model", path, "--served-model-name", "mine"], {}).model_name == "mine"


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("2GiB", 2 * 2**30), ("512mib", 512 * 2**20), ("1.5GB", 1_500_000_000)]
)
def test_bytes_may_have_a_unit(text, size):
    assert parse_settings(["--kv-cache-memory", text], {}).engine.kv_cache_memory == size


def test_none_and_auto_are_values_of_their_own():
    settings = parse_settings(["--sliding-window", "none", "--kv-cache-memory", "auto"], {})
    assert settings.engine.sliding_window is None
    assert settings.engine.kv_cache_memory is None
    assert parse_settings(["--sliding-window", "128"], {}).engine.sliding_window == 128
    for text, replicas in (("auto", None), ("2", 2)):
        assert parse_settings(["--replicas", text], {}).engine.replicas == replicas
    assert parse_settings([], {}).engine.replicas == 1


def test_a_switch_has_two_flags_and_a_variable():
    def is_on(arguments, environment):
        return parse_settings(arguments, environment).engine.enable_prefix_caching

    variable = "STELLARBYTE_ENABLE_PREFIX_CACHING"
    assert is_on([], {})
    assert not is_on(["--no-enable-prefix-caching"], {})
    assert not is_on([], {variable: "false"})
    assert is_on(["--enable-prefix-caching"], {variable: "0"})
    with pytest.raises(SettingsError, match=variable):
        is_on([], {variable: "maybe"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "0"],
        ["--port", "65536"],
        ["--port", "http"],
        ["--port"],
        ["--por", "8000"],
        ["--no-such-flag"],
        ["stray"],
        ["--dtype", "float16"],
        ["--max-num-seqs", "0"],
        ["--replicas", "0"],
        ["--replicas", "some"],
        ["--max-model-len", "9" * 30],
        ["--gpu-memory-utilization", "1.5"],
        ["--gpu-memory-utilization", "nan"],
        ["--kv-cache-memory", "2 parsecs"],
        ["--sliding-window", "0"],
        ["--shutdown-timeout", "-1"],
        ["--queue-timeout", "soon"],
        ["--max-queued-requests", "-1"],
        ["--context-overflow", "wrap"],
        ["--no-port"],
        ["--chat-template", "/no/such/file"],
        ["--model", ""],
        ["--adapter-dir", "/no/such/folder"],
        ["--lora-modules", "pirate"],
        ["--lora-modules", "=path"],
        ["--lora-modules", "two words=path"],
        ["--lora-modules", "a@b=path"],
        ["--lora-modules", "a=x", "a=y"],
        ["--lora-modules", "SmolLM2-135M-Instruct=x"],
        ["--lora-modules", "ft:a=x", "--fine-tuning", "cpu", "--data-dir", "x"],
        ["--feedback"],  # without --data-dir
        ["--feedback-bytes", "1MiB", "--data-dir", "x"],  # without --feedback
        ["--feedback-bytes", "much", "--feedback", "--data-dir", "x"],
        ["--max-loras", "0"],
        ["--max-cpu-loras", "8"],
        ["--max-lora-rank", "2000"],
        ["--admin-api-key", " "],
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_naming_it(arguments):
    with pytest.raises(SettingsError) as refusal:
        parse_settings(arguments, {})
    assert arguments[0] in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_adapters_are_given_as_several_values_several_flags_or_several_words():
    expected = (("a", "x"), ("b", "y=z"))
    for arguments in (["--lora-modules", "a=x", "b=y=z"], ["--lora-modules", "a=x", "--lora-modules", "b=y=z"]):
        assert parse_settings(arguments, {}).engine.lora_modules == expected
    settings = parse_settings([], {"STELLARBYTE_LORA_MODULES": "a=x b=y=z"})
    assert settings.engine.lora_modules == expected and settings.engine.serves_adapters
    assert not parse_settings([], {}).engine.serves_adapters


def test_a_wrong_variable_is_named_as_the_variable():
    with pytest.raises(SettingsError, match="STELLARBYTE_PORT"):
        parse_settings([], {"STELLARBYTE_PORT": "many"})


def test_the_admin_address_is_on_loopback() -> None:
    for text, address in (("127.0.0.1:8001", ("127.0.0.1", 8001)), ("localhost:1", ("localhost", 1)),
                          ("[::1]:65535", ("::1", 65535))):  # fmt: skip
        assert parse_settings(["--admin-listen", text], {}).admin_listen == address
    assert parse_settings([], {}).admin_listen is None
    for wrong in ("8001", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:70000", "0.0.0.0:8001", "10.0.0.1:8001", ":8001",
                  "box.lan:8001", "::1:8001", "unix:/tmp/x", ""):  # fmt: skip
        with pytest.raises(SettingsError, match=r"--admin-listen: .* must be HOST:PORT with a loopback address"):
            parse_settings(["--admin-listen", wrong], {})


def test_events_are_published_at_addresses_of_this_machine() -> None:
    given = ["--kv-events", "tcp://*:5557", "--kv-events-replay", "tcp://[::1]:5558", "--kv-events-topic", "kv@a"]
    engine = parse_settings(given, {}).engine
    assert (engine.kv_events, engine.kv_events_replay, engine.kv_events_topic) == (given[1], given[3], given[5])
    for wrong in ("5557", "tcp://host:5557", "tcp://127.0.0.1", "tcp://127.0.0.1:0", "ipc://x", "tcp://1.2.3:5"):
        with pytest.raises(SettingsError, match=r"--kv-events: .* must be tcp://HOST:PORT"):
            parse_settings(["--kv-events", wrong], {})
    with pytest.raises(SettingsError, match="--kv-events: needs --enable-prefix-caching"):
        parse_settings([*given, "--no-enable-prefix-caching"], {})
    for alone in (given[2:4], given[4:]):
        with pytest.raises(SettingsError, match=f"{alone[0]}: needs --kv-events"):
            parse_settings(alone, {})


def test_tiers_below_the_cache_need_what_they_rest_on() -> None:
    disk = ["--kv-offload-dir", "kv", "--kv-offload-bytes", "10GiB"]
    engine = parse_settings([*disk, "--kv-offload-memory", "2GiB"], {}).engine
    assert (engine.kv_offload_dir, engine.kv_offload_bytes, engine.kv_offload_memory) == ("kv", 10 * 2**30, 2 * 2**30)
    for flags, message in (
        (disk[:2], "--kv-offload-dir: needs --kv-offload-bytes"),
        (disk[2:], "--kv-offload-bytes: needs --kv-offload-dir"),
        ([*disk, "--no-enable-prefix-caching"], "--kv-offload-dir: needs --enable-prefix-caching"),
        (
            ["--kv-offload-memory", "1GiB", "--tensor-parallel-size", "2"],
            "--kv-offload-memory: not with --tensor-parallel-size",
        ),
        (["--kv-offload-memory", "many"], "--kv-offload-memory: "),
        (["--kv-offload-dir", ""], "--kv-offload-dir: the value is empty"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse_settings(flags, {})
