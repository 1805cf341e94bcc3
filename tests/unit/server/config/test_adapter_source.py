"""Names of adapters on other hosts, and which of them --adapter-source allows."""

import pytest

from stellarbyte_server.config.adapter_source import AdapterSource, SourceError, folder_name, is_source
from stellarbyte_server.config.command_line import parse_settings
from stellarbyte_server.config.setting_values import SettingsError

SOURCES = [
    "hf://org/name",
    "hf://org/name@main",
    "hf://org/name@refs/pr/1",
    "hf://Org_1/na.me-2@0123456789abcdef0123456789abcdef01234567",
    "s3://bucket/prefix",
    "s3://bucket/a/b/step=100",
]


@pytest.mark.parametrize("text", SOURCES)
def test_a_source_is_read_and_written(text):
    assert str(AdapterSource.parse(text)) == text
    assert is_source(text)


NO_SOURCES = [
    *("", "org/name", "/etc", "file:///etc", "http://org/name", "HF://org/name", "hf:/org/name", "gs://bucket/prefix"),
    *("hf://", "hf://org", "hf://org/", "hf:///name", "hf://org//name", "hf://org/name/", "hf://org/name/more"),
    *("hf://org/..", "hf://../name", "hf://./name", "hf://org/name@", "hf://org/name@a@b", "hf://org/name@../x"),
    *("hf://org/name@a//b", "hf://org/na me", "hf://org/name?x", "hf://org/name#x", "hf://org/naïve", "hf://org/a%2fb"),
    *("hf://org/name\n", "hf://user:word@host/name", "s3://bucket", "s3://bucket/", "s3://bucket//a", "s3://bucket/a/"),
    *("s3://bucket/../a", "s3://bucket/a/./b", "s3://bucket/a@b", "s3://bucket/a\0b", "s3://b/" + "a/" * 500 + "a"),
    "s3://bucket/" + "a" * 129,
]


@pytest.mark.parametrize("text", NO_SOURCES)
def test_what_is_no_source_is_refused(text):
    with pytest.raises(SourceError):
        AdapterSource.parse(text)


@pytest.mark.parametrize(
    ("prefix", "source", "is_allowed"),
    [
        ("hf://org", "hf://org/x", True),
        ("hf://org", "hf://org/x@main", True),
        ("hf://org", "hf://organisation/x", False),
        ("hf://org", "s3://org/x", False),
        ("hf://org/x", "hf://org/x", True),
        ("hf://org/x", "hf://org/x@v2", True),
        ("hf://org/x", "hf://org/xy", False),
        ("hf://org/x@v1", "hf://org/x@v1", True),
        ("hf://org/x@v1", "hf://org/x@v12", False),
        ("hf://org/x@v1", "hf://org/x", False),
        ("s3://bucket", "s3://bucket/a/b", True),
        ("s3://bucket/a", "s3://bucket/a/b", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket/a/b/c", "s3://bucket/a/b", False),
    ],
)
def test_a_prefix_allows_whole_parts_only(prefix, source, is_allowed):
    assert AdapterSource.parse_prefix(prefix).allows(AdapterSource.parse(source)) is is_allowed


def test_each_version_has_a_folder_of_its_own():
    source = AdapterSource.parse("hf://org/x@main")
    names = {folder_name(str(source.at(version))) for version in ("a", "b", "c")}
    assert len(names) == 3 and all(name.isalnum() for name in names)


def test_prefixes_are_a_setting():
    settings = parse_settings(["--adapter-source", "hf://org", "s3://bucket/a"], {})
    assert settings.engine.adapter_source == ("hf://org", "s3://bucket/a")
    assert settings.engine.serves_adapters and not parse_settings([], {}).engine.serves_adapters
    variable = {"STELLARBYTE_ADAPTER_SOURCE": "hf://org s3://bucket"}
    assert parse_settings([], variable).engine.adapter_source == ("hf://org", "s3://bucket")


@pytest.mark.parametrize(
    "prefix", ["hf://", "s3://", "org", "hf://org/", "hf://org/a/b", "hf://org@main", "*", "hf://.."]
)
def test_what_is_no_prefix_stops_the_start(prefix):
    with pytest.raises(SettingsError, match=r"--adapter-source.* must be hf://ORG"):
        parse_settings(["--adapter-source", prefix], {})
